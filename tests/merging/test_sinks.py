"""Where a merge goes. PEFT is the oracle: what it adds to a weight is what we meant,
for every kind of module.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import sapmerge as sm
from tests.conftest import error
from tests.models import (
    BASE,
    IDS,
    KINDS,
    PREFIX,
    Block,
    Zoo,
    copied,
    deltas,
    files,
    load,
    lora,
    matrices,
    quietly,
    same,
    save_lora,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters on every kind of module: other ranks, alphas, targets; one by rsLoRA."""
    root = tmp_path_factory.mktemp("zoo")
    return [
        save_lora(root / "a", 1),
        save_lora(
            root / "b",
            2,
            r=2,
            alpha=3,
            use_rslora=True,
            targets=("embed", "enc.q", "gpt", "image", "layers.1.v"),
        ),
        save_lora(
            root / "c", 3, r=3, alpha=1, rank_pattern={"gpt": 1, "^q": 2}, alpha_pattern={"wave": 9}
        ),
    ]


@pytest.fixture(scope="module")
def oracle(zoo: list[Path]) -> list[dict[str, Tensor]]:
    return [matrices(deltas(load(path)), Zoo()) for path in zoo]


def total(oracle: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(found[name] for found in oracle if name in found) for name in oracle[0]}  # type: ignore[misc]


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], within: float = 1e-6) -> None:
    assert set(got) == set(wanted)
    for name in wanted:
        assert error(got[name], wanted[name]) < within, name


def own(folder: Path) -> dict[str, Tensor]:
    adapter = sm.Adapter.load(folder)
    return {name: adapter.update(name).dense() for name in adapter.modules}


