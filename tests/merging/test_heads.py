"""`modules_to_save`: every policy with its numbers, and messages that name module,
adapters and choices.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import sapmerge as sm
from tests.conftest import error
from tests.models import PREFIX, Block, copied, load, same, save_lora


class Classifier(nn.Module):
    """A head of one module and a projector of two."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = Block(6)
        self.projector = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False))
        self.classifier = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.projector(self.body(x)))


BOTH = ["classifier", "projector"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    options = {"targets": ["q", "v"], "r": 2}
    return {
        "both": save_lora(root / "both", 1, Classifier(), modules_to_save=BOTH, **options),
        "head": save_lora(
            root / "head", 2, Classifier(), modules_to_save=["classifier"], **options
        ),
        "none": save_lora(root / "none", 3, Classifier(), **options),
        "wide": save_lora(
            root / "wide", 4, Classifier(5), modules_to_save=["classifier"], **options
        ),
        "half": save_lora(
            root / "half",
            5,
            Classifier(),
            modules_to_save=["classifier"],
            dtype=torch.float16,
            **options,
        ),
    }


def heads(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if "lora_" not in name
    }


def merged_heads(
    tmp_path: Path, adapters: object, policy: object, **options: object
) -> dict[str, Tensor]:
    merged = sm.merge(adapters, method=sm.mean(), modules_to_save=policy, **options)  # type: ignore[arg-type]
    merged.save_pretrained(tmp_path / "out")
    found = heads(tmp_path / "out")
    declared = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"]
    assert declared == (sorted({name.split(".")[0] for name in found}) or None)
    assert list(merged.report.modules_to_save) == (declared or [])
    peft_model = load(tmp_path / "out", Classifier(len(found["classifier.bias"]) if found else 3))
    inner = peft_model.get_base_model().state_dict()
    for name, tensor in found.items():
        module, rest = name.split(".", 1)
        assert torch.equal(
            inner[f"{module}.modules_to_save.default.{rest}"], tensor.to(torch.float32)
        )
    again = sm.Adapter.load(tmp_path / "out")
    assert all(torch.equal(again.saved_tensor(name), tensor) for name, tensor in found.items())
    return found


def test_who_is_left_out_is_left_out_of_the_mean_of_heads(tmp_path: Path) -> None:
    """A flipped adapter has no say in the updates, and none in the head."""
    options = {"modules_to_save": ["classifier"], "targets": ["q", "v"], "r": 2}
    paths = [save_lora(tmp_path / f"{k}", k, Classifier(), **options) for k in (1, 2, 3)]
    held = [load_file(path / "adapter_model.safetensors") for path in paths]
    noise = torch.Generator().manual_seed(0)
    for k in (1, 2):
        for name, tensor in held[0].items():
            if "lora_" in name:
                moved = tensor + 0.3 * torch.randn(tensor.shape, generator=noise)
                held[k][name] = -moved if k == 2 and "lora_B" in name else moved
        save_file(held[k], paths[k] / "adapter_model.safetensors")
    with pytest.warns(sm.SapmergeWarning, match="'3'"):
        merged = sm.merge(
            paths, method=sm.WeighByAgreement(sm.mean()), modules_to_save="mean", weights=[1, 3, 2]
        )
    merged.save_pretrained(tmp_path / "out")
    used = merged.report.weights
    assert used["3"] == 0 < min(used["1"], used["2"])
    for name, tensor in heads(tmp_path / "out").items():
        parts = [found[PREFIX + name].double() for found in held]
        wanted = (used["1"] * parts[0] + used["2"] * parts[1]) / (used["1"] + used["2"])
        assert torch.allclose(tensor.double(), wanted, atol=1e-6)
    with (
        pytest.warns(sm.SapmergeWarning, match="'3'"),
        pytest.raises(sm.MethodError, match="'drop'"),
    ):
        sm.merge(
            [without_heads(path, tmp_path / f"n{path.name}") for path in paths[:2]] + [paths[2]],
            method=sm.WeighByAgreement(sm.mean()),
            modules_to_save="mean",
        )


def without_heads(folder: Path, out: Path) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": None}))
    kept = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(kept, out / "adapter_model.safetensors")
    return out


def pick(folders: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: folders[name] for name in names}


def test_without_a_policy_the_error_lists_heads_and_choices(folders: dict[str, Path]) -> None:
    with pytest.raises(sm.MethodError) as caught:
        sm.merge(pick(folders, "both", "head", "none"), method=sm.mean())
    message = str(caught.value)
    for part in (
        "'classifier' in both, head",
        "'projector' in both",
        "'mean'",
        "'first'",
        "'drop'",
        "{'<module>': '<adapter>'}",
    ):
        assert part in message
    sm.merge(pick(folders, "none"), method=sm.mean())  # nothing to decide


def test_mean(folders: dict[str, Path], tmp_path: Path) -> None:
    found = merged_heads(tmp_path, pick(folders, "both", "head", "none"), "mean", weights=[1, 3, 7])
    both, head = heads(folders["both"]), heads(folders["head"])
    for name in ("classifier.weight", "classifier.bias"):
        assert error(found[name], (both[name].double() + 3 * head[name].double()) / 4) < 1e-7
    for name in ("projector.0.weight", "projector.0.bias", "projector.2.weight"):
        assert torch.equal(found[name], both[name])  # of the one adapter that has it
    assert set(found) == set(both)


def test_mean_rounds_once_and_keeps_the_wider_dtype(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    half, head = heads(folders["half"]), heads(folders["head"])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mixed = merged_heads(tmp_path / "a", pick(folders, "half", "head"), "mean")
    assert (
        error(
            mixed["classifier.weight"],
            (half["classifier.weight"].double() + head["classifier.weight"].double()) / 2,
        )
        < 1e-7
    )
    assert mixed["classifier.weight"].dtype == torch.float32
    alone = merged_heads(tmp_path / "b", pick(folders, "half"), "mean")
    assert alone["classifier.weight"].dtype == torch.float16
    assert torch.equal(alone["classifier.weight"], half["classifier.weight"])


def test_first(folders: dict[str, Path], tmp_path: Path) -> None:
    found = merged_heads(tmp_path, pick(folders, "none", "head", "both"), "first")
    both, head = heads(folders["both"]), heads(folders["head"])
    assert same({name: head.get(name, both[name]) for name in both}, found)


def test_drop(folders: dict[str, Path], tmp_path: Path) -> None:
    assert merged_heads(tmp_path, pick(folders, "both", "wide"), "drop") == {}
    report = sm.merge(
        pick(folders, "both", "wide"), method=sm.mean(), modules_to_save="drop"
    ).report
    assert report.dropped_modules == ("classifier", "projector")
    assert "left out ['classifier', 'projector']" in str(report)


def test_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    policy = {"classifier": "wide", "projector": "both"}
    found = merged_heads(tmp_path, pick(folders, "both", "wide", "none"), policy)
    both, wide = heads(folders["both"]), heads(folders["wide"])
    assert same({name: wide.get(name, both[name]) for name in both}, found)


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("average", ("modules_to_save='average' is not a policy", "'mean'", "'drop'")),
        (3, ("modules_to_save=3",)),
        ({"classifier": "both"}, ("says nothing about ['projector']",)),
        (
            {"classifier": "both", "projector": "head"},
            ("'head' has no saved module 'projector'", "it is in both"),
        ),
        ({"classifier": "both", "projector": "nobody"}, ("'nobody'", "['both', 'head']")),
        ({"score": "both"}, ("'score'", "['classifier', 'projector']")),
    ],
)
def test_wrong_policies(folders: dict[str, Path], policy: object, parts: tuple[str, ...]) -> None:
    with pytest.raises(sm.MethodError) as caught:
        sm.merge(pick(folders, "both", "head"), method=sm.mean(), modules_to_save=policy)  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in parts), caught.value


