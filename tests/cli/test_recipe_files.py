"""Recipes as files: the bytes of the same merge by flags, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import sapmerge as sm
from sapmerge.cli import main

from ..models import files
from .shell import fails

WHOLE = """
adapters:
  - path: left
    weight: 0.5
  - {path: right, weight: -2}
method: ties
parameters: {density: 0.3}
modules:
  "*.v": mean
scale: 0.7
rank: exact
base: other/base
"""


def test_a_recipe_is_the_merge_that_it_says(here: Path) -> None:
    (here / "recipe.yaml").write_text(WHOLE)
    assert main(["merge", "recipe.yaml", "-o", "out", "--quiet"]) == 0
    sm.merge(
        ["left", "right"],
        method=sm.ByModule({"*.v": sm.mean()}, default=sm.ties(0.3)),
        weights=[0.5, -2],
        scale=0.7,
        rank="exact",
        base_model="other/base",
    ).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_flags_go_before_the_file(here: Path) -> None:
    (here / "recipe.yml").write_text("adapters: [left, right]\nmethod: ties\nrank: 3\n")
    command = ["merge", "recipe.yml", "-o", "out", "--method", "mean", "--rank", "exact"]
    assert main([*command, "--weights", "2,1", "--quiet"]) == 0
    sm.merge(["left", "right"], method=sm.mean(), weights=[2, 1], rank="exact").save_pretrained("p")
    assert files(here / "out") == files(here / "p")


def test_how_the_output_is_written(here: Path) -> None:
    """`serving` and `uniform_rank` of `save_pretrained`; a flag goes before them."""
    text = "adapters: [left, right]\nmethod: mean\nrank: exact\n"
    (here / "recipe.yaml").write_text(f"{text}uniform_rank: false\n")
    (here / "served.yaml").write_text(f"{text}serving: vllm\n")
    merged = sm.merge(["left", "right"], method=sm.mean(), rank="exact")
    merged.save_pretrained("several", uniform_rank=False)
    merged.save_pretrained("uniform", uniform_rank=True)
    merged.save_pretrained("vllm", serving="vllm")
    for command, wanted in (
        (["recipe.yaml"], "several"),
        (["recipe.yaml", "--uniform-rank"], "uniform"),
        (["served.yaml"], "vllm"),
    ):
        assert main(["merge", *command, "-o", f"of-{wanted}", "--quiet"]) == 0
        assert files(here / f"of-{wanted}") == files(here / wanted)
    assert files(here / "uniform") != files(here / "several") != files(here / "vllm")


def test_the_dtype_of_the_output(here: Path) -> None:
    """That of `save_pretrained`; a flag goes before the file, and it is made again bit by bit."""
    (here / "recipe.yaml").write_text("adapters: [one, two]\nmethod: ties\ndtype: float16\n")
    merged = sm.merge(["one", "two"], method=sm.ties(), modules_to_save="mean")
    command = ["merge", "recipe.yaml", "--modules-to-save", "mean", "--quiet"]
    for flags, dtype in (
        ([], torch.float16),
        (["--save-dtype", "bfloat16"], torch.bfloat16),
        (["--save-dtype", "float32"], torch.float32),
    ):
        name = str(dtype)
        assert main([*command, "-o", f"of-{name}", *flags]) == 0
        merged.save_pretrained(name, dtype=dtype)
        assert files(here / f"of-{name}") == files(here / name)
        tensors = load_file(here / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert sm.reproduce(name, ["one", "two"]) == []
        card = (here / name / "README.md").read_text()
        assert f"--save-dtype {name.removeprefix('torch.')}" in card


def test_labels_and_heads(here: Path) -> None:
    recipe = {
        "adapters": [{"path": "one", "label": "a"}, {"path": "two", "label": "b"}],
        "method": "Chain(Sum())",
        "modules_to_save": {"classifier": "b"},
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["merge", "recipe.yaml", "-o", "out", "--quiet"]) == 0
    sm.merge(
        {"a": "one", "b": "two"}, method=sm.task_arithmetic(), modules_to_save={"classifier": "b"}
    ).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


@pytest.mark.parametrize(
    "flags",
    [
        ["left", "right", "--method", "ties", "--density", "0.4", "--weights", "1,-0.5"],
        ["x=left", "y=right", "--method", "mean", "--weights", "x=2,y=1", "--rank", "2"],
        ["one", "two", "--method", "Chain(Mean())", "--modules-to-save", "mean", "--scale", "2"],
        ["left", "right", "--method", "mean", "--no-uniform-rank", "--names", "input"],
        ["left", "right", "--method", "mean", "--serving", "vllm"],
        ["left", "right", "--method", "mean", "--save-dtype", "float16"],
    ],
)
def test_what_is_dumped_is_read_back(here: Path, flags: list[str]) -> None:
    assert main(["merge", *flags, "-o", "first", "--dump-recipe", "dumped.yaml", "--quiet"]) == 0
    assert main(["merge", "dumped.yaml", "-o", "second", "--quiet"]) == 0
    assert files(here / "first") == files(here / "second")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adapters: [left]\nmehtod: mean", "unknown key 'mehtod'; did you mean method?"),
        ("models: [left]", "unknown key 'models'; did you mean adapters?"),
        ("adapters: [left]\nmerge_method: mean", "'merge_method'; did you mean method?"),
        ("adapters: [{path: left, wieght: 2}]", "'wieght'; did you mean weight"),
        ("adapters: [{weight: 2}]", "an entry has no path"),
        ("adapters: [left]\nscale: much", "scale is a int or float; got 'much'"),
        ("adapters: [left]\nanchors: {foldre: x}", "'foldre'; did you mean folder"),
        ("adapters: [{path: left, revision: v1}]", "is a folder, which has no revision"),
        ("adapters: [{path: left, label: a}, right]", "label all adapters, or none"),
        ("adapters: [left]\nserving: vlm", "serving is one of vllm, sglang"),
        ("adapters: [left]\nserving: vlm", "got 'vlm'; did you mean vllm?"),
        ("adapters: [left]\ndtype: flot16", "got 'flot16'; did you mean float16?"),
        ("adapters: [left]\ndtype: bf16", "got 'bf16'; did you mean bfloat16?"),
        ("adapters: [left]\ndtype: int8", "dtype is one of float32, bfloat16, float16; got 'int8'"),
        ("adapters: [left]\nout_dtype: float16", "'out_dtype'; did you mean dtype?"),
        ("adapters: [left]\nanchors: {loss: aligment}", "did you mean alignment?"),
        ("adapters: [left]\nanchors: {dtype: fp32}", "did you mean float32?"),
        ("adapters: [left]\nnames: v4", "names is one of input, transformers 5"),
        ("adapters: [left]\nuniform_rank: 1", "uniform_rank is a bool; got '1'"),
        ("adapters: [left]\nrank: true", "rank is a int or float or str; got 'True'"),
        ("adapters: []", "names no adapters"),
        ("- left", "expected keys and values"),
        ("adapters: [", "cannot be read"),
        ("adapters: [left]", "which method?"),
        ("adapters: [left]\nmethod: mean\nparameters: {density: 1}", "has no density"),
    ],
)
def test_errors_name_the_key(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (here / "recipe.yaml").write_text(text)
    assert message in fails(capsys, "merge", "recipe.yaml", "-o", "out")


def test_no_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml cannot be read" in fails(capsys, "merge", "none.yaml", "-o", "out")
