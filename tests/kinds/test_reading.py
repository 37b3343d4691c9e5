"""What is read beside plain LoRA: layouts of experts, AdaLoRA, embeddings, names, small gates,
keys of trainers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

import sapmerge as sm

from . import helpers as h
from .helpers import QV, check_sinks, edit, merged, train

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _experts_only(change: Any) -> Any:
    """A change of the pairs of factors of experts: (a, b) -> (a, b)."""

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        for name in tensors:
            if ".experts." in name and "lora_A" in name:
                other = name.replace("lora_A", "lora_B")
                out[name], out[other] = change(tensors[name], tensors[other])
        return out

    return run


def _by_expert(rank: int, experts: int) -> Any:
    return _experts_only(
        lambda a, b: (a, b.reshape(len(b), rank, experts).transpose(1, 2).reshape(b.shape))
    )


def _flipped(rank: int, experts: int) -> Any:
    """As PEFT before 0.19.1 had them: the parameter was read as (experts, in, out)."""

    def change(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        per_a, per_b = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts)
        return per_b.permute(2, 1, 0).flatten(0, 1), per_a.permute(2, 1, 0).flatten(1)

    return _experts_only(change)


@pytest.mark.parametrize("make", [h.qwen_moe, h.square_moe])
def test_three_layouts_of_one_update(make: h.Make, tmp_path: Path) -> None:
    experts = 4 if make is h.qwen_moe else 3
    path = train(tmp_path, make, 1, r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    wanted = h.unloaded(make, path)
    variants = [
        path,
        edit(path, lambda c: c | {"peft_version": "0.18.1"}, _flipped(2, experts)),
        edit(path, lambda c: c | {"peft_version": "0.19.0"}, _flipped(2, experts)),
        edit(path, lambda c: c | {"lora_B_layout": "expert_major"}, _by_expert(2, experts)),
        edit(path, lambda c: c | {"lora_B_layout": "rank_major"}),
    ]
    for number, variant in enumerate(variants):
        merged([variant]).save_pretrained(tmp_path / f"out{number}")
        h.compare(make, h.unloaded(make, tmp_path / f"out{number}"), wanted)


def test_older_layout_of_a_model_that_stores_its_experts_transposed(tmp_path: Path) -> None:
    # PEFT 0.18 read (experts, in, out), which GPT-OSS has: the factors are the same as today's.
    path = train(tmp_path, h.gpt_oss, 1, r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    old = edit(
        path,
        lambda c: c | {"peft_version": "0.18.1", "base_model_name_or_path": "openai/gpt-oss-20b"},
    )
    merged([old]).save_pretrained(tmp_path / "out")
    h.compare(h.gpt_oss, h.unloaded(h.gpt_oss, tmp_path / "out"), h.unloaded(h.gpt_oss, path))


def test_a_bank_is_read_once_for_all_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sapmerge.io.files import StoredWeights

    path = train(tmp_path, h.qwen_moe, 1, r=2, target_modules=[], target_parameters=EXPERTS)
    adapter, read = sm.Adapter.load(path), list[str]()
    plain = StoredWeights.read

    def counting(self: StoredWeights, name: str) -> Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(StoredWeights, "read", counting)
    for name in adapter.modules:
        adapter.update(name)
    assert sorted(read) == sorted(load_file(path / "adapter_model.safetensors"))


@pytest.mark.parametrize("alpha", [8, -1])
def test_adalora(alpha: int, tmp_path: Path) -> None:
    paths = [
        train(
            tmp_path,
            h.llama,
            k,
            config=AdaLoraConfig,
            target_modules=QV,
            init_r=6,
            target_r=3,
            lora_alpha=alpha * k,
            total_step=10,
        )
        for k in (1, 2)
    ]
    check_sinks(h.llama, paths, tmp_path, live=False, tolerance=1e-4)


def test_adalora_after_its_ranks_were_cut(tmp_path: Path) -> None:
    path = train(
        tmp_path,
        h.llama,
        1,
        config=AdaLoraConfig,
        target_modules=QV,
        init_r=4,
        target_r=2,
        total_step=10,
    )
    whole = load_file(path / "adapter_model.safetensors")
    masks = {}
    for number, name in enumerate(sorted(n for n in whole if n.endswith(".lora_E"))):
        mask = [True, number % 2 == 0, True, False]
        masks[name.removeprefix("base_model.model.")] = mask

    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.removeprefix("base_model.model.").rpartition(".")
            mask = torch.tensor(masks[f"{module}.lora_E"])
            out[name] = tensor[:, mask] if leaf == "lora_B" else tensor[mask]
        return out

    small = edit(path, lambda c: c | {"rank_pattern": masks}, cut)
    got, held = sm.Adapter.load(small), load_file(small / "adapter_model.safetensors")
    for name, module in got.modules.items():
        b, a, e = (held[f"base_model.model.{name}.lora_{part}"].double() for part in "BAE")
        # PEFT: lora_alpha / (init_r + 1e-5), whatever is left of the rank
        wanted = b @ (a * e) * 8 / (4 + 1e-5)
        assert module.rank == a.shape[0]
        torch.testing.assert_close(got.update(name).dense().double(), wanted, rtol=1e-5, atol=1e-6)


def test_factors_of_eight_bits(tmp_path: Path) -> None:
    path = train(tmp_path, h.llama, 1, r=4, target_modules=QV)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        small = edit(
            path, tensors=lambda t, d=dtype: {name: value.to(d) for name, value in t.items()}
        )
        rounded = edit(
            path,
            tensors=lambda t, d=dtype: {name: value.to(d).float() for name, value in t.items()},
        )
        done = merged([small])
        assert done.run.dtype == torch.float32
        done.save_pretrained(tmp_path / str(dtype))
        h.compare(h.llama, h.unloaded(h.llama, tmp_path / str(dtype)), h.unloaded(h.llama, rounded))
        bad = edit(
            path,
            tensors=lambda t, d=dtype: {
                n: torch.full_like(v, float("nan")).to(d) for n, v in t.items()
            },
        )
        with pytest.raises(sm.NonFiniteError):
            sm.Adapter.load(bad)


def test_one_adapter_name_inside_says_nothing(tmp_path: Path) -> None:
    path = train(tmp_path, h.llama, 1, r=4, target_modules=[*QV, "embed_tokens"], use_dora=True)

    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace(".weight", ".medic.weight")
            if ".lora_" in name and name.endswith(".weight")
            else f"{name}.medic"
            if ".lora_" in name
            else name: value
            for name, value in tensors.items()
        }

    inside = edit(path, tensors=named)
    with pytest.warns(sm.SapmergeWarning, match="copies"):
        first, second = sm.Adapter.load(path), sm.Adapter.load(inside)
    assert first.digest != second.digest or first.modules.keys() == second.modules.keys()
    done = merged([inside], model=h.llama())
    done.save_pretrained(tmp_path / "out")
    h.compare(h.llama, h.unloaded(h.llama, tmp_path / "out"), h.unloaded(h.llama, path), 1e-4)


class _Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.gate, self.router = (
            nn.Linear(32, 32),
            nn.Linear(32, 1, bias=False),
            nn.Linear(32, 4),
        )


def _gates() -> nn.Module:
    torch.manual_seed(0)
    return _Gates()


def test_a_rank_above_the_rows_of_a_gate(tmp_path: Path) -> None:
    paths = [
        train(tmp_path, _gates, k, r=8 * k, target_modules=["q_proj", "gate", "router"])
        for k in (1, 2)
    ]
    check_sinks(_gates, paths, tmp_path)
    command = [
        sys.executable,
        "-m",
        "sapmerge",
        "merge",
        *map(str, paths),
        "-o",
        str(tmp_path / "shell"),
        "--method",
        "mean",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    h.compare(_gates, h.unloaded(_gates, tmp_path / "shell"), h.target(_gates, paths))


@pytest.mark.parametrize(("policy", "shift"), [("mean", 1.5), ("first", 1.0), ("drop", 0.0)])
def test_embeddings_of_a_longer_vocabulary(policy: str, shift: float, tmp_path: Path) -> None:
    def longer() -> nn.Module:
        return h.llama(vocab_size=66)

    paths = []
    for k in (1, 2):
        model: Any = h.get_peft_model(
            longer(), h.LoraConfig(r=4, target_modules=QV, init_lora_weights=False)
        )
        model.base_model.model.model.embed_tokens.weight.data += k
        model.save_pretrained(str(tmp_path / f"a{k}"), save_embedding_layers=True)
        paths.append(tmp_path / f"a{k}")
    with pytest.raises(sm.MethodError, match=r"whole modules.*embed_tokens"):
        merged(paths)
    merged(paths, modules_to_save=policy).save_pretrained(tmp_path / "out")
    loaded: Any = h.PeftModel.from_pretrained(longer(), str(tmp_path / "out"))
    weight = loaded.merge_and_unload().model.embed_tokens.weight
    torch.testing.assert_close(weight, longer().model.embed_tokens.weight + shift)


def test_tied_embeddings_saved_whole(tmp_path: Path) -> None:
    settings = {
        "r": 4,
        "target_modules": QV,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    }
    paths = [train(tmp_path, h.tied_llama, k, **settings) for k in (1, 2)]
    name = "base_model.model.model.embed_tokens.weight"
    wanted = sum(load_file(path / "adapter_model.safetensors")[name] for path in paths) / 2
    merged(paths, modules_to_save="mean").save_pretrained(tmp_path / "out")
    model: Any = h.PeftModel.from_pretrained(
        h.tied_llama(), str(tmp_path / "out")
    ).merge_and_unload()
    torch.testing.assert_close(model.model.embed_tokens.weight, wanted)
    torch.testing.assert_close(model.lm_head.weight, wanted)


def test_copies_of_embeddings_must_agree(tmp_path: Path) -> None:
    def other() -> nn.Module:
        model: Any = h.llama()
        model.model.embed_tokens.weight.data[3] += 1
        return model

    settings = {"r": 4, "target_modules": [*QV, "embed_tokens"]}
    one, two = train(tmp_path, h.llama, 1, **settings), train(tmp_path, other, 2, **settings)
    with pytest.raises(sm.IncompatibleAdaptersError, match=r"different copies.*embed_tokens"):
        merged([one, two])
    with pytest.raises(sm.ModelMismatchError, match=r"embed_tokens.*not the model's"):
        merged([one], model=other())
    merged([one], model=h.llama())


def test_harmless_keys_of_trainers(tmp_path: Path) -> None:
    path = train(tmp_path, h.llama, 1, r=4, target_modules=QV)
    wanted = sm.Adapter.load(path).digest
    for key, value in {
        "lorap_emb_lr": 1e-6,
        "lorap_lr_ratio": 16.0,
        "lora_dtype": "bfloat16",
    }.items():
        with pytest.warns(sm.SapmergeWarning, match=key):
            assert (
                sm.Adapter.load(edit(path, lambda c, k=key, v=value: c | {k: v})).digest == wanted
            )
    for key, value in {"lora_scaling": 3.0, "use_something_new": True}.items():
        with pytest.raises(sm.AdapterConfigError, match=key):
            sm.Adapter.load(edit(path, lambda c, k=key, v=value: c | {k: v}))


def test_a_shared_factor_stays_shared(tmp_path: Path) -> None:
    first = train(tmp_path, h.llama, 1, r=4, target_modules=QV)
    held = load_file(first / "adapter_model.safetensors")
    paths = [first] + [
        edit(
            train(tmp_path, h.llama, k, r=4, lora_alpha=k, target_modules=QV),
            tensors=lambda t: {
                name: held[name] if "lora_A" in name else value for name, value in t.items()
            },
        )
        for k in (2, 3, 4)
    ]
    done = check_sinks(h.llama, paths, tmp_path, weights=[1.0, 2.0, -0.5, 1.0], rank=None)
    assert {row.rank for row in done.report.layers} == {4}
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == 4


@pytest.mark.parametrize("with_model", [False, True])
def test_a_bank_beside_modules_of_its_experts_is_refused(tmp_path: Path, with_model: bool) -> None:
    """They are one weight in two spellings, and were merged as two."""
    target = ["mlp.experts.gate_up_proj"]
    bank = train(tmp_path, h.qwen_moe, 1, r=2, target_modules=[], target_parameters=target)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    one = edit(
        bank,
        lambda c: c | {"target_modules": ["up_proj"], "target_parameters": None},
        lambda _: {
            f"{prefix}.{e}.up_proj.lora_{f}.weight": torch.ones(shape)
            for e in range(4)
            for f, shape in (("A", (2, 32)), ("B", (20, 2)))
        },
    )
    model = h.qwen_moe() if with_model else None
    with pytest.raises(sm.IncompatibleAdaptersError, match=r"experts.0.up_proj.*'gate_up_proj'"):
        merged([bank, one], model=model)
    assert len(merged([one]).run.stream.modules) == 4
