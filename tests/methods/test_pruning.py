"""DELLA, Breadcrumbs, SCE, consensus, PCB and EMR against formulas written out in numpy,
and their masks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import sapmerge as sm
from sapmerge.core.selection import kth_largest
from tests.conftest import changed, dense, error, make_layers, run
from tests.methods.golden_entries import input_layers

GOLDENS = Path(__file__).parents[1] / "goldens"
WEIGHTS = [(1.0, 1.0, 1.0), (1.0, 0.5, 0.7), (1.0, -0.5, 0.7)]
every_weight = pytest.mark.parametrize("weights", WEIGHTS)


def count(density: float, total: int) -> int:
    return min(total, max(1, math.floor(density * total + 1e-9)))


def matches(got: sm.Update, wanted: np.ndarray, tolerance: float = 1e-10) -> None:
    assert error(got.dense(), torch.from_numpy(wanted)) < tolerance


# --- masks

scores = st.integers(0, 3).flatmap(
    lambda seed: st.tuples(st.integers(1, 5), st.integers(1, 9)).map(
        lambda shape: torch.randint(
            0, 6, shape, generator=torch.Generator().manual_seed(seed)
        ).double()
    )
)


@given(scores, st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_per_row_keeps_the_count_rule_in_every_row(values: Tensor, density: float) -> None:
    mask = sm.PerRow(density)(values)
    assert mask.sum(1).tolist() == [count(density, values.shape[1])] * len(values)
    for row, keep in zip(values, mask):
        assert torch.equal(sm.TopFraction(density)(row), keep)


@given(scores, st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_n_to_m_keeps_n_of_every_m(values: Tensor, n: int, more: int) -> None:
    mask = sm.NtoM(n, n + more)(values)
    for group, keep in zip(values.split(n + more, 1), mask.split(n + more, 1)):
        size = min(n, group.shape[1])
        assert (keep.sum(1) == size).all()
        kept = torch.where(keep, group, math.inf).amin(1)
        assert (torch.where(keep, -math.inf, group).amax(1) <= kept).all()


@given(scores, st.floats(0.01, 1.0), st.floats(0, 0.9), st.sampled_from(["row", "layer"]))
@settings(max_examples=100, deadline=None)
def test_drop_outliers_keeps_the_next_largest(
    values: Tensor, density: float, gamma: float, scope: str
) -> None:
    rows = values if scope == "row" else values.reshape(1, -1)
    total = rows.shape[1]
    dropped, kept = math.floor(gamma * total + 1e-9), count(density, total)
    for first, start, stop in (
        ("drop", dropped, dropped + kept),
        ("keep", min(dropped, kept - 1), kept),
    ):
        mask = sm.DropOutliers(density, gamma, scope, first)(values).reshape(rows.shape)
        for row, keep in zip(rows, mask):
            order = np.argsort(-row.numpy(), kind="stable")[start:stop]
            assert sorted(order.tolist()) == keep.nonzero().flatten().tolist()
            assert keep.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sm.PerRow(20), "for 20 % write 0.2"),
        (lambda: sm.NtoM(4, 2), r"NtoM\(2, 4\)"),
        (lambda: sm.NtoM(0, 4), "n=0"),
        (lambda: sm.DropOutliers(0.5, 1.0), r"in \[0, 1\).*for 1 % write 0.01"),
        (lambda: sm.DropOutliers(0.5, scope="tensor"), "'layer' or 'row'"),
        (lambda: sm.DropOutliers(0.5, first="top"), "'drop' or 'keep'"),
        (lambda: sm.breadcrumbs(10), "for 10 % write 0.1"),
        (lambda: sm.RankChance(0.05, 0.14), "write a window below 0.1"),
        (lambda: sm.RankChance(0.95, 0.14), "write a window below 0.1"),
        (lambda: sm.RankChance(0.5, -0.1), "at least 0"),
        (lambda: sm.della(scope="column"), "'row' or 'layer'"),
        (lambda: sm.sce(10), "for 10 % write 0.1"),
        (lambda: sm.consensus_ta(-1.0), "lambda"),
        (lambda: sm.consensus_ta(count=0), "at least 1"),
        (lambda: sm.pcb(5), "for 5 % write 0.05"),
        (lambda: sm.pcb(clip=0.5), r"in \[0, 0.5\)"),
    ],
)
def test_wrong_values_say_what_to_write(make, message: str) -> None:
    with pytest.raises(sm.MethodError, match=message):
        make()


@pytest.mark.parametrize(
    "mask", [sm.PerRow(0.5), sm.NtoM(2, 4), sm.DropOutliers(0.5, 0.1), sm.Reciprocal()]
)
def test_masks_read_back_from_their_recipe_and_take_nothing(mask: sm.MaskBuilder) -> None:
    assert sm.parse(repr(mask)) == mask
    assert mask(torch.zeros(0, 4)).shape == (0, 4)
    assert mask(torch.zeros(3, 0)).shape == (3, 0)


# --- DELLA


def test_della_is_unbiased_and_prefers_the_large() -> None:
    layer = make_layers([3], {"l": (6, 5)})[0]
    whole, total, kept, draws = (
        layer.updates[0].dense(),
        torch.zeros(6, 5).double(),
        torch.zeros(6, 5),
        400,
    )
    chance = sm.RankChance(0.5, 0.6)(whole, None)
    for seed in range(draws):
        pruned = sm.della(0.5, 0.6, seed).steps[0](layer).updates[0].dense()
        torch.testing.assert_close(pruned[pruned != 0], (whole / chance)[pruned != 0])
        total, kept = total + pruned, kept + (pruned != 0)
    deviation = whole.abs() * ((1 - chance) / chance / draws).sqrt()
    assert ((total / draws - whole).abs() < 5 * deviation).all()
    assert ((kept / draws - chance).abs() < 5 * (chance * (1 - chance) / draws).sqrt()).all()
    assert chance.mean() == pytest.approx(0.5)
    assert chance.amin() == pytest.approx(0.2)
    assert chance.amax() == pytest.approx(0.8)


@pytest.mark.parametrize(
    "chance", [sm.RankChance(0.6), sm.RankChance(0.6, scope="layer"), sm.MagnitudeChance(0.6)]
)
def test_chances_of_one_value_and_of_equal_ones(chance: sm.Scorer) -> None:
    """mergekit's formula is 0 / 0 where a row has one entry."""
    assert chance(torch.ones(1, 1), None).item() == pytest.approx(0.6)
    equal = chance(torch.ones(3, 4), None)
    assert torch.isfinite(equal).all()
    assert equal.mean() == pytest.approx(0.6)
    assert chance(torch.ones(0, 4), None).shape == (0, 4)
    assert sm.parse(repr(sm.Flip(chance, 3))) == sm.Flip(chance, 3)


