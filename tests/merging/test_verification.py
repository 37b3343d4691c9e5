"""`verify` and `reproduce`: an output tells what it was made from,
and the telling can be checked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.merging.verification import reproduce, verify


def write_adapter(path: Path, seed: int, rank: int = 3) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (m, n) in {"a.q": (6, 5), "a.v": (4, 7)}.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(
            rank, n, generator=generator
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(
            m, rank, generator=generator
        )
    tensors["base_model.model.head.weight"] = torch.randn(2, 6, generator=generator)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q", "v"],
        "base_model_name_or_path": "org/base",
    }
    (path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["head"]}))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate(("zoe", "abe", "kim"))]


@pytest.fixture
def out(tmp_path: Path, inputs: list[Path]) -> Path:
    method = sm.MatchEnergy(sm.dare_ties(0.5, seed=3))
    merged = sm.merge(
        inputs,
        method=method,
        weights=[1.0, -0.5, 2.0],
        scale=0.7,
        rank="exact",
        modules_to_save="first",
    )
    merged.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_an_intact_output_verifies_and_reproduces_in_any_order(
    out: Path, inputs: list[Path]
) -> None:
    assert verify(out) == []
    assert verify(out, inputs[::-1]) == []
    assert reproduce(out, inputs[::-1]) == []
    assert main(["verify", str(out), "--inputs", *map(str, inputs)]) == 0
    assert main(["reproduce", str(out), "--inputs", *map(str, inputs)]) == 0


def test_a_changed_tensor_is_found(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = out / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert verify(out) == [
        "the tensors of adapter_model.safetensors are not those that were written"
    ]
    assert main(["verify", str(out)]) == 2
    assert "not those that were written" in capsys.readouterr().err


def test_a_changed_config_is_found(out: Path) -> None:
    path = out / "adapter_config.json"
    path.write_text(path.read_text() + "\n")
    assert verify(out) == ["adapter_config.json is not the one that was written"]


def test_other_missing_and_changed_inputs_are_named(
    out: Path, inputs: list[Path], tmp_path: Path
) -> None:
    stranger = write_adapter(tmp_path / "stranger", 9)
    problems = verify(out, [*inputs[:2], stranger])
    assert problems == [
        f"{str(stranger)!r} is not an input of this output, or it has changed",
        "input 'kim' is not among the given folders",
    ]
    with pytest.raises(sm.IncompatibleAdaptersError, match="kim"):
        reproduce(out, inputs[:2])


def test_a_different_result_is_told(out: Path, inputs: list[Path]) -> None:
    tensors = load_file(out / "adapter_model.safetensors")
    from safetensors import safe_open

    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    name = next(iter(tensors))
    save_file(
        tensors | {name: tensors[name] * 1.5}, out / "adapter_model.safetensors", metadata=metadata
    )
    assert reproduce(out, inputs) == ["adapter_model.safetensors differs"]


def test_an_output_of_others_is_refused(inputs: list[Path]) -> None:
    with pytest.raises(sm.AdapterFormatError, match="not written by sapmerge"):
        verify(inputs[0])


def test_users_functions_must_be_passed(tmp_path: Path, inputs: list[Path]) -> None:
    for path in inputs:
        shutil.copytree(path, tmp_path / f"{path.name}-copy")

    def mine(values: torch.Tensor, stats: sm.Stats) -> torch.Tensor:
        return values.abs()

    method = sm.Chain(sm.Prune(mine, sm.TopFraction(0.5)), sm.Mean())
    sm.merge(inputs, method=method, modules_to_save="drop", rank="exact").save_pretrained(
        tmp_path / "own"
    )
    name = f"{mine.__module__}:{mine.__qualname__}"
    with pytest.raises(sm.MethodError, match="pass it yourself"):
        reproduce(tmp_path / "own", inputs)
    assert reproduce(tmp_path / "own", inputs, functions={name: mine}) == []


def test_a_merge_with_anchors_says_why_it_cannot(tmp_path: Path) -> None:
    adapters = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.ModuleDict({"q": torch.nn.Linear(5, 6), "v": torch.nn.Linear(7, 4)})
            self.head = torch.nn.Linear(6, 2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head(self.a["q"](x)).sum() + self.a["v"](y).square().sum()

    anchors = [{"x": torch.ones(2, 5), "y": torch.ones(2, 7)}]
    merged = sm.merge(
        adapters,
        anchors,
        Model(),
        loss=lambda model, batch: model(**batch),
        modules_to_save="drop",
        method=sm.sap(),
    )
    merged.save_pretrained(tmp_path / "out")
    assert verify(tmp_path / "out", adapters) == []
    with pytest.raises(sm.AnchorError, match="anchors"):
        reproduce(tmp_path / "out", adapters)