def updated(model: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """A copy of a model with the matrices added to its weights, by hand."""
    model = copy.deepcopy(model)
    for name, matrix in updates.items():
        module = model.get_submodule(name)
        turned = isinstance(module, (nn.Embedding, Conv1D))
        module.weight.data += (matrix.T if turned else matrix.reshape(module.weight.shape)).to(
            module.weight.dtype
        )
    return model


# save_pretrained


def test_every_kind_of_module_goes_through_a_checkpoint(
    zoo: list[Path], oracle: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    merged = sm.merge(zoo, method=sm.task_arithmetic())
    merged.save_pretrained(tmp_path / "out")
    wanted = total(oracle)
    assert set(KINDS) <= set(wanted)
    close(matrices(deltas(load(tmp_path / "out")), Zoo()), wanted)
    close(own(tmp_path / "out"), wanted)
    close({name: update.dense() for name, update in merged.updates()}, wanted)
    assert error(load(tmp_path / "out")(IDS), updated(Zoo(), wanted)(IDS)) < 1e-5


def test_the_config_is_built_from_nothing(zoo: list[Path], tmp_path: Path) -> None:
    sm.merge(zoo, method=sm.mean()).save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["use_rslora"] is False
    assert config["bias"] == "none"
    assert config["base_model_name_or_path"] == BASE
    assert config["target_modules"] == sorted(config["target_modules"])
    peft_model = load(tmp_path / "out")
    scalings = {
        m.scaling["default"]
        for m in peft_model.modules()
        if isinstance(getattr(m, "scaling", None), dict)
    }
    assert scalings == {1.0}
    assert not any(
        module.use_rslora.get("default")
        for module in peft_model.modules()
        if hasattr(module, "use_rslora")
    )


def test_ranks_of_names_that_are_endings_of_other_names(tmp_path: Path) -> None:
    names = (
        "q",
        "enc.q",
        "layers.0.q",
        "layers.1.q",
        "xlayers.0.q",
        "xlayers.1.q",
        "xlayers.1.v",
        "layers.1.v",
    )
    for number, ranks in enumerate(
        [(1, 2, 3, 4, 5, 6, 7, 8), (8, 7, 6, 5, 4, 3, 2, 1), (3, 3, 2, 2, 2, 5, 5, 5)]
    ):
        state = {}
        generator = torch.Generator().manual_seed(number)
        for name, rank in zip(names, ranks):
            state[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, 12, generator=generator)
            state[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(12, rank, generator=generator)
        pattern = {"^" + re.escape(name): rank for name, rank in zip(names, ranks)}
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": list(names),
                  "rank_pattern": pattern, "alpha_pattern": pattern}  # fmt: skip
        sm.merge([(config, state)], method=sm.mean()).save_pretrained(
            tmp_path / str(number), uniform_rank=False
        )
        wanted = {
            n: (state[f"{PREFIX}{n}.lora_B.weight"] @ state[f"{PREFIX}{n}.lora_A.weight"])
            for n in names
        }
        peft_model = load(tmp_path / str(number))
        close(deltas(peft_model), wanted)
        found = {n: peft_model.get_base_model().get_submodule(n).r["default"] for n in names}
        assert found == dict(zip(names, ranks))
        close(own(tmp_path / str(number)), wanted)


def test_modules_whose_name_ends_like_an_adapted_one_stay_as_they_are(tmp_path: Path) -> None:
    """PEFT matches endings: with "q" adapted it also makes adapters for "enc.q" and others.
    They must add zero.
    """
    folder = save_lora(tmp_path / "a", 1, targets="q|embed")
    sm.merge([folder, folder], method=sm.mean()).save_pretrained(tmp_path / "out")
    peft_model = quietly(PeftModel.from_pretrained, Zoo(), str(tmp_path / "out"))
    wanted = matrices(deltas(load(folder)), Zoo())
    assert set(wanted) == {"q", "embed"}
    for name, delta in matrices(deltas(peft_model), Zoo()).items():
        assert error(delta, wanted[name]) < 1e-6 if name in wanted else float(delta.norm()) == 0


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [((F16, F16), F16), ((BF16, BF16), BF16), ((F16, BF16), F32), ((F16, F32), F32)],
)
def test_the_dtype_of_the_output(
    tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype], wanted: torch.dtype
) -> None:
    folders = [
        save_lora(tmp_path / str(k), k, dtype=dtype, size=0.3) for k, dtype in enumerate(dtypes)
    ]
    merged = sm.merge(folders, method=sm.mean())
    merged.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    exact = dict(merged.updates())
    sources = [matrices(deltas(load(folder)), Zoo()) for folder in folders]
    close(
        {n: u.dense() for n, u in exact.items()},
        {n: (sources[0][n] + sources[1][n]) / 2 for n in sources[0]},
    )
    close(matrices(deltas(load(tmp_path / "out")), Zoo()), {n: u.dense() for n, u in exact.items()},
          1e-6 if wanted == F32 else 4 * torch.finfo(wanted).eps)  # fmt: skip
    for name, update in exact.items():  # rounded once
        assert isinstance(update, sm.LowRank)
        key = next(k for k in tensors if k.startswith(f"{PREFIX}{name}.lora") and ("_A" in k))
        if update.rank <= min(update.shape):
            assert torch.equal(tensors[key].flatten(1), update.A.to(wanted))


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_dtype_for_the_output(tmp_path: Path, dtype: torch.dtype) -> None:
    """Rounded once, heads too; what is lost is in the report, as for inputs of that dtype."""
    folders = [save_lora(tmp_path / str(k), k, size=0.3) for k in range(2)]
    merged = sm.merge(folders, method=sm.mean())
    merged.save_pretrained(tmp_path / "wide")
    merged.save_pretrained(tmp_path / "out", dtype=dtype)
    report = merged.report
    wide = load_file(tmp_path / "wide" / "adapter_model.safetensors")
    out = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {F32}
    assert {name: tensor.to(dtype) for name, tensor in wide.items()}.keys() == out.keys()
    for name, tensor in wide.items():
        assert torch.equal(out[name], tensor.to(dtype)), name
    wanted = {name: update.dense().double() for name, update in merged.updates()}
    stored = matrices(deltas(load(tmp_path / "out")), Zoo())
    total = sum(float(delta.square().sum()) for delta in wanted.values())
    lost = sum(float((stored[name].double() - wanted[name]).square().sum()) for name in wanted)
    assert 0 < lost < total * torch.finfo(dtype).eps ** 2 * 4
    assert report.energy_kept == pytest.approx(1 - lost / total, abs=1e-9)
    assert report.energy_kept < 1
    again = sm.merge(folders, method=sm.mean())
    assert again.report.energy_kept == 1.0
    assert sm.reproduce(tmp_path / "out", folders) == []
    assert sm.verify(tmp_path / "out", folders) == []


