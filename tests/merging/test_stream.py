"""How often a merge reads: every update once, whatever the pre-passes of the method ask."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import sapmerge as sm
from sapmerge.io.adapter import Adapter
from sapmerge.merging import stream
from tests.anchors import models
from tests.conftest import error


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Module -> how often an update of it was read from an adapter."""
    counted: Counter[str] = Counter()
    read = Adapter.update

    def counting(self: Adapter, name: str) -> sm.LowRank:
        counted[name] += 1
        return read(self, name)

    monkeypatch.setattr(Adapter, "update", counting)
    return counted


@pytest.mark.parametrize(
    "method", [sm.sap(), sm.sap(density=0.5), sm.sap_original(), sm.tune([sm.mean(), sm.knots()])]
)
def test_every_update_is_read_once(reads: Counter[str], method: sm.Method, tmp_path: Path) -> None:
    """`sap()` read each of them 11.4 times, `sap_original` 6.1 times."""
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    models.merge(adapters, loader, model, method=method).save_pretrained(tmp_path / "out")
    assert set(reads.values()) == {3}, "one read for each of three adapters"


def test_beyond_the_budget_they_are_read_again_and_the_bits_are_the_same(
    reads: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    models.merge(adapters, loader, model, method=sm.sap()).save_pretrained(tmp_path / "held")
    reads.clear()
    monkeypatch.setattr(stream, "_HELD", 0)
    models.merge(adapters, loader, model, method=sm.sap()).save_pretrained(tmp_path / "streamed")
    assert min(reads.values()) > 2
    name = "adapter_model.safetensors"
    assert (tmp_path / "held" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def test_a_method_without_a_pre_pass_holds_nothing(reads: Counter[str], tmp_path: Path) -> None:
    adapters, _ = models.adapters(models.clip(), [models.VISION_TARGETS] * 2)
    merged = models.merge(adapters, method=sm.mean())
    merged.save_pretrained(tmp_path / "out")
    assert set(reads.values()) == {2}
    dict(merged.updates())
    assert set(reads.values()) == {4}


def test_a_merge_with_anchors_on_several_threads() -> None:
    """The model's passes use all threads, the algebra one;
    afterwards there are as many as before.
    """
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merged = dict(models.merge(adapters, loader, model, method=sm.sap()).updates())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for name, update in models.merge(adapters, loader, model, method=sm.sap()).updates():
        assert error(update.dense(), merged[name].dense()) < 1e-5
