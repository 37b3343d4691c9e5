"""Sums of many adapters, of which no layer is held whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sapmerge as sm
from sapmerge.core.protocols import Method
from sapmerge.merging import pieces
from sapmerge.merging.inputs import sharing

pytestmark = pytest.mark.filterwarnings("ignore:the stored adapter keeps")
COUNT, SHAPES = 150, {"a": (24, 20), "b": (20, 24), "c": (400, 400)}
"""The sums of the first two have as many columns as their matrices; that of the third has not."""


@pytest.fixture(scope="module")
def adapters() -> list[sm.Adapter]:
    """The last ten lack the second layer."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for k in range(COUNT):
        state, names = {}, ["a", "c"] if k >= COUNT - 10 else list(SHAPES)
        for name in names:
            m, n = SHAPES[name]
            state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, n, generator=generator)
            state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(m, 2, generator=generator)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": names}
        found.append(sm.Adapter.from_state_dict(config, state, label=f"client{k}"))
    return found


@pytest.mark.parametrize("method", [sm.mean(), sm.task_arithmetic()], ids=["mean", "sum"])
def test_the_sum_of_many_is_the_sum_of_their_matrices(
    adapters: list[sm.Adapter], method: Method
) -> None:
    weights = [1.0 + k % 7 for k in range(COUNT)]
    merged = sm.merge(adapters, method=method, weights=weights, scale=0.5, rank=4)
    stored = {module.name: update for module, update, _ in merged.run.stored()}
    for name in SHAPES:
        total = np.zeros(SHAPES[name])
        for adapter, weight in zip(adapters, weights):
            if name in adapter.modules:
                total += weight * adapter.update(name).dense().double().numpy()
        total *= 0.5 / (sum(weights) if method == sm.mean() else 1)
        U, sigma, Vh = np.linalg.svd(total)
        right = (U[:, :4] * sigma[:4]) @ Vh[:4]
        assert stored[name].dtype == torch.float32
        gap = np.linalg.norm(stored[name].dense().numpy() - right) / np.linalg.norm(right)
        assert gap < 1e-6, name
        row = next(row for row in merged.report.layers if row.name == name)
        assert row.norm == pytest.approx(float(np.linalg.norm(total)), rel=1e-6)
        assert row.energy_kept == pytest.approx(float((sigma[:4] ** 2).sum() / (sigma**2).sum()))


def test_the_report_does_not_tell_in_how_many_pieces(
    adapters: list[sm.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {a.label: a for a in adapters}
    reports = []
    for known in (pieces.in_pieces, lambda *_: None):
        monkeypatch.setattr("sapmerge.merging.run.in_pieces", known)
        reports.append(sm.merge(some, method=sm.mean(), rank=4).report)
    for one, other in zip(reports[0].layers, reports[1].layers, strict=True):
        assert (one.name, one.adapters, one.rank) == (other.name, other.adapters, other.rank)
        assert one.energies == pytest.approx(other.energies, rel=1e-12)
        for field in ("cosine", "sign_conflict", "energy_kept", "norm"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-6), field


def test_which_sums_are_taken_in_pieces(adapters: list[sm.Adapter]) -> None:
    def stream(method: Method, count: int = COUNT) -> tuple[object, Method]:
        run = sm.merge(adapters[:count], method=method, rank=4).run
        return run.stream, run.prepared

    found = {name: pieces.in_pieces(*stream(sm.mean()), name) for name in SHAPES}
    assert found == {"a": sm.Mean(), "b": sm.Mean(), "c": None}  # 300 columns of 400
    assert pieces.in_pieces(*stream(sm.mean(), 100), "a") is None
    assert pieces.in_pieces(*stream(sm.MatchEnergy(sm.mean())), "a") is None


def test_no_more_than_some_adapters_are_held(
    adapters: list[sm.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    held = pieces.Layer

    def counted(name: str, members: list[object]) -> object:
        sizes.append(len(members))
        return held(name, members)  # type: ignore[arg-type]

    monkeypatch.setattr(pieces, "Layer", counted)
    sm.merge(adapters, method=sm.mean(), rank=4).report
    assert max(sizes) == 64
    assert sum(sizes) == 2 * COUNT


def test_a_sum_that_is_not_finite_is_refused(adapters: list[sm.Adapter]) -> None:
    weights = [3e38] + [0.0] * (COUNT - 1)
    with pytest.raises(sm.NonFiniteError, match="layer 'a' is NaN or infinite"):
        sm.merge(adapters, method=sm.task_arithmetic(), weights=weights, scale=1e300, rank=2).report


def test_one_table_of_modules_for_all_that_have_the_same(adapters: list[sm.Adapter]) -> None:
    held = sharing(adapters)
    assert len({id(a._contents.readings) for a in held[:-10]}) == 1
    assert len({id(a._contents.weights.entries) for a in held[:-10]}) == 1
    assert held[-1].modules.keys() == {"a", "c"}
    for before, after in zip(adapters, held, strict=True):
        assert before.digest == after.digest
        assert before.modules == after.modules
        assert torch.equal(before.update("a").dense(), after.update("a").dense())
