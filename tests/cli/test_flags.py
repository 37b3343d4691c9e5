"""Errors name flags, and flags take what users type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.cli.flags import in_flags, with_negative_numbers
from sapmerge.method_names import names

from ..conftest import error
from ..models import products
from .shell import fails


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("give a path, or overwrite=True to", "give a path, or --overwrite to"),
        ("modules_to_save='drop' leaves it", "--modules-to-save drop leaves it"),
        ("modules_to_save={'classifier': 'a'}", "--modules-to-save module=adapter"),
        ("a larger rank, e.g. rank=0.95", "a larger rank, e.g. --rank 0.95"),
        ("give it: model=...", "give it: --model"),
        ("names='x' is not", "--names x is not"),
        ("In(ties(rank=2))", "In(ties(rank=2))"),
        ("with sapmerge.Adapter.load(path, allow_pickle_weights=True)", "with --allow-pickle"),
        ("unknown_model=3", "unknown_model=3"),
    ],
)
def test_messages(python: str, shell: str) -> None:
    assert in_flags(python) == shell


def test_negative_numbers() -> None:
    assert with_negative_numbers(["a", "--weights", "-1,1", "-o", "x"]) == [
        "a",
        "--weights=-1,1",
        "-o",
        "x",
    ]
    assert with_negative_numbers(["--weights", "--quiet", "--scale", "-.5"]) == [
        "--weights",
        "--quiet",
        "--scale=-.5",
    ]


def test_weights_that_begin_with_a_dash(here: Path) -> None:
    command = ["merge", "left", "right", "-o", "out", "--method", "task_arithmetic", "--quiet"]
    assert main([*command, "--weights", "-1,1"]) == 0
    left, right = products(here / "left", 2.0), products(here / "right", 4.0)
    for name in left:
        assert error(sm.Adapter.load("out").update(name).dense(), right[name] - left[name]) < 1e-6


def test_errors_name_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "left", "-o", "kept", "--method", "mean", "--quiet"]
    assert main(command) == 0
    text = fails(capsys, *command)
    assert "--overwrite" in text
    assert "True" not in text
    heads = fails(capsys, "merge", "one", "two", "-o", "out", "--method", "mean")
    assert "--modules-to-save" in heads
    assert "modules_to_save" not in heads
    zero = fails(capsys, "merge", "left", "-o", "out", "--method", "mean", "--weights", "0")
    assert "--method task_arithmetic" in zero
    (here / "pickled").mkdir()
    (here / "pickled" / "adapter_config.json").write_bytes(
        (here / "left" / "adapter_config.json").read_bytes()
    )
    (here / "pickled" / "adapter_model.bin").write_bytes(b"")
    assert "--allow-pickle" in fails(capsys, "merge", "pickled", "-o", "out", "--method", "mean")


def test_parent_folders_are_created(here: Path) -> None:
    assert main(["merge", "left", "-o", "a/b/c", "--method", "mean", "--quiet"]) == 0
    assert sm.Adapter.load("a/b/c").modules


def test_an_adapter_one_level_below(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "outer").mkdir()
    (here / "outer" / "inner").symlink_to(here / "left")
    text = fails(capsys, "merge", "outer", "-o", "out", "--method", "mean")
    assert "'inner' in it" in text


def test_what_is_no_adapter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A message says what it is, and the flag or the command."""
    for name, held, text in (
        ("base", ("config.json", "model.safetensors"), "a whole model ('model.safetensors'), no"),
        (
            "shards",
            ("config.json", "pytorch_model-00001-of-00002.bin"),
            "as the base, --model, and",
        ),
        ("mlx", ("adapters.safetensors",), "an adapter of MLX: `sapmerge convert` makes a PEFT"),
        ("pipe", ("pytorch_lora_weights.safetensors",), "diffusers: `sapmerge convert` makes"),
        ("tune", ("adapter_model.pt",), "an adapter of torchtune: `sapmerge convert` makes"),
    ):
        (here / name).mkdir()
        for file in held:
            (here / name / file).write_bytes(b"{}")
        for command in (["merge", name, "-o", "out", "--method", "mean"], ["inspect", name]):
            assert text in fails(capsys, *command)


def test_checks_as_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The problems; the exit code says whether there are any."""
    assert main(["merge", "left", "right", "-o", "both", "--method", "mean", "--quiet"]) == 0
    for command in (
        ["verify", "both", "--inputs", "left", "right"],
        ["reproduce", "both", "--inputs", "left", "right"],
        ["check", "both", "--serving", "vllm"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--json"])
        assert stop.value.code == 0
        assert json.loads(capsys.readouterr().out) == {"problems": []}
    with pytest.raises(SystemExit) as stop:
        main(["verify", "both", "--inputs", "left", "--json"])
    assert stop.value.code == 2
    assert json.loads(capsys.readouterr().out)["problems"]


def test_json_and_verbose(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "left", "right", "--method", "mean"]
    assert main([*command, "-o", "first", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    merged = sm.merge(["left", "right"], method=sm.mean())
    wanted = json.loads(json.dumps(merged.report.to_dict()))
    assert data["layers"] == wanted["layers"]
    assert main([*command, "-o", "second", "-v"]) == 0
    out = capsys.readouterr().out
    assert out.count("layers.0.q") > 0
    assert "what the method recorded" in out


def test_aliases(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for alias, name in (("linear", "mean"), ("cat", "task_arithmetic"), ("dare_linear", "dare")):
        command = ["merge", "left", "right", "--rank", "exact", "--method"]
        assert main([*command, alias, "-o", alias]) == 0
        assert repr(getattr(sm, name)()) in capsys.readouterr().out


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in names():
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    assert "linear (mean)" in out
    assert main(["methods", "ties"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ties(density=0.2, majority_sign_method='total', scope='layer')")
    assert "sapmerge merge A B -o OUT --method ties [--density ...]" in out
    assert main(["methods", "sap", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["anchors"] is True
    assert "did you mean 'ties'" in fails(capsys, "methods", "tise")
