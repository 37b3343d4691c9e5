"""Pico: the formula on dense matrices, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sapmerge as sm
from tests.conftest import error, make_layers, run


def damped(layer: sm.Layer) -> list[np.ndarray]:
    Ds = [u.dense().double().numpy() for u in layer]
    U, s, _ = np.linalg.svd(np.concatenate(Ds, 1), full_matrices=False)
    a = 1 / (1 + (len(Ds) - 1) * s**2 / (s**2).sum())
    return [D + U @ np.diag(a - 1) @ U.T @ D for D in Ds]


@pytest.mark.parametrize("ranks", [(2, 4, 3), (1, 1), (9, 9, 9)])
def test_it_is_the_formula(ranks: tuple[int, ...]) -> None:
    for layer in make_layers(ranks, {"wide": (9, 20), "tall": (20, 9)}):
        for got, wanted in zip(sm.DampShared()(layer), damped(layer)):
            assert error(got.dense(), torch.tensor(wanted)) < 1e-10


def test_what_is_shared_by_all_is_damped_most() -> None:
    """K copies of one direction become 1 / K of it; orthogonal ones of equal size are all alike."""
    column, row = torch.eye(6).double()[:, :1], torch.eye(5).double()[:1]
    same = sm.Layer("l", tuple(sm.LowRank(column, row * k) for k in (1, 1, 1)))
    assert torch.allclose(sm.DampShared()(same).updates[0].dense(), column @ row / 3)
    apart = sm.Layer(
        "l", tuple(sm.LowRank(torch.eye(6).double()[:, k : k + 1], row) for k in range(3))
    )
    for update in sm.DampShared()(apart):
        assert update.norm() == pytest.approx(1 / (1 + 2 / 3))


def test_the_norm_comes_back() -> None:
    layers = make_layers((2, 4, 3))
    merged = run(sm.pico(), layers)
    size = sum(u.norm() ** 2 for u in merged.values()) ** 0.5
    inputs = [sum(layer.updates[k].norm() ** 2 for layer in layers) ** 0.5 for k in range(3)]
    assert size == pytest.approx(sum(inputs) / 3, rel=1e-9)
    plain = [np.mean(damped(layer), 0) for layer in layers]
    factor = size / sum(float(np.square(D).sum()) for D in plain) ** 0.5
    for layer, D in zip(layers, plain):
        assert error(merged[layer.name].dense(), torch.tensor(D * factor)) < 1e-9


def test_the_recipe_is_read_back() -> None:
    for method in (sm.pico(), sm.pico(sm.ties(0.3))):
        assert repr(sm.parse(repr(method))) == repr(method)