def test_mean_of_different_shapes_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(sm.IncompatibleAdaptersError) as caught:
        sm.merge(pick(folders, "head", "wide"), method=sm.mean(), modules_to_save="mean")
    for part in ("'classifier.", "'head': (3", "'wide': (5", "choose an adapter"):
        assert part in str(caught.value)


def test_mean_with_weights_that_cancel(folders: dict[str, Path]) -> None:
    with pytest.raises(sm.MethodError, match="sum to zero"):
        sm.merge(
            pick(folders, "both", "head"),
            method=sm.task_arithmetic(),
            modules_to_save="mean",
            weights=[1, -1],
        )


def test_the_order_of_adapters_changes_no_bit_of_a_mean(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for number, names in enumerate([("both", "head", "half"), ("half", "both", "head")]):
        (tmp_path / str(number)).mkdir()
        found.append(merged_heads(tmp_path / str(number), pick(folders, *names), "mean"))
    assert same(*found)


def test_a_head_of_two_modules_that_only_the_task_implies(tmp_path: Path) -> None:
    """Configs of old PEFT do not name the head; PEFT adds it for the task when it loads."""

    def roberta() -> nn.Module:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        return RobertaForSequenceClassification(
            RobertaConfig(vocab_size=30, num_labels=3, **sizes)
        ).eval()

    folder = save_lora(tmp_path / "old", 1, roberta(), targets=["query"], r=2, task_type="SEQ_CLS")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    merged = sm.merge([folder], method=sm.mean(), modules_to_save="mean")
    merged.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
        "modules_to_save"
    ] == ["classifier"]
    ids = torch.arange(3, 13).reshape(2, 5)
    with torch.no_grad():
        wanted = load(folder, roberta()).eval()(ids).logits
        assert error(load(tmp_path / "out", roberta()).eval()(ids).logits, wanted) < 1e-5
        applied, live = roberta(), load(folder, roberta())
        merged.apply_to(applied)
        assert error(applied(ids).logits, wanted) < 1e-5
        merged.add_to(live, "merged")
        live.set_adapter("merged")
        assert error(live.eval()(ids).logits, wanted) < 1e-5