# --- SCE, consensus and the disjoint maximum


@every_weight
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_is_the_formula(weights: tuple[float, ...], density: float) -> None:
    for layer in make_layers([2, 4, 3], weights=weights):
        w = np.asarray(weights)
        D = np.stack([u.dense().numpy() for u in layer]) * np.sign(w)[:, None, None]
        p = np.abs(w) / np.abs(w).sum()
        variance = (p[:, None, None] * (D - np.tensordot(p, D, 1)) ** 2).sum(0)
        keep = np.zeros(variance.size, dtype=bool)
        keep[np.argsort(-variance.ravel(), kind="stable")[: count(density, variance.size)]] = True
        D = D * keep.reshape(variance.shape)
        energy = p * (D**2).sum((1, 2))
        erase = np.sign(D) == np.sign(np.tensordot(p, D, 1))
        e = energy[:, None, None] * (erase & (D != 0))
        wanted = np.where(e.sum(0) > 0, (e * D).sum(0) / np.where(e.sum(0) > 0, e.sum(0), 1), 0)
        matches(sm.sce(density)(layer), wanted)


def test_sce_of_copies_keeps_them() -> None:
    """There is no variance to select by; mergekit selects nothing and returns zero."""
    layer = make_layers([3], {"l": (6, 5)})[0]
    x = layer.updates[0]
    for updates in ((x,), (x, x), (x, x, x)):
        matches(sm.sce(0.1)(sm.Layer("l", updates)), x.dense().numpy(), 1e-12)


