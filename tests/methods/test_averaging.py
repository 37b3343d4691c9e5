"""The averages of whole updates and factors, against formulas written out in numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sapmerge as sm
from tests.conftest import changed, dense, error, low_rank, make_layers, run

WEIGHTS = [[1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.7, 2.0], [1.0, -0.5, 0.7, 2.0]]
RANKS = (2, 4, 3, 1)
every_weight = pytest.mark.parametrize("weights", WEIGHTS)
GOLDENS = Path(__file__).parents[1] / "goldens"


def stack(layer: sm.Layer) -> tuple[np.ndarray, np.ndarray]:
    """The updates times the signs of their weights, and the shares of |w|."""
    w = np.asarray(layer.weights)
    return np.stack([u.dense().numpy() * s for u, s in zip(layer, np.sign(w))]), np.abs(w) / np.abs(
        w
    ).sum()


def matches(got: sm.Update, wanted: np.ndarray, tolerance: float = 1e-10) -> None:
    assert error(got.dense(), torch.from_numpy(wanted)) < tolerance


# --- slerp


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 0.8], [3.0, 1.0]])
def test_slerp_is_the_formula(weights: list[float]) -> None:
    for layer in make_layers((2, 3), weights=weights):
        (x, y), t = (u.dense().numpy() for u in layer), weights[1] / sum(weights)
        angle = math.acos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        wanted = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
        got = sm.on_one_layer(sm.slerp(), layer)
        matches(got, wanted)
        assert isinstance(got, sm.LowRank)
        swapped = changed(layer, updates=layer.updates[::-1], weights=layer.weights[::-1])
        matches(sm.slerp()(swapped), wanted)


def test_slerp_keeps_the_norm_of_equal_norms() -> None:
    layer = make_layers((2, 3), {"l": (8, 9)})[0]
    unit = changed(layer, updates=tuple(u.scaled(1 / u.norm()) for u in layer))
    assert sm.on_one_layer(sm.slerp(), unit).norm() == pytest.approx(1.0)
    assert sm.mean()(unit).norm() < 0.9


def test_slerp_without_an_arc_is_linear() -> None:
    layer = make_layers((2, 3), {"l": (8, 9)}, weights=[1.0, 3.0])[0]
    x = layer.updates[0]
    for other, wanted in (
        (x, 1.0),
        (x.scaled(-1), -0.5),
        (sm.absent(x.shape, x.A), 0.25),
        (x.scaled(1e-9), None),
    ):
        got = sm.slerp()(changed(layer, updates=(x, other)))
        if wanted is not None:
            matches(got, x.dense().numpy() * wanted, 1e-7)
        assert torch.isfinite(got.dense()).all()


def test_slerp_takes_two() -> None:
    layers = make_layers((2, 3, 4))
    with pytest.raises(sm.MethodError, match=r"two adapters; got 3.*mean\(\)"):
        sm.prepare(sm.slerp(), layers)
    two = [changed(layer, weights=(1.0, 0.0, 2.0)) for layer in layers]
    others = [
        changed(x, updates=x.updates[::2], adapters=("a", "c"), weights=(1.0, 2.0), digests=())
        for x in layers
    ]
    for name, matrix in dense(run(sm.slerp(), two)).items():
        assert torch.equal(matrix, dense(run(sm.slerp(), others))[name])


# --- A and B apart


def test_factor_average_is_fedavg_on_the_factors() -> None:
    layers = make_layers((3, 3, 3), weights=[1.0, 0.5, 0.7])
    with pytest.warns(sm.SapmergeWarning, match="not the average of the updates"):
        method = sm.prepare(sm.factor_average(), layers)
    for layer in layers:
        p = np.asarray(layer.weights) / sum(layer.weights)
        B = sum(share * u.B.numpy() for share, u in zip(p, layer))
        A = sum(share * u.A.numpy() for share, u in zip(p, layer))
        matches(method(layer), B @ A)
        assert method(layer).rank == 3
        assert error(method(layer).dense(), sm.mean()(layer).dense()) > 0.3


def test_factor_average_of_absent_and_zero_weights() -> None:
    layer = make_layers((3, 0, 3), {"l": (5, 6)})[0]
    x, _, y = layer.updates
    wanted = (x.B + y.B) @ (x.A + y.A) / 9
    matches(sm.factor_average()(layer), wanted.numpy())
    with pytest.raises(sm.MethodError, match=r"sum to zero.*FactorSum"):
        sm.factor_average()(changed(layer, weights=(1.0, 0.0, -1.0)))


@pytest.mark.parametrize("merger", [sm.FactorMean(), sm.FactorSum()])
def test_factors_of_unequal_rank_are_refused(merger: sm.Merger) -> None:
    with pytest.raises(sm.MethodError, match=r"a0: 2, a1: 4, a2: 3; use mean\(\)"):
        sm.prepare(merger, make_layers((2, 4, 3)))
    layer = make_layers((2, 2), {"l": (5, 6)})[0]
    with pytest.raises(sm.MethodError, match="dense"):
        merger(layer.with_updates([layer.updates[0], sm.Dense(layer.updates[1].dense())]))


PEFT = [
    e
    for e in json.loads((GOLDENS / "index.json").read_text())["entries"]
    if e["key"].startswith("peft/linear/")
]


@pytest.mark.parametrize("entry", PEFT, ids=lambda entry: entry["key"])
def test_factor_sum_is_what_peft_calls_linear(entry: dict) -> None:
    """PEFT splits alpha / r evenly between A and B; so do the factors given here."""
    p, inputs, outputs = (
        entry["hyperparameters"],
        load_file(GOLDENS / "inputs.safetensors"),
        load_file(GOLDENS / entry["file"]),
    )
    for layer in ("layers.0.q_proj", "layers.1.v_proj"):
        updates = []
        for k, (alpha, rank) in enumerate(zip(p["lora_alpha"], p["ranks"])):
            A, B = (
                inputs[f"{entry['set']}/t{k}/{layer}/{part}"].double() * math.sqrt(alpha / rank)
                for part in "AB"
            )
            updates.append(sm.LowRank(B, A))
        merged = sm.Chain(sm.FactorSum())(
            sm.Layer(layer, tuple(updates), weights=tuple(p["weights"]))
        )
        assert error(merged.dense(), outputs[entry["outputs"][f"{layer}/dW"]]) < 1e-5


# --- Model Stock


@every_weight
def test_model_stock_is_the_formula(weights: list[float]) -> None:
    for layer in make_layers(RANKS, weights=weights):
        D, p = stack(layer)
        unit = D / np.linalg.norm(D, axis=(1, 2), keepdims=True)
        pairs = [(i, j) for i in range(4) for j in range(i)]
        c = sum(p[i] * p[j] * (unit[i] * unit[j]).sum() for i, j in pairs) / sum(
            p[i] * p[j] for i, j in pairs
        )
        N = 1 / (p**2).sum()
        got = sm.model_stock()(layer)
        matches(got, N * c / (1 + (N - 1) * c) * np.tensordot(p, D, 1))
        assert isinstance(got, sm.LowRank)
        rows = np.stack(
            [
                sm.model_stock()(
                    changed(layer, updates=tuple(sm.Dense(u.dense()[i : i + 1]) for u in layer))
                ).dense()[0]
                for i in range(layer.shape[0])
            ]
        )
        matches(sm.model_stock(scope="row")(layer), rows)


def test_model_stock_of_copies_and_strangers() -> None:
    layer = make_layers((2, 2), {"l": (6, 6)})[0]
    x = layer.updates[0]
    matches(sm.model_stock()(changed(layer, updates=(x, x))), x.dense().numpy())
    for other in (x.scaled(-1), sm.absent(x.shape, x.A)):
        assert not sm.model_stock()(changed(layer, updates=(x, other))).dense().any()
    with pytest.raises(sm.MethodError, match="'layer' or 'row'"):
        sm.model_stock(scope="tensor")


# --- medians


def objective(x: list[np.ndarray], layers: list[sm.Layer]) -> float:
    """sum_k w_k ||x - D_k|| over all layers together."""
    squares = sum(((one[None] - stack(layer)[0]) ** 2).sum((1, 2)) for one, layer in zip(x, layers))
    return float((np.abs(layers[0].weights) * np.sqrt(squares)).sum())


@every_weight
@pytest.mark.parametrize("scope", ["adapter", "layer"])
def test_geometric_median_is_the_minimum(weights: list[float], scope: str) -> None:
    layers = make_layers(RANKS, weights=weights)
    merged = run(sm.geometric_median(scope), layers)
    assert all(isinstance(update, sm.LowRank) for update in merged.values())
    groups = [layers] if scope == "adapter" else [[layer] for layer in layers]
    for group in groups:
        best = [merged[layer.name].dense().numpy() for layer in group]
        value, rng = objective(best, group), np.random.default_rng(0)
        for size in (1e-1, 1e-3):
            for _ in range(20):
                away = [x + size * rng.standard_normal(x.shape) for x in best]
                assert objective(away, group) > value
        for k in range(4):
            there = [stack(layer)[0][k] for layer in group]
            between = [0.99 * x + 0.01 * y for x, y in zip(best, there)]
            assert objective(between, group) >= value * (1 - 1e-12)


def test_geometric_median_at_an_adapter_and_between_two() -> None:
    layers = make_layers((2, 3, 2), {"l": (6, 7)})
    heavy = [changed(layer, weights=(1.0, 5.0, 1.0)) for layer in layers]
    matches(run(sm.geometric_median(), heavy)["l"], layers[0].updates[1].dense().numpy(), 1e-15)
    two = make_layers((2, 3), {"l": (6, 7)})
    matches(run(sm.geometric_median(), two)["l"], sm.mean()(two[0]).dense().numpy(), 1e-15)
    twice = [
        changed(x, updates=(*x.updates, x.updates[0]), adapters=(), weights=(), digests=())
        for x in two
    ]
    matches(run(sm.geometric_median(), twice)["l"], two[0].updates[0].dense().numpy(), 1e-12)


@pytest.mark.parametrize(
    "method", [sm.geometric_median(), sm.coordinate_median(), sm.trimmed_mean(0.34), sm.krum()]
)
def test_one_bad_adapter_of_five_does_not_move_the_result_far(method: sm.Method) -> None:
    centre = low_rank((8, 9), 3, 1)
    near = [sm.Dense(centre.dense() + 0.1 * low_rank((8, 9), 8, 10 + k).dense()) for k in range(4)]
    bad = sm.Dense(1e6 * low_rank((8, 9), 8, 99).dense())
    layer = sm.Layer("l", (*near, bad))
    assert error(run(method, [layer])["l"].dense(), centre.dense()) < 0.3
    assert error(sm.mean()(layer).dense(), centre.dense()) > 1e4


def test_coordinate_median_and_trimmed_mean_are_numpy() -> None:
    for ranks in ((2, 4, 3), (2, 4, 3, 1), (2, 3, 0, 4, 2)):
        for layer in make_layers(ranks):
            D, _ = stack(layer)
            matches(sm.coordinate_median()(layer), np.median(D, 0))
            for trim in (0.0, 0.2, 0.25, 0.34, 0.49):
                cut = math.floor(trim * len(D) + 1e-9)
                wanted = np.sort(D, 0)[cut : len(D) - cut].mean(0)
                matches(sm.trimmed_mean(trim)(layer), wanted)


@pytest.mark.parametrize("method", [sm.coordinate_median(), sm.geometric_median()])
def test_a_weight_of_two_is_two_votes(method: sm.Method) -> None:
    layers = make_layers(RANKS, weights=[2.0, 1.0, -1.0, 1.0])
    twice = []
    for x in layers:
        updates = (x.updates[0], *x.updates[:2], x.updates[2].scaled(-1), x.updates[3])
        twice.append(changed(x, updates=updates, adapters=(), weights=(), digests=()))
    for name, matrix in dense(run(method, twice)).items():
        assert error(dense(run(method, layers))[name], matrix) < 1e-9


def test_trimmed_mean_reports_what_it_trims() -> None:
    layer, notes = make_layers((2, 2, 2, 2, 2), {"l": (3, 3)})[0], {}
    sm.trimmed_mean()(changed(layer, record=notes.__setitem__))
    assert notes == {"trimmed": pytest.approx(0.4)}
    for wrong in (0.5, -0.1, 20):
        with pytest.raises(sm.MethodError, match=r"\[0, 0.5\)"):
            sm.trimmed_mean(wrong)


@pytest.mark.parametrize(
    "method", [sm.geometric_median(), sm.krum(), sm.model_stock(), sm.coordinate_median()]
)
def test_no_weights_at_all_is_an_error(method: sm.Method) -> None:
    with pytest.raises(sm.MethodError, match="all zero"):
        run(method, make_layers((2, 2), weights=[0.0, 0.0]))


# --- Krum


def krum(layers: list[sm.Layer], f: int, select: int) -> list[np.ndarray]:
    """The paper, over all layers together: scores from the K - f - 2 nearest,
    ties at the cut all taken.
    """
    D = np.concatenate([stack(layer)[0].reshape(len(layer), -1) for layer in layers], 1)
    squares = ((D[:, None] - D[None]) ** 2).sum(-1)
    scores = np.sort(squares + np.diag([np.inf] * len(D)), 1)[:, : max(1, len(D) - f - 2)].sum(1)
    chosen = scores <= np.sort(scores)[select - 1] * (1 + 1e-9)
    w = np.abs(layers[0].weights) * chosen
    return [np.tensordot(w / w.sum(), stack(layer)[0], 1) for layer in layers]


@pytest.mark.parametrize("weights", [(), (1.0, 0.5, 0.7, 2.0, -1.0, 1.0, 3.0)])
@pytest.mark.parametrize(("byzantine", "select"), [(None, 1), (2, 1), (1, 3), (0, 7), (2, 4)])
def test_krum_is_the_paper(byzantine: int | None, select: int, weights: tuple[float, ...]) -> None:
    layers = make_layers((2, 4, 3, 1, 2, 3, 2), weights=weights)
    merged = run(sm.krum(byzantine, select), layers)
    for layer, matrix in zip(layers, krum(layers, 2 if byzantine is None else byzantine, select)):
        matches(merged[layer.name], matrix)
    if select == 1:
        assert [u.rank for u in merged.values()] == [merged["model.0.q_proj"].rank] * 3, (
            "one adapter, in every layer"
        )


def test_krum_of_three_is_the_mean_of_the_closest_pair() -> None:
    layer = make_layers((2, 2, 2), {"l": (6, 6)})[0]
    x, y, z = layer.updates
    close = changed(layer, updates=(x, sm.Dense(x.dense() + 0.01 * y.dense()), z))
    matches(run(sm.krum(), [close])["l"], (x.dense() + 0.005 * y.dense()).numpy())


def test_krum_refuses_what_the_theorem_does_not_cover() -> None:
    layers = make_layers((2, 2, 2, 2))
    with pytest.raises(sm.MethodError, match=r"byzantine=1 only among 5.*got 4: write byzantine=0"):
        run(sm.krum(1), layers)
    with pytest.raises(sm.MethodError, match="cannot select 5 of 4"):
        run(sm.krum(select=5), layers)
    for wrong in ({"byzantine": -1}, {"select": 0}, {"scope": "row"}):
        with pytest.raises(sm.MethodError):
            sm.krum(**wrong)
