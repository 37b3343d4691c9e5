"""ScaleByAnchors against losses of a model with dense weights, and a parabola by numpy."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sapmerge as sm
from sapmerge.errors import MethodError
from tests.anchors import models

STEPS = 2.0 ** (np.arange(-3, 3) / 2)


def dense_loss(
    model: nn.Module, loader: list[Any], deltas: dict[str, torch.Tensor], loss: Any
) -> float:
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in deltas.items():
            moved.get_submodule(name).weight += delta
    return models.mean_loss(moved, loader, loss)


def chosen(losses: list[float], price: float) -> float:
    """The vertex of the parabola through the lowest of the points and its neighbours, in log s."""
    x = np.log(STEPS)
    y = np.array(losses) - price * x
    best = int(y.argmin())
    if best in (0, len(y) - 1):
        return float(STEPS[best])
    a, b, _ = np.polyfit(x[best - 1 : best + 2], y[best - 1 : best + 2], 2)
    return math.exp(-b / (2 * a))


@pytest.mark.parametrize("price", [0.0, 0.003, 0.03, 3.0])
@pytest.mark.parametrize("trust", [1.0, 0.5, 0.0])
def test_length_is_where_the_anchors_stop(price: float, trust: float) -> None:
    model, loader = models.clip(), models.pairs((7, 4))
    adapters, _ = models.adapters(model, [models.BOTH_TARGETS] * 3)
    matched = models.merge(adapters, method=sm.MatchEnergy(sm.mean()))
    spelled = {name: module.spelled for name, module in matched.run.stream.modules.items()}
    deltas = {spelled[name]: update.dense() for name, update in matched.updates()}
    losses = [
        dense_loss(
            model,
            loader,
            {name: float(s) * delta for name, delta in deltas.items()},
            sm.centered_alignment,
        )
        for s in STEPS
    ]
    wanted = chosen(losses, price) ** trust
    method = sm.ScaleByAnchors(sm.mean(), price=price, trust=trust)
    merged = models.merge(adapters, loader, model, method=method)
    notes = merged.report.notes
    assert list(notes["losses_by_length"].values()) == pytest.approx(losses, rel=1e-4)
    assert notes["length"] == pytest.approx(wanted, rel=1e-2)
    for name, update in merged.updates():
        expected = deltas[spelled[name]] * notes["length"]
        assert float((update.dense() - expected).norm() / expected.norm()) < 1e-5


def test_a_price_of_nothing_takes_the_lowest_loss_and_a_high_price_the_longest() -> None:
    model, loader = models.clip(), models.pairs((7, 4))
    adapters, _ = models.adapters(model, [models.BOTH_TARGETS] * 2)

    def length(price: float) -> float:
        method = sm.ScaleByAnchors(sm.mean(), loss=sm.contrastive, price=price, trust=1.0)
        return models.merge(adapters, loader, model, method=method).report.notes["length"]

    assert length(100.0) == STEPS[-1]
    lengths = [length(price) for price in (0.0, 0.01, 0.1, 1.0, 100.0)]
    assert lengths == sorted(lengths)


def test_one_pair_per_batch_and_language_models_use_their_own_loss() -> None:
    model, loader = models.clip(), models.pairs((1, 1, 1))
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    matched = models.merge(adapters, method=sm.MatchEnergy(sm.mean()))
    spelled = {name: module.spelled for name, module in matched.run.stream.modules.items()}
    deltas = {spelled[name]: update.dense() for name, update in matched.updates()}
    merged = models.merge(adapters, loader, model, method=sm.ScaleByAnchors(sm.mean()))
    losses = merged.report.notes["losses_by_length"]
    assert losses[1.0] == pytest.approx(dense_loss(model, loader, deltas, sm.alignment), rel=1e-4)


def test_bad_numbers_and_no_anchors() -> None:
    for given in ({"price": -1.0}, {"price": math.nan}, {"trust": 1.5}, {"trust": math.nan}):
        with pytest.raises(MethodError, match="price"):
            sm.ScaleByAnchors(sm.mean(), **given)
    adapters, _ = models.adapters(models.clip(), [models.VISION_TARGETS] * 2)
    with pytest.raises(MethodError, match="ScaleByAnchors needs anchors"):
        models.merge(adapters, method=sm.ScaleByAnchors(sm.mean()))
