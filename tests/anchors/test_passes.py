"""What a merge with anchors shows while it runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm

from ..models import Block, save_lora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(8)])


def loss(model: Net, batch: Tensor) -> Tensor:
    return model.layers[0](batch).square().mean()


@pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")
@pytest.mark.parametrize("shown", [True, False])
def test_every_pass_has_a_bar(
    shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the adapter and what is asked of it; passes are counted as they begin."""
    for seed, name in enumerate(("art", "sketch")):
        save_lora(tmp_path / name, seed, Net(), targets=["q", "v"])
    torch.manual_seed(0)
    batches = list(torch.randn(3, 4, 8))
    method, adapters = sm.sap_original(0.5), [tmp_path / "art", tmp_path / "sketch"]
    merged = sm.merge(adapters, batches, Net(), method=method, loss=loss, progress=shown)
    anchors = merged.stream.anchors
    assert anchors is not None
    assert anchors.passes.count >= 2
    merged.save_pretrained(tmp_path / "out")
    err = capsys.readouterr().err
    if not shown:
        assert err == ""
        return
    found = dict(re.findall(r"anchors, pass (\d+): ([^:]+):", err))
    assert [int(number) for number in found] == list(range(1, anchors.passes.count + 1))
    for text in ("gradients at adapter 'art'", "gradients at adapter 'sketch'", "loss at"):
        assert any(what.startswith(text) for what in found.values()), (text, found)
    assert "/3 [" in err  # batches, and the time left
