"""`--html`: the page that Python makes, and a name that is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

import sapmerge as sm
from sapmerge.cli import main

from .shell import fails


def test_pages_are_those_of_python(here: Path) -> None:
    assert main(["inspect", "left", "right", "--html", "look.html"]) == 0
    assert Path("look.html").read_text("utf-8") == str(sm.inspect(["left", "right"]).plot())
    merge = ["merge", "left", "right", "-o", "out", "--method", "mean", "--html", "page.HTML"]
    assert main(merge) == 0
    report = sm.merge(["left", "right"], method=sm.mean()).report
    assert Path("page.HTML").read_text("utf-8") == str(report.plot())


def test_a_page_does_not_replace_an_adapter(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "left", "right", "-o", "out", "--method", "mean"]
    text = fails(capsys, *command, "--html", "left/adapter_model.safetensors")
    assert "does not end in .html" in text
