"""`sapmerge convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sapmerge as sm
from sapmerge.cli import main
from tests.versions import needs_pickles

from ..io.formats.test_convert import kohya, torchtune, updates
from .shell import fails


def test_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    dense = kohya(tmp_path / "style.safetensors")
    assert main(["convert", "style.safetensors", "-o", "style", "--base-model", "a/b"]) == 0
    assert capsys.readouterr().out.startswith("kohya -> peft (")
    for component, wanted in dense.items():
        found = updates(tmp_path / "style" / component)
        for name, update in wanted.items():
            torch.testing.assert_close(found[name], update)
    command = ["convert", "unet=style/unet", "text_encoder=style/text_encoder", "--to", "kohya"]
    assert main([*command, "-o", "new.safetensors", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["source"], data["target"]) == ("peft", "kohya")
    assert len(data["modules"]["unet"]) == 3
    first, back = load_file("style.safetensors"), load_file("new.safetensors")
    assert all(torch.equal(back[name], first[name]) for name in first)


@needs_pickles
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torchtune(tmp_path / "tune")
    text = fails(capsys, "convert", "tune", "-o", "out")
    assert "--allow-pickle" in text
    text = fails(capsys, "convert", "tune", "-o", "out", "--allow-pickle")
    assert "--model" in text
    assert "model=" not in text
    assert "no such file" in fails(capsys, "convert", "none.safetensors", "-o", "out")
    kohya(tmp_path / "style.safetensors")
    sm.convert("style.safetensors", "style")
    both = ("convert", "style/unet", "style/text_encoder", "-o", "x.safetensors", "--to", "kohya")
    assert "unet=FOLDER" in fails(capsys, *both)
    one = fails(capsys, "convert", "style/unet", "-o", "x.safetensors", "--to", "kohya")
    assert "unet=" in one
