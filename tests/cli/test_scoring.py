"""`sapmerge score` in shards, and a merge that runs no model: the bytes of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import sapmerge as sm
from sapmerge.cli import main

from .shell import Terminal, fails

MINE = """
import torch
from tests.cli.conftest import Net

passes = []

def loss(model, batch):
    passes.append(1)
    return model.layers[0](batch).square().mean()

def setup():
    torch.manual_seed(0)
    return list(torch.randn(2, 3, 12)), Net(), loss

def pair():
    return Net()
"""
ADAPTERS = ("left", "right", "same")


@pytest.fixture
def setup(here: Path) -> str:
    """Every test has a module of its own, because a module is imported once."""
    name = f"mine_{here.parent.name}_{here.name}".replace("-", "_")
    (here / f"{name}.py").write_text(MINE)
    return name


@pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")
def test_shards_and_one_process_make_the_same_bytes(
    here: Path, setup: str, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ["--method", "sap_original", "--density", "0.5", "--setup", f"{setup}:setup"]
    assert main(["merge", *ADAPTERS, "-o", "whole", "--quiet", *method]) == 0
    module = __import__(setup)
    for shard in ("1/2", "0/2"):
        module.passes.clear()
        assert main(["score", *ADAPTERS, "--cache", "cache", "--shard", shard, *method]) == 0
        assert module.passes
    out = capsys.readouterr().out
    assert "shard 1/2 is done; the cache lacks what others run" in out
    assert "the cache has what the merge needs" in out
    shard = ["--cache", "new", "--shard", "0/2", "--json", *method]
    assert main(["score", *ADAPTERS, *shard]) == 0
    assert json.loads(capsys.readouterr().out) == {"shard": 0, "of": 2, "complete": False}
    module.passes.clear()
    only = ["--cache", "cache", "--cache-only", "--quiet"]
    assert main(["merge", *ADAPTERS, "-o", "sharded", *only, *method]) == 0
    assert not module.passes
    whole, sharded = (Path(name, "adapter_model.safetensors") for name in ("whole", "sharded"))
    assert whole.read_bytes() == sharded.read_bytes()
    assert sm.Adapter.load("whole").modules


@pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")
def test_progress(
    here: Path,
    setup: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bar for each pass on a terminal; none, and no line, with --quiet."""
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr, True))
    score = ["score", *ADAPTERS, "--method", "sap_original", "--setup", f"{setup}:setup"]
    assert main([*score, "--cache", "cache"]) == 0
    out, err = capsys.readouterr()
    assert out == "the cache has what the merge needs\n"
    assert "anchors, pass 2:" in err
    assert main([*score, "--cache", "quiet", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    names = {path.name for path in (here / "cache").rglob("*")}
    assert {path.name for path in (here / "quiet").rglob("*")} == names != set()


def test_what_is_wrong(here: Path, setup: str, capsys: pytest.CaptureFixture[str]) -> None:
    score = ["score", *ADAPTERS, "--cache", "cache"]
    assert "I/N, as in 3/16" in fails(capsys, *score, "--setup", f"{setup}:setup", "--shard", "one")
    assert "0 <= i < n" in fails(capsys, *score, "--setup", f"{setup}:setup", "--shard", "2/2")
    assert "(anchors, model)" in fails(capsys, *score, "--setup", f"{setup}:pair", "--shard", "0/2")
    lacks = ["merge", *ADAPTERS, "-o", "out", "--method", "sap", "--cache", "cache", "--cache-only"]
    assert "the cache lacks" in fails(capsys, *lacks, "--setup", f"{setup}:setup")
    assert "--cache is of anchors" in fails(capsys, *lacks)
