"""Bounded influence: `CapShare`, and the outliers that a report marks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sapmerge as sm
from sapmerge.io.adapter import Adapter
from tests.conftest import dense, low_rank, make_layers, run


def kept_energies(method: sm.CapShare, layer: sm.Layer) -> list[float]:
    """What every adapter brings in after the cap, seen by a method of the test's own."""
    seen: list[float] = []

    def spy(inside: sm.Layer) -> sm.Update:
        seen.extend((w * u.norm()) ** 2 for u, w in zip(inside, inside.weights, strict=True))
        return inside.updates[0]

    sm.CapShare(spy, method.share)(layer)
    return seen


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-3, 6), min_size=2, max_size=6),
    st.floats(0.05, 0.95),
    st.lists(st.sampled_from([1.0, -2.0, 0.3]), min_size=6, max_size=6),
)
def test_no_adapter_brings_more_than_its_share(
    powers: list[float], share: float, weights: list[float]
) -> None:
    updates = tuple(low_rank((5, 4), 2, k).scaled(10**power) for k, power in enumerate(powers))
    layer = sm.Layer("l", updates, weights=tuple(weights[: len(updates)]))
    before = [(w * u.norm()) ** 2 for u, w in zip(layer, layer.weights, strict=True)]
    after = kept_energies(sm.CapShare(sm.mean(), share), layer)
    cap = max(share, 1 / len(updates))
    assert max(after) <= cap * sum(after) * (1 + 1e-6)
    for old, new in zip(before, after, strict=True):
        # only the loud are cut
        assert new == pytest.approx(old, rel=1e-6) or new == pytest.approx(max(after), rel=1e-6)
    if max(before) <= cap * sum(before):
        assert after == pytest.approx(before)


def test_a_cap_that_binds_equals_the_formula() -> None:
    updates = (
        sm.Dense(torch.tensor([[10.0, 0.0]])),
        sm.Dense(torch.tensor([[0.0, 1.0]])),
        sm.Dense(torch.tensor([[0.0, 1.0]])),
    )
    layer = sm.Layer("l", updates)
    # c / (c + 1 + 1) = 0.5 gives c = 2: the loud update has norm sqrt(2) afterwards.
    got = sm.CapShare(sm.Chain(sm.Sum()), 0.5)(layer).dense()
    torch.testing.assert_close(got, torch.tensor([[2**0.5, 2.0]]))


@pytest.mark.parametrize("share", [0.0, 1.0, 20, -0.1])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(sm.MethodError, match=r"in \(0, 1\)"):
        sm.CapShare(sm.mean(), share)


def test_it_wraps_what_needs_the_whole_adapter_and_reads_back() -> None:
    method = sm.CapShare(sm.MatchEnergy(sm.mean()), 0.6)
    assert repr(sm.parse(repr(method))) == repr(method)
    layers = make_layers([2, 3, 2])
    got, again = dense(run(method, layers)), dense(run(sm.parse(repr(method)), layers))
    assert all(torch.equal(got[name], again[name]) for name in got)


def adapters(scales: Sequence[float]) -> dict[str, Adapter]:
    made = {}
    for k, scale in enumerate(scales):
        update = low_rank((6, 5), 2, k, torch.float32)
        state = {
            "base_model.model.q.lora_A.weight": update.A,
            "base_model.model.q.lora_B.weight": update.B * scale,
        }
        made[f"a{k}"] = Adapter.from_state_dict(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}, state
        )
    return made


@pytest.mark.filterwarnings("ignore:.*of the energy of the merge")
def test_the_report_marks_a_loud_adapter_and_says_by_how_much() -> None:
    made = adapters([1.0, 1.0, 1.0, 50.0])
    norms = torch.tensor([made[label].update("q").norm() for label in made])
    report = sm.merge(made, method=sm.mean()).report
    found = {adapter.label: adapter for adapter in report.adapters}
    middle = norms.log().median() if len(norms) % 2 else norms.log().sort().values[1:3].mean()
    assert found["a3"].relative_norm == pytest.approx(float(norms[3] / middle.exp()), rel=1e-5)
    assert found["a3"].outlier > 5
    assert all(abs(found[label].outlier) < 5 for label in ("a0", "a1", "a2"))
    assert "outlier" in str(report)
    assert all(
        adapter.outlier is None
        for adapter in sm.merge(adapters([1.0, 9.0]), method=sm.mean()).report.adapters
    )
