"""Coresets, k-means and chance against goldens and formulas."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import sapmerge as sm
from sapmerge.anchors.transport import (
    assign,
    divergence,
    nearest_plan,
    sinkhorn,
    squared_distances,
    transport_cost,
)
from tests.anchors import models

GOLDENS = Path(__file__).parents[1] / "goldens" / "federated"
CORESET = load_file(GOLDENS / "coreset.safetensors")
EVALUATION = load_file(GOLDENS / "evaluation.safetensors")
POOL = CORESET["pool"]


def reached(chosen: sm.anchors.Chosen, pool: Tensor = POOL, weighted: bool = True) -> float:
    """Sinkhorn's divergence at eps 0.5 between the chosen items and the pool."""
    rows, equal = list(chosen.indices), torch.full((len(pool),), 1 / len(pool), dtype=torch.float64)
    weights = torch.tensor(chosen.weights, dtype=torch.float64)
    if not weighted:
        weights = torch.full_like(weights, 1 / len(weights))
    return divergence(pool[rows], weights, pool, equal, 0.5)


def test_plans() -> None:
    items = POOL[CORESET["items3"].long()]
    costs, mass = squared_distances(POOL, items), torch.full((60,), 1 / 60, dtype=torch.float64)
    torch.testing.assert_close(nearest_plan(costs, 0.1), CORESET["plan_free.eps0.1"])
    found = sinkhorn(CORESET["weights3"], mass, costs.T, 0.5)
    torch.testing.assert_close(found, CORESET["sinkhorn.plan"], atol=1e-9, rtol=1e-6)
    cost = transport_cost(items, CORESET["weights3"], POOL, mass, 0.5)
    assert cost == pytest.approx(float(CORESET["ot.eps0.5"]), rel=1e-8)
    apart = divergence(items, CORESET["weights3"], POOL, mass, 0.5)
    assert apart == pytest.approx(float(CORESET["divergence.eps0.5"]), rel=1e-6)


def test_assignment_is_the_cheapest() -> None:
    generator = np.random.default_rng(0)
    for m, n in ((1, 1), (3, 3), (4, 9), (20, 60)):
        costs = generator.random((m, n))
        rows, columns = linear_sum_assignment(costs)
        found = assign(torch.from_numpy(costs))
        assert len(set(found)) == m
        assert costs[range(m), found].sum() == pytest.approx(costs[rows, columns].sum())


def test_coreset_reaches_the_golden() -> None:
    for count, golden in ((3, "3"), (5, "5")):
        items, weights = CORESET[f"items{golden}"], CORESET[f"weights{golden}"]
        wanted = reached(sm.anchors.Chosen(tuple(map(int, items)), tuple(map(float, weights))))
        found = sm.anchors.coreset(POOL, count)
        assert reached(found) <= 1.02 * wanted
        assert sum(found.weights) == pytest.approx(1)


def test_coreset_stands_for_the_pool_better_than_chance() -> None:
    """Three unequal clusters: the weights are their shares. Chance has more than twice the
    divergence on average.
    """
    found = sm.anchors.coreset(POOL, 3)
    assert found.weights == pytest.approx((2 / 3, 1 / 4, 1 / 12), abs=1e-3)
    drawn = [reached(sm.anchors.at_random(POOL, 3, seed)) for seed in range(20)]
    assert reached(found) < np.mean(drawn) / 2
    assert reached(found) < reached(found, weighted=False)


def test_balanced_coreset() -> None:
    found = sm.anchors.coreset(POOL, 3, balanced=True)
    assert found.weights == pytest.approx((1 / 3,) * 3)
    golden = sm.anchors.Chosen(tuple(map(int, CORESET["balanced.items3"])), (1 / 3,) * 3)
    assert reached(found) <= 1.02 * reached(golden)


def test_duplicates_stay_distinct_and_share_their_weight() -> None:
    pool = torch.tensor([[0.0, 0.0]] * 6 + [[1.0, 0.0]] * 2)
    found = sm.anchors.coreset(pool, 4)
    assert len(set(found.indices)) == 4
    at_zero = sum(w for row, w in zip(found.indices, found.weights) if row < 6)
    assert at_zero == pytest.approx(0.75)


def test_the_same_seed_chooses_the_same() -> None:
    for choose in (sm.anchors.coreset, sm.anchors.kmeans, sm.anchors.at_random):
        assert choose(POOL, 5, seed=3) == choose(POOL, 5, seed=3)
        everything = choose(POOL, 60)
        assert everything.indices == tuple(range(60))


def test_kmeans_is_the_best_of_all_pairs_of_clusters() -> None:
    """Eight points on a line: the two clusters of the least squares, found by trying all cuts."""
    x = torch.tensor([0.0, 0.2, 0.3, 0.9, 4.0, 4.1, 4.7, 5.0])[:, None].double()

    def within(cut: int) -> float:
        return sum(float((part - part.mean()).square().sum()) for part in (x[:cut], x[cut:]))

    cut = min(range(1, 8), key=within)
    found = sm.anchors.kmeans(x, 2)
    nearest = [int((part - part.mean()).abs().argmin()) for part in (x[:cut], x[cut:])]
    assert found.indices == (nearest[0], cut + nearest[1])
    assert found.weights == pytest.approx((cut / 8, 1 - cut / 8))


