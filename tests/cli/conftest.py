"""Adapters of a small network, and a working folder that has them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from ..models import Block, save_lora


class Net(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width)])
        self.classifier = nn.Linear(width, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    save_lora(root / "left", 1, Net(), targets=["q", "v"])
    save_lora(root / "right", 2, Net(), targets=["q", "v"], r=2)
    save_lora(root / "same", 7, Net(), targets=["q", "v"])
    for seed, name in ((3, "one"), (4, "two")):
        save_lora(root / name, seed, Net(), targets=["q"], modules_to_save=["classifier"])
    save_lora(root / "wide", 3, Net(16), targets=["q"])
    return root


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the adapters in it."""
    for source in root.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path
