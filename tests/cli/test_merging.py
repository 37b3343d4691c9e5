"""`sapmerge merge`: what it prints, where, and with which exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import sapmerge as sm
from sapmerge.cli import main

from ..conftest import error
from ..models import BASE, files, products
from .shell import Terminal, fails


def test_merge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "left", "right", "-o", "out", "--method", "mean"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where nobody looks
    for text in (
        "Chain(Mean())",
        "left",
        "right",
        "layers.0.q",
        "energy kept 100.0%",
        "written to out",
        BASE,
    ):
        assert text in out
    left, right = products(here / "left", 2.0), products(here / "right", 4.0)
    merged = sm.Adapter.load("out")
    for name in left:
        assert error(merged.update(name).dense(), (left[name] + right[name]) / 2) < 1e-6


def test_the_same_bytes_as_from_python(here: Path) -> None:
    main(
        [
            "merge",
            "left",
            "right",
            "-o",
            "out",
            "--method",
            "ties",
            "--density",
            "0.3",
            "--weights",
            "1,-0.5",
            "--scale",
            "0.7",
            "--rank",
            "0.95",
            "--quiet",
        ]
    )
    sm.merge(
        ["left", "right"], method=sm.ties(0.3), weights=[1, -0.5], scale=0.7, rank=0.95
    ).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_rank_and_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "a=left", "b=right", "-o", "out", "--method", "mean", "--rank", "2"]) == 0
    out, err = capsys.readouterr()
    assert {module.rank for module in sm.Adapter.load("out").modules.values()} == {2}
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("a ", "b "))] == [
        "a",
        "b",
    ]
    assert err.count("\n") <= 1
    assert err == "" or err.startswith("sapmerge: warning: the stored adapter keeps")


@pytest.mark.parametrize("adapters", [["a=left", "right"], ["two words=left", "b=right"]])
def test_labels_for_some(
    here: Path, capsys: pytest.CaptureFixture[str], adapters: list[str]
) -> None:
    assert main(["merge", *adapters, "-o", "out", "--method", "mean"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sapmerge: {adapters[0]!r} is no folder; label=folder is given for all")


def test_a_warning_is_one_line_on_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["merge", "left", "right", "-o", "out", "--method", "ties", "--rank", "1", "--quiet"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sapmerge: warning: the stored adapter keeps ")
    assert err.count("\n") == 1


def test_heads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "one", "two", "-o", "out", "--method", "mean"]
    assert "'classifier' in one, two" in fails(capsys, *command)
    assert main([*command, "--modules-to-save", "classifier=two"]) == 0
    two = sm.Adapter.load("two").saved_tensor("classifier.weight")
    assert torch.equal(sm.Adapter.load("out").saved_tensor("classifier.weight"), two)
    assert main([*command, "--modules-to-save", "drop", "--overwrite"]) == 0
    assert not sm.Adapter.load("out").saved


def test_base_model(here: Path) -> None:
    assert (
        main(
            [
                "merge",
                "left",
                "-o",
                "out",
                "--method",
                "mean",
                "--base-model",
                "other/base",
                "--quiet",
            ]
        )
        == 0
    )
    assert sm.Adapter.load("out").base_model == "other/base"


def test_negative_weights_first(here: Path) -> None:
    assert (
        main(
            [
                "merge",
                "left",
                "right",
                "-o",
                "out",
                "--method",
                "task_arithmetic",
                "--weights=-1,1",
                "--quiet",
            ]
        )
        == 0
    )
    left, right = products(here / "left", 2.0), products(here / "right", 4.0)
    for name in left:
        assert error(sm.Adapter.load("out").update(name).dense(), right[name] - left[name]) < 1e-6


def test_an_existing_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "left", "-o", "kept", "--method", "mean"]
    assert main(command) == 0
    capsys.readouterr()
    before = files(here / "kept")
    assert "kept" in fails(capsys, *command)
    assert files(here / "kept") == before
    assert main([*command, "--overwrite", "--scale", "2"]) == 0
    assert files(here / "kept") != before


PROGRESS = [(True, None, True), (False, None, False), (True, False, False), (False, True, True)]


@pytest.mark.parametrize(("tty", "asked", "shown"), PROGRESS)
def test_progress(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tty: bool,
    asked: bool | None,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr, tty))
    sm.merge(["left"], method=sm.mean(), progress=asked).save_pretrained("out")
    assert ("merging" in capsys.readouterr().err) == shown
