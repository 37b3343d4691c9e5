"""SCORE: the formula on dense matrices, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sapmerge as sm
from tests.conftest import error, make_layers

SHAPES = {"wide": (14, 20), "tall": (20, 14)}


def dense_score(layer: sm.Layer, width: float) -> np.ndarray:
    """With full singular value decompositions."""
    Ds = [u.dense().double().numpy() for u in layer]
    T = len(Ds)
    k = min(layer.shape) // T
    svds = [np.linalg.svd(D, full_matrices=False) for D in Ds]
    ranks = [min(k, np.linalg.matrix_rank(D)) for D in Ds]

    def polar(X: np.ndarray) -> np.ndarray:
        U, _, Vh = np.linalg.svd(X, full_matrices=False)
        return U @ Vh

    P = polar(np.concatenate([U[:, :r] for (U, _, _), r in zip(svds, ranks)], 1))
    Q = polar(np.concatenate([Vh[:r].T for (_, _, Vh), r in zip(svds, ranks)], 1))
    total = np.zeros((P.shape[1], Q.shape[1]))
    for D, weight in zip(Ds, layer.weights):
        M = P.T @ D @ Q
        off = ~np.eye(len(M), dtype=bool)
        M[off & (np.abs(M) > width * np.sqrt(np.square(M[off]).mean()) / T)] = 0
        total += weight * M
    return P @ total @ Q.T


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 4, 3), (7, 7)])
@pytest.mark.parametrize("width", [1.96, 0.5, float("inf")])
def test_it_is_the_formula(ranks: tuple[int, ...], width: float) -> None:
    weights = (1.0, 0.5, -0.7)[: len(ranks)]
    for layer in make_layers(ranks, SHAPES, weights=weights):
        merged = sm.score(width)(layer)
        assert isinstance(merged, sm.LowRank)
        assert merged.rank <= min(sum(ranks), 14)
        assert error(merged.dense(), torch.tensor(dense_score(layer, width))) < 1e-10


def test_without_trimming_it_is_the_sum_where_all_components_fit() -> None:
    for layer in make_layers((3, 4, 3), SHAPES):
        whole = sm.task_arithmetic()(layer).dense()
        assert error(sm.score(float("inf"))(layer).dense(), whole) < 1e-10
        assert error(sm.score()(layer).dense(), whole) > 1e-2


def test_dense_updates_and_low_rank_updates_are_one_thing() -> None:
    layer = make_layers((3, 4, 3), SHAPES)[0]
    other = layer.with_updates([sm.Dense(u.dense()) for u in layer])
    assert error(sm.score()(other).dense(), sm.score()(layer).dense()) < 1e-9


def test_wrong_arguments_are_named() -> None:
    for make in (lambda: sm.score(width=-1.0), lambda: sm.score(rank=0)):
        with pytest.raises(sm.MethodError):
            make()
    assert repr(sm.parse(repr(sm.score()))) == repr(sm.score())