def test_a_dtype_that_cannot_hold_the_output(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", 1, size=0.3)
    with pytest.warns(sm.SapmergeWarning, match=r"too small for torch\.float16"):
        sm.merge([folder], method=sm.mean(), scale=1e-9).save_pretrained(
            tmp_path / "tiny", dtype="float16"
        )
    with pytest.raises(sm.NonFiniteError, match=r"overflows the output's torch\.float16"):
        sm.merge([folder], method=sm.mean(), scale=1e9).save_pretrained(
            tmp_path / "huge", dtype="float16"
        )
    assert not (tmp_path / "huge").exists()
    for wrong, hint in (("fp16", "did you mean float16?"), (torch.int8, "float32, bfloat16")):
        with pytest.raises(sm.MethodError, match=re.escape(hint)):
            sm.merge([folder], method=sm.mean()).save_pretrained(tmp_path / "huge", dtype=wrong)


def test_a_head_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.classifier = nn.Linear(6, 6), nn.Linear(6, 2)

    config = LoraConfig(target_modules=["q"], modules_to_save=["classifier"])
    model = get_peft_model(Small(), config)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.fill_(1e6)
    model.save_pretrained(str(tmp_path / "a"))
    merged = sm.merge([tmp_path / "a"], method=sm.mean(), modules_to_save="first", base_model=BASE)
    with pytest.raises(sm.NonFiniteError, match=r"classifier.*output's torch.float16"):
        merged.save_pretrained(tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    merged.save_pretrained(tmp_path / "out", dtype="bfloat16")


def test_more_columns_than_rows(tmp_path: Path) -> None:
    """The ranks add up to more than a narrow layer has: the factors are compressed without loss."""
    folders = [
        save_lora(tmp_path / str(k), k, r=4, targets=("video", "image", "wave")) for k in range(3)
    ]
    merged = sm.merge(folders, method=sm.mean())
    merged.save_pretrained(tmp_path / "out")
    assert {row.name: row.rank for row in merged.report.layers} == {
        "video": 4,
        "image": 5,
        "wave": 6,
    }
    assert merged.report.energy_kept == 1.0
    sources = [matrices(deltas(load(folder)), Zoo()) for folder in folders]
    wanted = {name: sum(s[name] for s in sources) / 3 for name in sources[0]}
    close(matrices(deltas(load(tmp_path / "out")), Zoo()), wanted)
    close(own(tmp_path / "out"), wanted)


def test_rank_above_the_size_of_a_layer(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "narrow", 1, r=8, alpha=8, targets=("narrow", "q"))
    sm.merge([folder], method=sm.mean()).save_pretrained(tmp_path / "padded")
    sm.merge([folder], method=sm.mean()).save_pretrained(tmp_path / "out", uniform_rank=False)
    for name in ("padded", "out"):
        close(matrices(deltas(load(tmp_path / name)), Zoo()), matrices(deltas(load(folder)), Zoo()))
    assert sm.Adapter.load(tmp_path / "out").modules["narrow"].rank == 2


def test_a_merge_can_be_merged_again(
    zoo: list[Path], oracle: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    sm.merge(zoo, method=sm.task_arithmetic()).save_pretrained(tmp_path / "once")
    sm.merge([tmp_path / "once", zoo[0]], method=sm.task_arithmetic()).save_pretrained(
        tmp_path / "twice"
    )
    wanted = total(oracle)
    close(
        matrices(deltas(load(tmp_path / "twice")), Zoo()),
        {n: wanted[n] + oracle[0][n] for n in wanted},
    )


def test_an_existing_output(zoo: list[Path], tmp_path: Path) -> None:
    merged = sm.merge(zoo, method=sm.mean())
    out = tmp_path / "out"
    merged.save_pretrained(out)
    before = files(out)
    with pytest.raises(sm.OutputExistsError, match="out"):
        sm.merge(zoo[:1], method=sm.mean()).save_pretrained(out)
    assert files(out) == before
    sm.merge(zoo[:1], method=sm.mean()).save_pretrained(str(out), overwrite=True)
    assert files(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    close(own(out), own(zoo[0]))
    before = files(out)
    # or it could never be reproduced
    with pytest.raises(sm.OutputError, match="one of the inputs"):
        sm.merge([out, zoo[1]], method=sm.mean()).save_pretrained(out, overwrite=True)
    assert files(out) == before


def test_an_output_that_overflows_is_not_written(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "half", 1, dtype=F16, size=200.0)
    merged = sm.merge([folder], method=sm.mean(), scale=1e4)
    with pytest.raises(sm.NonFiniteError, match=r"embed.*float16"):
        merged.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_file_that_changes_under_the_merge_is_noticed(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", 1)
    merged = sm.merge([folder], method=sm.mean())
    save_lora(folder, 2)
    with pytest.raises(sm.InputChangedError, match="a"):
        merged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_other_spelling_gets_its_own_names(tmp_path: Path) -> None:
    """The adapter is saved as it was spelled, or as `names` says,
    or as the model does if one is given.
    """

    class Llava(nn.Module):  # as transformers 4 names things
        def __init__(self) -> None:
            super().__init__()
            self.language_model = nn.Module()
            self.language_model.model = nn.Module()
            self.language_model.model.layers = nn.ModuleList([Block(6)])
            self.multi_modal_projector = nn.Sequential(OrderedDict(linear_1=nn.Linear(4, 6)))

    folder = save_lora(
        tmp_path / "v4", 1, Llava(), targets=["q"], modules_to_save=["multi_modal_projector"]
    )
    merged = sm.merge([folder], method=sm.mean(), modules_to_save="mean")
    assert list(merged.run.stream.modules) == ["model.language_model.layers.0.q"]
    merged.save_pretrained(tmp_path / "as it was")
    names = set(load_file(tmp_path / "as it was" / "adapter_model.safetensors"))
    assert names == set(load_file(folder / "adapter_model.safetensors"))
    merged.save_pretrained(tmp_path / "v5", names="transformers 5")
    names = set(load_file(tmp_path / "v5" / "adapter_model.safetensors"))
    assert names == {
        PREFIX + "model.language_model.layers.0.q.lora_A.weight",
        PREFIX + "model.language_model.layers.0.q.lora_B.weight",
        PREFIX + "model.multi_modal_projector.linear_1.weight",
        PREFIX + "model.multi_modal_projector.linear_1.bias",
    }
    sm.merge(
        [tmp_path / "v5"], model=Llava(), method=sm.mean(), modules_to_save="mean"
    ).save_pretrained(tmp_path / "back")
    old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("v4", "back"))
    assert set(old) == set(new)
    peft_model = load(tmp_path / "back", Llava())
    close(deltas(peft_model), deltas(load(folder, Llava())))
    head = peft_model.get_base_model().multi_modal_projector.modules_to_save["default"]
    assert torch.equal(head.linear_1.weight, old[PREFIX + "multi_modal_projector.linear_1.weight"])


# apply_to


def test_one_adapter_applied_is_merge_and_unload(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", 1)
    mine, theirs = Zoo(), load(folder).merge_and_unload()
    sm.merge([folder], method=sm.mean()).apply_to(mine)
    for name, tensor in theirs.state_dict().items():
        assert error(mine.state_dict()[name], tensor) < 1e-6, name
    assert error(mine(IDS), load(folder)(IDS)) < 1e-5
    untouched = {
        name
        for name, tensor in Zoo().state_dict().items()
        if torch.equal(tensor, mine.state_dict()[name])
    }
    assert untouched == {
        name
        for name in mine.state_dict()
        if name.removesuffix(".weight") not in deltas(load(folder))
    }


def test_the_whole_merge_moves_the_logits_as_the_dense_sum(
    zoo: list[Path], oracle: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    merged = sm.merge(zoo, method=sm.task_arithmetic(), weights=[1, -1, 0.5])
    wanted = {n: oracle[0][n] - oracle[1].get(n, 0.0) + 0.5 * oracle[2][n] for n in oracle[0]}
    logits = updated(Zoo().double(), wanted)(IDS)
    model = Zoo()
    merged.apply_to(model)
    assert error(model(IDS), logits) < 1e-5
    merged.save_pretrained(tmp_path / "out")
    assert error(load(tmp_path / "out")(IDS), logits) < 1e-5
    assert error(Zoo()(IDS), logits) > 1e-2


def test_dense_results_lose_nothing(zoo: list[Path]) -> None:
    merged = sm.merge(zoo, method=sm.ties(0.2), rank=1)
    model, before = Zoo(), Zoo()
    merged.apply_to(model)  # no warning about energy: all of it is there
    moved = {
        n: (m.weight - before.get_submodule(n).weight)
        for n, m in model.named_modules()
        if hasattr(m, "weight")
    }
    moved = {
        name: change.detach() for name, change in moved.items() if name in dict(merged.updates())
    }
    close(matrices(moved, Zoo()), {name: update.dense() for name, update in merged.updates()}, 2e-6)
    assert merged.report.energy_kept == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_the_dtype_of_the_model_stays(zoo: list[Path], dtype: torch.dtype) -> None:
    model = Zoo().to(dtype)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 1e-3  # bits that float32 does not have
    merged = sm.merge(zoo, method=sm.ties(0.2))
    changes = {name: update.dense() for name, update in merged.updates()}
    wanted = updated(copy.deepcopy(model).double(), changes).state_dict()
    before = copied(model)
    merged.apply_to(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for name, tensor in model.state_dict().items():
        kept = wanted[name] == before[name]
        # where nothing is added, every bit stays
        assert torch.equal(tensor[kept], before[name][kept])
        assert torch.equal(tensor, wanted[name].to(dtype)) or (
            dtype == BF16 and error(tensor, wanted[name]) < 4e-3
        )
    assert kept.any()


def test_a_live_peft_model_is_changed_in_its_base(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", 1)
    peft_model = lora(Zoo(), 2, r=2)
    expected = updated(Zoo(), matrices(deltas(load(folder)), Zoo()))
    for parameter in (n := dict(expected.named_parameters())):
        assert n[parameter] is not None
    other = deltas(peft_model)
    sm.merge([folder], method=sm.mean()).apply_to(peft_model)
    close(deltas(peft_model), other, 1e-9)
    assert error(peft_model.unload()(IDS), expected(IDS)) < 1e-5


@pytest.mark.parametrize("fails_at", ["layers.1.v", "xlayers.1.v"])
def test_a_failure_in_the_middle_changes_nothing(zoo: list[Path], fails_at: str) -> None:
    class Broken(RuntimeError):
        pass

    def breaking(layer: sm.Layer) -> sm.Update:
        if layer.name == fails_at:
            raise Broken
        return sm.Sum()(layer)

    def overflowing(layer: sm.Layer) -> sm.Update:
        return sm.Sum()(layer).scaled(1e30 if layer.name == fails_at else 1.0)

    def interrupting(layer: sm.Layer) -> sm.Update:
        if layer.name == fails_at:
            raise KeyboardInterrupt
        return sm.Sum()(layer)

    for method, kind in (
        (breaking, Broken),
        (overflowing, sm.NonFiniteError),
        (interrupting, KeyboardInterrupt),
    ):
        model = Zoo().to(F16)
        before = copied(model)
        with pytest.raises(kind):
            sm.merge(zoo, method=method).apply_to(model)
        assert same(before, copied(model)), kind


def test_a_model_that_does_not_fit_is_not_touched(zoo: list[Path]) -> None:
    model = Zoo()
    model.wave = nn.Conv1d(9, 6, 5)
    before = copied(model)
    with pytest.raises(sm.ModelMismatchError, match=r"'wave'.*\(6, 45\).*\(6, 27\)"):
        sm.merge(zoo, method=sm.mean()).apply_to(model)
    del model.image
    with pytest.raises(sm.ModelMismatchError, match="no module 'image'"):
        sm.merge(zoo, method=sm.mean()).apply_to(model)
    with pytest.raises(sm.ModelMismatchError):
        sm.merge(zoo, method=sm.mean()).apply_to(nn.Linear(2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied(model).items())


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)
    folder = save_lora(tmp_path / "a", 1, GPT2LMHeadModel(config), targets=["wte"], r=2)
    model = GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    before = copied(model)
    with pytest.raises(
        sm.ModelMismatchError, match=r"'transformer\.wte' is tied.*lm_head\.weight.*untie"
    ):
        sm.merge([folder], method=sm.mean()).apply_to(model)
    assert same(before, copied(model))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    sm.merge([folder], method=sm.mean()).apply_to(model)
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.q = nn.Embedding(9, 6), nn.Linear(6, 6)
            self.lm_head = nn.Linear(6, 9, bias=False)

    folder = save_lora(tmp_path / "a", 1, Tied(), targets=["q"], r=2, modules_to_save=["lm_head"])
    merged = sm.merge([folder], method=sm.mean(), modules_to_save="mean")
    model = Tied()
    model.lm_head.weight = model.embed.weight
    before = copied(model)
    with pytest.raises(sm.ModelMismatchError, match=r"lm_head.*tied"):
        merged.apply_to(model)
    assert same(before, copied(model))


# add_to


def test_a_new_adapter_of_a_live_model(
    zoo: list[Path], oracle: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    merged = sm.merge(zoo, method=sm.task_arithmetic())
    live = lora(Zoo(), 7, r=2, targets=("q", "gpt"))
    before, logits, own_deltas = copied(live), live(IDS), deltas(live)
    flags = {name: (p.requires_grad, p.dtype) for name, p in live.named_parameters()}
    names = {id(p): name for name, p in live.named_parameters()}
    active = live.active_adapter
    merged.add_to(live, "merged")
    assert live.active_adapter == active == "default"
    assert torch.equal(live(IDS), logits)
    close(deltas(live), own_deltas, 1e-9)
    after = {names[id(p)]: p for p in live.parameters() if id(p) in names}
    assert set(after) == set(names.values())
    assert {name: (p.requires_grad, p.dtype) for name, p in after.items()} == flags
    assert all(torch.equal(p, before[name]) for name, p in after.items())
    merged.save_pretrained(tmp_path / "out")
    loaded = deltas(load(tmp_path / "out"))
    added = deltas(live, "merged")
    close(added, loaded, 1e-9)
    close(matrices(added, Zoo()), total(oracle))
    live.set_adapter("merged")
    assert error(live(IDS), load(tmp_path / "out")(IDS)) < 1e-6


def test_a_name_that_is_taken_or_impossible(zoo: list[Path]) -> None:
    merged = sm.merge(zoo, method=sm.mean())
    live = lora(Zoo(), 7)
    before = copied(live)
    with pytest.raises(sm.OutputExistsError, match="already has an adapter 'default'"):
        merged.add_to(live, "default")
    for name in ("with.dot", ""):
        with pytest.raises(sm.SapmergeError, match="name"):
            merged.add_to(live, name)
    with pytest.raises(sm.ModelMismatchError, match=r"takes a PeftModel; got Zoo\. Use apply_to"):
        merged.add_to(Zoo(), "merged")
    assert same(before, copied(live))
    assert list(live.peft_config) == ["default"]


def test_a_name_that_looks_like_lora(zoo: list[Path], oracle: list[dict[str, Tensor]]) -> None:
    for name in ("lora", "a", "default_2", "lora_A"):
        live = lora(Zoo(), 7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sm.merge(zoo, method=sm.task_arithmetic()).add_to(live, name)
        close(matrices(deltas(live, name), Zoo()), total(oracle))
        close(deltas(live), deltas(lora(Zoo(), 7)), 1e-9)


def test_a_failed_addition_leaves_no_trace(
    zoo: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft.utils

    merged = sm.merge(zoo, method=sm.mean())
    live = lora(Zoo(), 7)
    before, logits = copied(live), live(IDS)

    def failing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(peft.utils, "set_peft_model_state_dict", failing)
        with pytest.raises(RuntimeError, match="in the middle"):
            merged.add_to(live, "merged")
    with monkeypatch.context() as patch:
        patch.setattr(LoraConfig, "__post_init__", failing)
        with pytest.raises(RuntimeError, match="in the middle"):
            merged.add_to(live, "merged")
    assert same(before, copied(live))
    assert list(live.peft_config) == ["default"]
    assert torch.equal(live(IDS), logits)

    def breaking(layer: sm.Layer) -> sm.Update:
        if layer.name == "wave":
            raise RuntimeError("in the middle")
        return sm.Mean()(layer)

    with pytest.raises(RuntimeError, match="in the middle"):
        sm.merge(zoo, method=breaking).add_to(live, "merged")
    assert same(before, copied(live))
    merged.add_to(live, "merged")
    assert set(live.peft_config) == {"default", "merged"}


def test_heads_go_into_a_live_model(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", 1, targets=("q",), modules_to_save=["head"])
    saved = load_file(folder / "adapter_model.safetensors")
    merged = sm.merge([folder], method=sm.mean(), modules_to_save="mean")
    for live in (
        lora(Zoo(), 7, targets=("q",), modules_to_save=["head"]),
        lora(Zoo(), 7, targets=("q",)),
    ):
        logits = live(IDS)
        merged.add_to(live, "merged")
        assert torch.equal(live(IDS), logits)
        live.set_adapter("merged")
        head = live.get_base_model().head.modules_to_save["merged"]
        assert torch.equal(head.weight, saved[PREFIX + "head.weight"])
        assert error(live(IDS), load(folder)(IDS)) < 1e-6


def test_an_adapter_is_taken_out_and_put_back_under_another_name(zoo: list[Path]) -> None:
    live = load(zoo[2])
    quietly(live.load_adapter, str(zoo[0]), "other")
    sm.merge(["default", "other"], model=live, method=sm.task_arithmetic()).add_to(live, "both")
    one, two, both = (matrices(deltas(live, name), Zoo()) for name in ("default", "other", "both"))
    close(both, {name: one[name] + two[name] for name in one})


def test_the_task_of_the_output(tmp_path: Path) -> None:
    """A checkpoint of a task with a head must hold the head, or PEFT does not load it."""
    for task, policy, wanted in (
        ("CAUSAL_LM", None, "CAUSAL_LM"),
        ("FEATURE_EXTRACTION", None, "FEATURE_EXTRACTION"),
    ):
        folder = save_lora(tmp_path / str(task), 1, targets=["q"])
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task}))
        sm.merge([folder], method=sm.mean(), modules_to_save=policy).save_pretrained(
            tmp_path / f"{task}-out"
        )
        assert (
            json.loads((tmp_path / f"{task}-out" / "adapter_config.json").read_text())["task_type"]
            == wanted
        )
    with pytest.warns(
        sm.SapmergeWarning, match=r"different tasks \(CAUSAL_LM: CAUSAL_LM, FEATURE_EXTRACTION"
    ):
        both = sm.merge([tmp_path / "CAUSAL_LM", tmp_path / "FEATURE_EXTRACTION"], method=sm.mean())
    both.save_pretrained(tmp_path / "both")
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["task_type"] is None
