"""STAR and RAM, on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sapmerge as sm
from tests.conftest import error, make_layers


@pytest.mark.parametrize("share", [0.2, 0.4, 0.75, 1.0])
def test_star_is_the_formula(share: float) -> None:
    for layer in make_layers((2, 5, 3), weights=(1.0, 0.5, 0.7)):
        total = np.zeros(layer.shape)
        for update, weight in zip(layer, layer.weights):
            U, s, Vh = np.linalg.svd(update.dense().numpy(), full_matrices=False)
            kept = next(k for k in range(1, len(s) + 1) if s[:k].sum() >= share * s.sum() - 1e-12)
            factor = s.sum() / s[:kept].sum()
            total += weight * factor * (U[:, :kept] * s[:kept]) @ Vh[:kept]
        got = sm.on_one_layer(sm.star(share), layer)
        assert error(got.dense(), torch.tensor(total / sum(layer.weights))) < 1e-10


def test_star_keeps_the_nuclear_norm() -> None:
    (layer,) = make_layers((5,), {"l": (9, 8)})
    got = sm.on_one_layer(sm.star(0.4), layer)
    sums = [float(np.linalg.norm(x.dense().numpy(), "nuc")) for x in (got, layer.updates[0])]
    assert sums[0] == pytest.approx(sums[1])
    assert np.linalg.matrix_rank(got.dense().numpy()) < 5


def test_the_fewest_that_reach_a_share() -> None:
    scores = torch.tensor([1.0, 4.0, 3.0, 2.0])
    kept = {share: sm.TopSum(share)(scores).tolist() for share in (0.4, 0.41, 0.7, 1.0)}
    assert kept == {
        0.4: [False, True, False, False],
        0.41: [False, True, True, False],
        0.7: [False, True, True, False],
        1.0: [True] * 4,
    }
    assert sm.TopSum(0.5)(torch.zeros(0)).tolist() == []
    assert sm.TopSum(0.5)(torch.zeros(3)).sum() == 1
    with pytest.raises(sm.MethodError, match=r"for 40 % write 0.4"):
        sm.star(40)


def test_ram_averages_what_is_shared_alone() -> None:
    one = torch.tensor([[2.0, 4.0, 0.0, 1e-6]])
    other = torch.tensor([[4.0, 0.0, 0.0, 3.0]])
    layer = sm.Layer("l", [sm.Dense(one), sm.Dense(other)])
    found = sm.on_one_layer(sm.ram(), layer).dense()
    assert found.tolist() == [[3.0, 4.0, 0.0, 3.0]]
    assert sm.on_one_layer(sm.ram(5.0), layer).dense().tolist() == [[0.0] * 4]


def test_ram_on_lora_is_the_mean() -> None:
    """All adapters change all entries."""
    for layer in make_layers((2, 4, 3), weights=(1.0, 0.5, 0.7)):
        got, mean = (sm.on_one_layer(make(), layer).dense() for make in (sm.ram, sm.mean))
        assert error(got, mean) < 1e-12