@every_weight
def test_consensus_is_the_formula(weights: tuple[float, ...]) -> None:
    for layer in make_layers([2, 4, 3], weights=weights):
        D = np.stack([u.dense().numpy() * w for u, w in zip(layer, weights)])
        total = D.sum(0)
        for ratio in (0.2, 0.6, 1.0):
            votes = (np.abs(D) > ratio * np.abs(total - D)).sum(0)
            for needed in (1, 2, 3, 9):
                wanted = total * (votes >= min(needed, 3))
                notes: dict[str, float] = {}
                got = sm.consensus_ta(ratio, needed)(changed(layer, record=notes.__setitem__))
                matches(got, wanted)
                assert notes["consensus_density"] == pytest.approx((votes >= min(needed, 3)).mean())


TIES = [
    e
    for e in json.loads((GOLDENS / "index.json").read_text())["entries"]
    if e["key"].startswith("ties/ties/") and "dis-max_" in e["key"]
]


@pytest.mark.parametrize("entry", TIES, ids=lambda entry: entry["key"])
def test_disjoint_max_is_that_of_the_ties_code(entry: dict) -> None:
    outputs = load_file(GOLDENS / entry["file"])
    layers = input_layers(entry["set"])
    density = (int(entry["hyperparameters"]["K"] / 100 * 768) + 1) / 768
    prune = sm.Prune(sm.Magnitude(), sm.TopFraction(min(1.0, density), scope="adapter"))
    for name, update in run(sm.Chain(prune, sm.ElectSign(), sm.DisjointMax()), layers).items():
        assert error(update.dense(), outputs[entry["outputs"][f"{name}/dW"]]) < 1e-5


# --- PCB


def pcb(
    D: np.ndarray, density: float, clip: float, inter: str, weights: tuple[float, ...]
) -> np.ndarray:
    """D (K, n), all layers of each adapter in one vector; signs of the weights in D."""
    K, n = D.shape
    ordered = np.sort(np.abs(D), 1)
    size = np.clip(np.abs(D), ordered[:, [int(n * clip)]], ordered[:, [int(n * (1 - clip) - 1)]])
    low, high = size.min(1, keepdims=True), size.max(1, keepdims=True)
    normal = (size - low) / (high - low)
    signed = np.sign(D) * normal
    between = {
        "TanhNormalised": sum(np.tanh(signed * signed[j]) for j in range(K)),
        "TanhRaw": np.tanh(D * D.sum(0)),
        "TanhMixed": np.tanh(D * signed.sum(0)),
    }[inter]
    score = np.exp(K * normal**2) * between
    cut = np.sort(score, 1)[:, [n - count(density, n) - 1]]
    scale = np.maximum(score, cut)
    scale = (scale - cut) / (scale.max(1, keepdims=True) - cut)
    w = np.abs(weights)[:, None]
    mass = (w * scale).sum(0)
    return np.where(
        mass > 0, (w * scale * np.sign(D) * size).sum(0) / np.where(mass > 0, mass, 1), 0
    )