def test_features_and_batches_of_a_model() -> None:
    """The embeddings by hand, and the chosen pairs as anchors."""
    model, pool = models.clip(), models.pairs()
    found = sm.anchors.features(pool, model)
    with torch.no_grad():
        image = [
            model.get_image_features(pixel_values=b["pixel_values"]).pooler_output for b in pool
        ]
    unit = torch.nn.functional.normalize(torch.cat(image), dim=-1).double() / 2**0.5
    torch.testing.assert_close(found[:, : unit.shape[1]], unit)
    assert torch.allclose(found.norm(dim=1), torch.ones(len(found), dtype=torch.float64))

    chosen = sm.anchors.coreset(pool, 3, model)
    assert chosen == sm.anchors.coreset(found, 3)
    (batch,) = chosen.of(pool)
    everything = torch.cat([b["input_ids"] for b in pool])
    assert torch.equal(batch["input_ids"], everything[list(chosen.indices)])
    assert float(batch["anchor_weight"].mean()) == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 61, 1.5, "3"])
def test_a_count_that_cannot_be(count: Any) -> None:
    for choose in (sm.anchors.coreset, sm.anchors.kmeans, sm.anchors.at_random):
        with pytest.raises(sm.AnchorError, match="1 to 60"):
            choose(POOL, count)


def test_pools_that_cannot_be() -> None:
    with pytest.raises(sm.AnchorError, match="needs a model"):
        sm.anchors.coreset(models.pairs(), 2)
    with pytest.raises(sm.AnchorError, match="finite"):
        sm.anchors.coreset(torch.full((4, 2), torch.nan), 2)
    apart = [{"input_ids": torch.zeros(2, 5)}, {"input_ids": torch.zeros(2, 6)}]
    with pytest.raises(sm.AnchorError, match="from_pairs"):
        sm.anchors.Chosen((0, 3), (0.5, 0.5)).of(apart)


def test_mmd() -> None:
    x, y = EVALUATION["mmd.x"], EVALUATION["mmd.y"]
    assert sm.anchors.mmd(x, y).value == pytest.approx(float(EVALUATION["mmd.unbiased"]))
    biased = sm.anchors.mmd(x, y, unbiased=False, permutations=0)
    assert biased.value == pytest.approx(float(EVALUATION["mmd.biased"]))
    assert biased.per_width == pytest.approx(EVALUATION["mmd.per_width"].tolist())
    assert biased.p is None
    weighted = sm.anchors.mmd(x, y, weights=EVALUATION["mmd.w"], unbiased=False)
    assert weighted.value == pytest.approx(float(EVALUATION["mmd.weighted"]))


def test_mmd_is_its_definition() -> None:
    """Unbiased, with weights: means over pairs of different points, by loops."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=generator), torch.randn(4, 3, generator=generator) + 1
    w = torch.rand(5, generator=generator)

    def k(a: Tensor, b: Tensor) -> float:
        return 0.49 / (0.49 + float((a - b).square().sum()))

    inner = [(float(w[i] * w[j]), k(x[i], x[j])) for i, j in itertools.permutations(range(5), 2)]
    outer = [k(y[i], y[j]) for i, j in itertools.permutations(range(4), 2)]
    between = (
        sum(float(w[i]) * k(x[i], y[j]) for i in range(5) for j in range(4)) / float(w.sum()) / 4
    )
    value = sum(a * b for a, b in inner) / sum(a for a, _ in inner) + np.mean(outer) - 2 * between
    assert sm.anchors.mmd(x, y, (0.7,), w, permutations=0).value == pytest.approx(value, rel=1e-5)


def test_mmd_tells_apart_what_differs() -> None:
    """Of 200 samples of one distribution a twentieth has p <= 0.05, by the test's own guarantee; a
    shift has not.
    """
    generator = torch.Generator().manual_seed(0)
    low = 0
    for seed in range(200):
        x, y = torch.randn(10, 2, generator=generator), torch.randn(12, 2, generator=generator)
        low += sm.anchors.mmd(x, y, (1.0,), permutations=59, seed=seed).p <= 0.05  # type: ignore[operator]
    assert 2 <= low <= 20
    x, y = torch.randn(20, 2, generator=generator), torch.randn(30, 2, generator=generator) + 2
    assert sm.anchors.mmd(x, y, (1.0,)).p == pytest.approx(1 / 201)


def test_mmd_refuses() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(sm.AnchorError, match="at least 2 of each"):
        sm.anchors.mmd(x, x[:1])
    with pytest.raises(sm.AnchorError, match="widths"):
        sm.anchors.mmd(x, x, widths=(0.0,))
    with pytest.raises(sm.AnchorError, match="weights are 3 numbers"):
        sm.anchors.mmd(x, x, weights=torch.tensor([1.0, -1.0, 1.0]))
