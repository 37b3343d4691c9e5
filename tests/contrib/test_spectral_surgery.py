"""Spectral Surgery, on dense matrices."""

from __future__ import annotations

import pytest
import torch

import sapmerge as sm
from tests import conftest
from tests.conftest import error, make_layers


def test_it_is_the_formula() -> None:
    layers = make_layers((2, 4, 3), weights=(1.0, 0.5, 0.7))
    stream = conftest.Anchored(layers, conftest.LinearLoss(layers))
    prepared = sm.prepare(sm.spectral_surgery(share=0.5), stream)
    for layer in layers:
        G = sum(conftest._gradient(layer.name, layer.shape, half) for half in (1, 2)) / 2
        total = torch.zeros(layer.shape).double()
        for update, weight in zip(layer, layer.weights):
            U, s, Vh = torch.linalg.svd(update.dense(), full_matrices=False)
            r = update.rank
            U, s, Vh = U[:, :r], s[:r], Vh[:r]
            g = (U.T @ G @ Vh.T).diagonal().abs()
            high = g >= g.sort(descending=True).values[r // 2 - 1]
            new = torch.where(high, 1.25, 0.8) * s
            total += weight * U @ torch.diag(new * s.norm() / new.norm()) @ Vh
        assert error(prepared(layer).dense(), total / sum(layer.weights)) < 1e-10, layer.name


def test_what_the_loss_feels_grows() -> None:
    """Two directions of one size: the one with the gradient gets 1.25 / 0.8 times the other."""
    eye = torch.eye(4).double()
    layer = sm.Layer("l", [sm.LowRank(eye[:, :2] * torch.tensor([2.0, 1.9]), eye[:2])])

    class OneEntry(conftest.LinearLoss):
        def in_turn(self, layers, units):  # type: ignore[no-untyped-def]
            coordinates = units(layer.updates[0])
            G = torch.zeros(4, 4).double()
            G[1, 1] = -3.0
            pulled = {k: v[0] for k, v in coordinates.pull(conftest.View(G)).items()}

            class Seen:
                def moment(self, *arguments):  # type: ignore[no-untyped-def]
                    return pulled[arguments[2]], pulled[arguments[2]]

            yield [0], Seen()

    got = sm.on_one_layer(sm.spectral_surgery(), layer, OneEntry([layer]))
    ratio = got.dense()[1, 1] / got.dense()[0, 0]
    assert float(ratio) == pytest.approx(1.9 / 2.0 * 1.25 / 0.8)
    assert got.norm() == pytest.approx(layer.updates[0].norm())


def test_soft_mask() -> None:
    scores = torch.tensor([0.0, 3.0, 3.0, 1.0, 2.0])
    assert sm.Emphasize(0.4, 2.0, 0.5)(scores).tolist() == [0.5, 2.0, 2.0, 0.5, 0.5]
    assert sm.Emphasize(0.1)(torch.ones(3)).tolist() == pytest.approx([1.25, 0.8, 0.8])
    for arguments in ({"share": 0.0}, {"share": 20}, {"up": 0.5}, {"down": -1.0}):
        with pytest.raises(sm.MethodError):
            sm.spectral_surgery(**arguments)