def test_apply_to_copies_heads(folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    base = Classifier()
    x = torch.randn(4, 6)
    one = copy.deepcopy(base)
    sm.merge(pick(folders, "both"), method=sm.mean(), modules_to_save="first").apply_to(one)
    assert same(
        heads(folders["both"]),
        {n: t for n, t in one.state_dict().items() if n.split(".")[0] in BOTH},
    )
    assert error(one(x).detach(), load(folders["both"], copy.deepcopy(base))(x).detach()) < 1e-5
    mixed = copy.deepcopy(base)
    sm.merge(pick(folders, "both", "head"), method=sm.mean(), modules_to_save="mean").apply_to(
        mixed
    )
    both, head = (heads(folders[name])["classifier.weight"].double() for name in ("both", "head"))
    assert error(mixed.classifier.weight.detach(), (both + head) / 2) < 1e-7
    kept = copy.deepcopy(base)
    sm.merge(pick(folders, "both"), method=sm.mean(), modules_to_save="drop").apply_to(kept)
    assert torch.equal(kept.classifier.weight, base.classifier.weight)
    assert not torch.equal(kept.body.q.weight, base.body.q.weight)


def test_a_failure_at_the_heads_restores_everything(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Classifier()
    before = copied(model)
    merged = sm.merge(pick(folders, "both"), method=sm.mean(), modules_to_save="first")
    read = sm.Adapter.saved_tensor

    def failing(self: sm.Adapter, name: str) -> Tensor:
        if name.startswith("projector.2"):
            raise OSError("the disk is gone")
        return read(self, name)

    monkeypatch.setattr(sm.Adapter, "saved_tensor", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        merged.apply_to(model)
    assert same(before, copied(model))


def test_a_head_that_does_not_fit_changes_nothing(folders: dict[str, Path]) -> None:
    model = Classifier()
    before = copied(model)
    merged = sm.merge(pick(folders, "wide"), method=sm.mean(), modules_to_save="first")
    with pytest.raises(
        sm.ModelMismatchError, match=r"classifier\.\w+' \(5.*\(3.*modules_to_save='drop'"
    ):
        merged.apply_to(model)
    del model.classifier
    with pytest.raises(sm.ModelMismatchError, match="the model has none"):
        merged.apply_to(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
