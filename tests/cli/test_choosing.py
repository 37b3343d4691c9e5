"""`sapmerge anchors`, and data sets for `--anchors`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoProcessor, CLIPModel

import sapmerge as sm
from sapmerge.cli import main

from ..models import files
from .shell import Terminal, fails
from .test_anchored import ADAPTERS, loader
from .test_anchored import root as root  # the adapters, the base and the photos

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("by", ["coreset", "kmeans", "random"])
def test_anchors(by: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same pairs and weights as in Python, in a folder that `--anchors` reads."""
    command = ["anchors", "photos", "-o", "few/anchors", "--count", "3", "--by", by, "--seed", "1"]
    assert main([*command, *([] if by == "random" else ["--model", "base"]), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    pool, model = loader(), CLIPModel.from_pretrained("base")
    if by == "random":
        chosen = sm.anchors.at_random(pool, 3, seed=1)
    else:
        chosen = getattr(sm.anchors, by)(pool, 3, model, seed=1)
    assert data["rows"] == list(chosen.indices)
    assert data["weights"] == pytest.approx(list(chosen.weights))
    found = sm.anchors.read_folder("few/anchors")
    assert [pair.text for pair in found] == [f"{'abcdef'[k]} thing" for k in chosen.indices]
    assert [pair.weight for pair in found] == pytest.approx([3 * w for w in chosen.weights])
    merge = ["merge", *ADAPTERS, "-o", "out", "--anchors", "few/anchors", "--model", "base"]
    assert main([*merge, "--quiet"]) == 0
    batches = sm.anchors.from_folder("few/anchors", AutoProcessor.from_pretrained("base"))
    sm.merge(list(ADAPTERS), batches, model).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_progress(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pool's embeddings have a bar on a terminal; none, and no line, with --quiet."""
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr, True))
    command = ["anchors", "photos", "--count", "2", "--model", "base", "--batch-size", "2"]
    assert main([*command, "-o", "shown"]) == 0
    out, err = capsys.readouterr()
    assert out == "2 of 6 pairs written to shown\n"
    assert "embeddings" in err
    assert "0/3" in err
    assert main([*command, "-o", "quiet", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert files(here / "quiet") == files(here / "shown")


def test_errors_of_anchors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("anchors", "photos", "-o", "out")
    assert "add --model" in fails(capsys, *command, "--count", "2")
    many = fails(capsys, *command, "--model", "base", "--count", "7")
    assert "--count 7: the pool has 6 pairs" in many
    assert "no such folder" in fails(capsys, "anchors", "nowhere", "-o", "out", "--model", "base")
    assert main([*command[:2], "-o", "kept", "--by", "random", "--count", "2"]) == 0
    capsys.readouterr()
    again = fails(capsys, *command[:2], "-o", "kept", "--by", "random", "--count", "2")
    assert "--overwrite" in again


class Datasets(ModuleType):
    """Stands in for the package: what is asked for, and rows, or an error."""

    def __init__(self, rows: Any) -> None:
        super().__init__("datasets")
        self.rows, self.asked = rows, []

    def load_dataset(self, name: str, *, split: str, revision: str | None) -> Any:
        self.asked.append((name, split, revision))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_data_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images and first captions are those of the folder."""
    captions = json.loads((here / "photos" / "captions.json").read_text())
    rows = [
        {"image": Image.open(here / "photos" / name), "caption": [text, "another"]}
        for name, text in captions.items()
    ]
    fake = Datasets(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    command = ["merge", *ADAPTERS, "--model", "base", "--quiet"]
    assert main([*command, "-o", "out", "--anchors", "hf://user/pics@v1:test[:6]"]) == 0
    assert fake.asked == [("user/pics", "test[:6]", "v1")]
    assert main([*command, "-o", "python", "--anchors", "photos"]) == 0
    names = ("adapter_config.json", "adapter_model.safetensors")
    one, other = files(here / "out"), files(here / "python")
    assert all(one[name] == other[name] for name in names)
    assert main([*command, "-o", "again", "--anchors", "hf://datasets/user/pics"]) == 0
    assert fake.asked[1:] == [("user/pics", "train", None)]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (ConnectionError("Couldn't reach 'user/pics' on the Hub"), "Couldn't reach 'user/pics'"),
        (ValueError("Unknown split"), "(split 'train') cannot be opened: Unknown split"),
        ([{"picture": 1, "caption": "a"}], "row 1: has no image or no caption; its columns are p"),
        ([], "has no rows"),
    ],
)
def test_data_sets_that_are_none(
    rows: Any,
    text: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("merge", *ADAPTERS, "--model", "base", "-o", "out", "--anchors", "hf://user/pics")
    monkeypatch.setitem(sys.modules, "datasets", Datasets(rows))
    found = fails(capsys, *command)
    assert text in found
    assert "'user/pics'" in found
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in fails(capsys, *command)
