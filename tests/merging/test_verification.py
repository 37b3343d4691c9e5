"""`verify` and `reproduce`: an output tells what it was made from,
and the telling can be checked.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.io.provenance import read_provenance
from sapmerge.merging.verification import reproduce, verify
from sapmerge.parts.mergers.linear import reweighed

from ..anchors import models
from ..models import save_lora


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
    with pytest.raises(sm.AnchorError, match="2 anchors in 1 batches"):
        reproduce(tmp_path / "out", adapters)
    with pytest.raises(sm.AnchorError, match="a function '<lambda>': pass loss="):
        reproduce(tmp_path / "out", adapters, anchors=anchors, model=Model())


def clip(seed: int) -> torch.nn.Module:
    """A tiny CLIP; the seed 0 is the base."""
    model = models.clip()
    if seed:
        with torch.no_grad():
            model.visual_projection.weight += seed
    return model


def anchored(tmp_path: Path, method: sm.Method | None = None, **options: Any) -> list[Path]:
    folders = [tmp_path / label for label in "abc"]
    for seed, folder in enumerate(folders):
        save_lora(folder, seed, clip(0), targets=["q_proj", "v_proj"], size=0.1)
    merged = sm.merge(folders, models.pairs(), clip(0), method=method, **options)
    merged.save_pretrained(tmp_path / "out")
    return folders


SPOKEN = sm.WeighByAgreement(sm.ScaleByAnchors(sm.sap_original(0.5)))


@pytest.mark.parametrize("method", [None, SPOKEN, sm.fisher()], ids=["sap", "all", "fisher"])
def test_a_merge_with_anchors_is_reproduced(tmp_path: Path, method: sm.Method | None) -> None:
    folders = anchored(tmp_path, method, rank="exact")
    loader, model = models.pairs(), clip(0)
    assert reproduce(tmp_path / "out", folders[::-1], anchors=loader, model=model) == []
    peft = get_peft_model(clip(0), LoraConfig(target_modules=["q_proj"]))
    assert reproduce(tmp_path / "out", folders, anchors=loader, model=peft) == []


def test_what_an_output_says_of_its_anchors(tmp_path: Path) -> None:
    folders = anchored(tmp_path, SPOKEN, weights=[1, 2, 1])
    said = read_provenance(tmp_path / "out").anchors
    assert said is not None
    merged = sm.merge(folders, models.pairs(), clip(0), method=SPOKEN, weights=[1, 2, 1])
    report, model = merged.report, clip(0)
    assert (said["count"], said["batches"]) == (
        sum(len(batch["input_ids"]) for batch in models.pairs()), len(models.pairs()),
    )  # fmt: skip
    for k, label in enumerate("abc"):
        peft = PeftModel.from_pretrained(clip(0), tmp_path / label)
        wanted = models.mean_loss(peft.get_base_model(), models.pairs(), sm.alignment)
        assert said["losses"][label] == pytest.approx(wanted, rel=1e-3), k
    assert said["losses"]["base model"] == pytest.approx(
        models.mean_loss(model, models.pairs(), sm.alignment), rel=1e-3
    )
    assert said["decided"]["weights"] == pytest.approx(report.weights, rel=1e-3)
    assert sum(report.weights.values()) == pytest.approx(4)
    assert report.weights != {"a": 1, "b": 2, "c": 1}
    for name in ("agreement", "score_kept", "losses_by_length", "length"):
        found = said["decided"][name]
        wanted = report.notes[name]
        if name == "losses_by_length":
            wanted = {str(key): value for key, value in wanted.items()}
        assert found == pytest.approx(wanted, rel=1e-3)
    text = str(report)
    for label, weight in report.weights.items():
        row = next(line for line in text.splitlines() if line.startswith(f"{label} "))
        assert row.split()[1] == f"{weight:.3g}"


def test_other_anchors_and_another_model_are_named(tmp_path: Path) -> None:
    folders = anchored(tmp_path)
    loader = models.pairs()
    other = [{**loader[0], "pixel_values": loader[0]["pixel_values"] + 1}, *loader[1:]]
    problems = reproduce(tmp_path / "out", folders, anchors=other, model=clip(1))
    assert [problem.split(":")[0] for problem in problems] == [
        "these are not the anchors of the merge", "this is not the model of the merge",
    ]  # fmt: skip
    (problem,) = reproduce(tmp_path / "out", folders, anchors=loader[:1], model=clip(0))
    assert "in 1 batches" in problem
    with pytest.raises(sm.AnchorError, match=r"pass anchors= and model="):
        reproduce(tmp_path / "out", folders, anchors=loader)
    sm.merge(folders, method=sm.mean()).save_pretrained(tmp_path / "mean")
    with pytest.raises(sm.AnchorError, match="read no anchors"):
        reproduce(tmp_path / "mean", folders, anchors=loader, model=clip(0))


def test_the_digest_is_of_the_model_before_it_was_changed(tmp_path: Path) -> None:
    folders = anchored(tmp_path)
    model = clip(0)
    merged = sm.merge(folders, models.pairs(), model)
    merged.apply_to(model)
    merged.save_pretrained(tmp_path / "later")
    before, after = (read_provenance(tmp_path / name).anchors for name in ("out", "later"))
    assert before is not None
    assert after is not None
    assert before["model"] == after["model"]


def test_somebody_who_is_left_out_has_the_weight_0(tmp_path: Path) -> None:
    class Third:
        def __call__(self, layer: sm.Layer) -> sm.Update:
            return sm.Mean()(reweighed(layer, (1.5, 1.5, 0.0)))

    folders = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    report = sm.merge(folders, method=Third(), modules_to_save="drop").report
    third = next(label for label, weight in report.weights.items() if weight == 0)
    assert sorted(report.weights.values()) == [0, 1.5, 1.5]
    (row,) = [adapter for adapter in report.adapters if adapter.label == third]
    assert (row.weight, row.energy_share) == (1, 0)
    assert row.relative_norm > 0
    assert "given" in str(report)
