"""Mistakes that a newcomer makes: each is an error that says what to write instead,
before any work is done.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge.cli import main
from tests.anchors import models
from tests.merging.test_verification import write_adapter


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed)
    return ["a", "b"]


def refused(match: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises(sm.SapmergeError, match=match):
        sm.merge(*arguments, **{"modules_to_save": "drop", **named})


def test_arguments_of_merge_in_the_wrong_place(pair: list[str]) -> None:
    refused("method ties is not called yet", pair, method=sm.ties)
    refused("method Mean is not called yet", pair, method=sm.Mean)
    refused("A method is method=", pair, sm.mean())
    refused("model must be a torch module, or the folder", pair, method=sm.mean(), model="gpt2")
    refused(
        "got a CLIPModel. A method is method=..., a model is the third",
        pair,
        models.clip(),
        models.pairs(),
    )
    refused("base_model is the name of a model", pair, method=sm.mean(), base_model=models.clip())
    if not torch.cuda.is_available():
        refused("device='cuda' cannot be used", pair, method=sm.mean(), device="cuda")


def test_parts_that_are_no_parts(pair: list[str]) -> None:
    with pytest.raises(sm.MethodError, match=r"Prune's scorer .* Magnitude\(\)"):
        sm.Prune(sm.Magnitude, sm.TopFraction(0.5))
    with pytest.raises(sm.MethodError, match="Prune's mask"):
        sm.Prune(sm.Magnitude(), 0.5)  # pyright: ignore[reportArgumentType]
    refused(
        "as a tensor: got ndarray",
        pair,
        method=sm.Chain(sm.Prune(lambda v, s: v.numpy(), sm.TopFraction(1.0)), sm.Sum()),
    )


def test_sap_over_layers_lets_the_layers_of_an_adapter_compete() -> None:
    assert "scope='adapter'" in repr(sm.sap(0.5, units=sm.Layers()))


def test_an_output_is_never_one_of_the_inputs(pair: list[str]) -> None:
    before = Path("a/adapter_model.safetensors").read_bytes()
    with pytest.raises(sm.OutputError, match="one of the inputs"):
        sm.merge(pair, method=sm.mean(), modules_to_save="drop").save_pretrained(
            "./b/../a", overwrite=True
        )
    assert Path("a/adapter_model.safetensors").read_bytes() == before


def test_adapters_of_two_model_classes_without_a_base(pair: list[str]) -> None:
    for name, kind in (("a", "LlamaForCausalLM"), ("b", "CLIPModel")):
        path = Path(name) / "adapter_config.json"
        mapping = {
            "auto_mapping": {"base_model_class": kind, "parent_library": "transformers"},
            "base_model_name_or_path": None,
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | mapping))
    refused("a: LlamaForCausalLM, b: CLIPModel", pair, method=sm.mean())
    assert (
        sm.merge(pair, method=sm.mean(), modules_to_save="drop", base_model="mine").base.name
        == "mine"
    )


def test_contrastive_needs_negatives() -> None:
    made, _ = models.adapters(models.clip(), [models.VISION_TARGETS] * 2)
    with pytest.raises(sm.AnchorError, match="single pair"):
        models.merge(made, models.pairs((1, 1)), models.clip(), loss=sm.contrastive)


def test_one_anchor_says_nothing_about_stability() -> None:
    made, _ = models.adapters(models.clip(), [models.VISION_TARGETS] * 2)
    notes = (
        models.merge(made, models.pairs((1,)), models.clip(), method=sm.sap(0.9))
        .report.layers[0]
        .notes
    )
    assert "anchor_stability" not in notes
    assert "score_kept" in notes


def test_a_silent_adapter_is_no_outlier(pair: list[str]) -> None:
    report = sm.merge(pair, method=sm.mean(), weights=[0, 1], modules_to_save="drop").report
    assert [(a.relative_norm, a.outlier) for a in report.adapters] == [(0.0, None), (1.0, None)]


def test_nothing_floods_a_notebook(pair: list[str]) -> None:
    merged = sm.merge(pair, method=sm.mean(), modules_to_save="drop")
    assert repr(merged) == "Merged(2 adapters, 2 layers, Chain(Mean()))"
    assert len(repr(sm.Adapter.load("a"))) < 500


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_the_command_line(pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    merge = (
        "merge",
        "a",
        "b",
        "-o",
        "out",
        "--modules-to-save",
        "drop",
        "--rank",
        "exact",
        "--quiet",
    )
    assert "did you mean 'ties'" in fails(capsys, *merge, "--method", "tise")
    assert "takes no arguments" in fails(capsys, *merge, "--method", "mean", "--density", "0.2")
    assert "--debug shows where" in fails(capsys, *merge, "--method", "TopFraction(0.2)")
    assert "two adapters have the label 'x'" in fails(
        capsys, "merge", "x=a", "x=b", "-o", "out", "--method", "mean"
    )
    assert main([*merge, "--method", "wudi", "--weights", "a=1,b=2"]) == 0
    assert json.loads(Path("out/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_function_of_ones_own_is_reproduced_when_it_is_named(
    pair: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("newcomer_rules.py").write_text(
        "def rare(values, stats):\n    return 1 / (1 + values.abs())\n"
    )
    method = "Chain(Prune('newcomer_rules:rare', TopFraction(0.5)), Mean())"
    merge = [
        "merge",
        *pair,
        "-o",
        "out",
        "--modules-to-save",
        "drop",
        "--rank",
        "exact",
        "--quiet",
        "--method",
        method,
    ]
    assert main(merge) == 0
    assert "pass it yourself" in fails(capsys, "reproduce", "out", "--inputs", *pair)
    assert main(["reproduce", "out", "--inputs", *pair, "--use", "newcomer_rules:rare"]) == 0
    shutil.rmtree("out")