@every_weight
@pytest.mark.parametrize("inter", [sm.TanhNormalised(), sm.TanhRaw(), sm.TanhMixed()])
@pytest.mark.parametrize(("density", "clip"), [(0.05, 0.01), (0.3, 0.1), (0.6, 0.0)])
def test_pcb_is_the_formula(
    weights: tuple[float, ...], inter: sm.Inter, density: float, clip: float
) -> None:
    layers = make_layers([2, 4, 3], weights=weights)
    flat = np.concatenate(
        [np.stack([u.dense().numpy().ravel() for u in layer]) for layer in layers], 1
    )
    wanted = pcb(flat * np.sign(weights)[:, None], density, clip, type(inter).__name__, weights)
    merged = run(sm.pcb(density, clip, inter=inter), layers)
    matches(sm.Dense(torch.cat([u.dense().flatten() for u in merged.values()])[None]), wanted[None])


def test_pcb_of_a_zero_adapter_and_without_a_pre_pass() -> None:
    layers = make_layers([2, 3], {"l": (7, 8)})
    zero = sm.LowRank(layers[0].updates[0].B * 0, layers[0].updates[0].A)
    more = [sm.Layer("l", (*layers[0].updates, zero))]
    wanted = dense(run(sm.pcb(0.3), layers))["l"]
    assert error(dense(run(sm.pcb(0.3), more))["l"], wanted) < 1e-12
    assert torch.equal(sm.on_one_layer(sm.pcb(0.3), layers[0]).dense(), wanted)


@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0, 1),
    st.floats(-8, 8),
)
@settings(max_examples=60, deadline=None)
def test_kth_largest_is_exact(seed: int, dtype: torch.dtype, where: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(60, generator=generator, dtype=torch.float64) * 10**scale
    drawn[:20] = drawn[20:40] * (1 + 1e-12)  # equal in float32, not in float64
    drawn = drawn.to(dtype)
    place = max(1, round(where * 60))

    def values() -> Iterator[tuple[str, Tensor]]:
        yield "a", drawn[:17].view(1, 17)
        yield "b", -drawn[:5]
        yield "a", drawn[17:]

    found = kth_largest(values, lambda total: min(place, total))
    assert found["a"] == float(drawn.sort(descending=True).values[place - 1])
    assert found["b"] == float((-drawn[:5]).sort(descending=True).values[min(place, 5) - 1])


# --- EMR


@every_weight
def test_emr_is_the_formula(weights: tuple[float, ...]) -> None:
    layers = make_layers([2, 4, 3], weights=weights)
    method = sm.prepare(sm.emr(), layers)
    above, below, shares = np.zeros(3), np.zeros(3), {}
    for layer in layers:
        D = np.stack([u.dense().numpy() for u in layer])
        voted = D * np.sign(weights)[:, None, None]
        sign = np.sign((np.asarray(weights)[:, None, None] * D).sum(0))
        unified = sign * (np.abs(voted) * (np.sign(voted) == sign)).max(0)
        matches(method(layer), unified)
        masks = D * unified > 0
        above += np.abs(D).mean((1, 2))
        below += np.abs(unified * masks).mean((1, 2))
        shares[layer.name] = masks.mean((1, 2))
    for layer in layers:
        notes: dict[str, dict[str, float]] = {}
        method(changed(layer, record=notes.__setitem__))
        np.testing.assert_allclose(list(notes["emr_scalar"].values()), above / below, rtol=1e-12)
        np.testing.assert_allclose(list(notes["emr_mask"].values()), shares[layer.name], rtol=1e-12)


def test_emr_of_one_and_of_zero() -> None:
    layers = make_layers([3, 0], {"l": (6, 5)})
    notes: dict[str, dict[str, float]] = {}
    merged = sm.prepare(sm.emr(), layers)(replace(layers[0], record=notes.__setitem__))
    matches(merged, layers[0].updates[0].dense().numpy())
    assert notes == {
        "emr_scalar": {"a0": pytest.approx(1.0), "a1": 1.0},
        "emr_mask": {"a0": 1.0, "a1": 0.0},
    }
    assert (
        error(
            sm.Unify.restore(merged, layers[0].updates[0], 1.0).dense(),
            layers[0].updates[0].dense(),
        )
        < 1e-12
    )
