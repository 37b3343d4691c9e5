"""LoRAPrune, GradPruner and movement: official formulas, and the methods that are made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.contrib.gradpruner import initial_importance
from sapmerge.contrib.loraprune import sensitivity
from sapmerge.errors import MethodError, NonFiniteError
from tests import conftest, oracles
from tests.conftest import changed, error, low_rank, make_layers, run
from tests.methods.test_anchored import tensor


def with_anchors(layers: list[sm.Layer]) -> conftest.Anchored:
    return conftest.Anchored(layers, conftest.LinearLoss())


def gradient(layer: sm.Layer) -> Tensor:
    """The mean over the two anchors of the stand-in."""
    return sum(conftest._gradient(layer.name, layer.shape, half) for half in (1, 2)) / 2


# --- LoRAPrune
# ----------------------------------------------------------------------------------------


def test_sensitivity_is_loraprune() -> None:
    A, B, W0, gA, gB = (tensor(f"loraprune/toy/{name}") for name in ("A", "B", "W0", "gA", "gB"))
    found = sensitivity(W0 + 2.0 * B @ A, A, B, gA, gB, power=1)
    rows = found.sum(1)
    assert error(rows / rows.norm(), tensor("loraprune/toy/s_lora")) < 1e-6
    assert error(found.sum(0), tensor("loraprune/toy/s_lora_T_nonorm")) < 1e-6
    assert error(sensitivity(W0, A, B, gA, gB), sensitivity(W0, A, B, gA, gB, 1).square()) < 1e-12
    step = (B - 1.0 * gB) @ (
        A - 1.0 * gA
    ) - B @ A  # the bracket is minus a step of gradient descent
    assert error(sensitivity(torch.ones(24, 16).double(), A, B, gA, gB, 1), step.abs()) < 1e-9


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize("power", [1, 2])
def test_the_groups_that_are_kept(axis: str, power: int) -> None:
    layers = with_anchors(make_layers([2, 0, 3]))
    method = sm.loraprune(
        0.4, axis, power, rescaler=sm.Keep(), merger=lambda layer: layer.updates[2]
    )
    notes: dict[str, Any] = {}
    prepared = sm.prepare(method, layers)
    for layer in layers:
        pruned = prepared(changed(layer, record=notes.__setitem__))
        assert isinstance(pruned, sm.LowRank)
        even, G = layer.updates[2].balanced, gradient(layer)
        found = sensitivity(even.dense(), even.A, even.B, even.B.T @ G, G @ even.A.T, power)
        sums = found.sum(1 if axis == "row" else 0)
        kept = sums >= sums.sort(descending=True).values[oracles.count(0.4, len(sums)) - 1]
        D = layer.updates[2].dense()
        assert error(pruned.dense(), D * kept[:, None] if axis == "row" else D * kept) < 1e-12
        assert notes["density"]["a2"] == pytest.approx(float(kept.double().mean()))
        assert "a1" not in notes["density"]


def test_loraprune_scales_with_the_adapter() -> None:
    """f(c u) = c f(u) for c > 0; the sign of gB gA alone follows that of the update,
    so f(-u) may keep other rows.
    """
    layers = make_layers()
    for factor in (3.0, 1e6, 1e-6):
        scaled = [
            changed(layer, updates=tuple(u.scaled(factor) for u in layer)) for layer in layers
        ]
        got, wanted = run(sm.loraprune(), scaled), run(sm.loraprune(), layers)
        assert all(
            error(got[name].dense(), wanted[name].dense() * factor) < 1e-9 for name in wanted
        )


def test_loraprune_with_a_threshold_for_the_whole_adapter() -> None:
    layers = with_anchors(make_layers([2, 3]))
    prune = sm.PruneGroups(sm.TopFraction(0.3, scope="adapter"))
    prepared = sm.prepare(sm.Chain(prune, sm.Mean()), layers).steps[0]
    total = sum(layer.shape[0] for layer in layers)
    for k in range(2):
        assert sum(int(prepared.kept[layer.name, k].sum()) for layer in layers) == oracles.count(
            0.3, total
        )


# --- GradPruner
# ----------------------------------------------------------------------------------------


def test_initial_importance_is_gradpruner() -> None:
    gA, gB, G = (tensor(f"lora_vs_dense/q_proj/{name}") for name in ("gA", "gB", "G"))
    found = initial_importance(gA, gB)
    assert error(found.square(), tensor("gradpruner_product/igia")) < 1e-9
    B, A = 2.0 * tensor("s3/t0/layers.0.q_proj/B"), tensor("s3/t0/layers.0.q_proj/A")
    # s^2 G A^T B^T G: quadratic in the gradient
    assert error(found, 4.0 * G @ (A.T @ B.T / 2.0) @ G) < 1e-9
    assert error(G, tensor("gradpruner_product/true_first_order")) < 1e-12
    assert abs(float(found.norm()) - float(tensor("gradpruner_product/layer_norm"))) < 1e-9

    class Stats:
        def __init__(self, gradient: Tensor) -> None:
            self.gradient = gradient

    parts: Any = {"A": (gA, Stats(gA)), "B": (gB, Stats(gB))}
    assert abs(sm.GradientProduct()(parts) - float(found.norm())) < 1e-12
    assert abs(sm.GradientProduct(1)(parts) - float(found.abs().sum())) < 1e-12


SHAPES = {
    "model.layers.0.q_proj": (6, 5),
    "model.layers.0.v_proj": (5, 6),
    "model.layers.1.q_proj": (6, 5),
    "model.layers.1.v_proj": (5, 6),
    "model.layers.2.q_proj": (6, 5),
    "head": (4, 6),
}


@pytest.mark.parametrize("by", ["block", "module"])
@pytest.mark.parametrize(
    "score", [sm.GradientProduct(), sm.Summed(sm.Taylor()), sm.Summed(sm.Magnitude())]
)
def test_the_layers_that_are_kept(by: str, score: Any) -> None:
    layers = with_anchors(make_layers([2, 0, 3], SHAPES))
    notes: dict[str, Any] = {}
    prepared = sm.prepare(
        sm.gradpruner(0.5, score, by, merger=lambda layer: layer.updates[2]), layers
    )
    kept, scores = set(), {}
    for layer in layers:
        update = prepared(changed(layer, record=notes.__setitem__))
        scores[layer.name] = notes["layer_score"]["a2"]
        if update.rank:
            kept.add(layer.name)
            assert update is layer.updates[2]
        even, G = layer.updates[2].balanced, gradient(layer)
        gA, gB = even.B.T @ G, G @ even.A.T
        wanted = {
            "GradientProduct": float((gB @ gA).norm()),
            "Taylor": float((even.A * gA).abs().sum() + (even.B * gB).abs().sum()),
            "Magnitude": float(even.A.abs().sum() + even.B.abs().sum()),
        }[type(getattr(score, "scorer", score)).__name__]
        assert scores[layer.name] == pytest.approx(wanted, rel=1e-9)
    groups: dict[str, float] = {}
    for name, value in scores.items():
        group = name.rpartition(".")[0] or name if by == "block" else name
        groups[group] = groups.get(group, 0.0) + value
    best = sorted(groups, key=groups.__getitem__)[-oracles.count(0.5, len(groups)) :]
    assert kept == {
        name
        for name in SHAPES
        if (name.rpartition(".")[0] or name if by == "block" else name) in best
    }


def test_layer_pruning_without_data() -> None:
    layers = make_layers([2, 3], SHAPES)
    merged = run(sm.Chain(sm.PruneLayers(sm.Summed(sm.Magnitude()), 0.5), sm.Mean()), layers)
    assert {name for name, update in merged.items() if update.rank} < set(SHAPES)
    with pytest.raises(MethodError, match="anchors and a model"):
        sm.prepare(sm.gradpruner(), layers)
    with pytest.raises(NonFiniteError):
        sm.prepare(sm.PruneLayers(lambda parts: float("nan"), 0.5), layers)
    with pytest.raises(MethodError, match="Factors"):
        sm.prepare(
            sm.PruneLayers(sm.GradientProduct(), 0.5, units=sm.Entries()), with_anchors(layers)
        )


# --- movement
# ----------------------------------------------------------------------------------------


def checkpoints() -> list[sm.Layer]:
    return make_layers([2, 3, 2, 4], weights=(1.0, 1.0, 0.5, 0.7))


def masked(D: Tensor, scores: Tensor, density: float) -> Tensor:
    flat = scores.flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[: oracles.count(density, len(flat))]] = True
    return D * kept.view_as(D)


def test_displacement_is_the_way_from_zero() -> None:
    layers = checkpoints()
    got = run(sm.movement([("a0", "a1", "a3")], 0.4), layers)
    for layer in layers:
        D = [update.dense() for update in layer]
        scores = D[0] * D[0] + D[1] * (D[1] - D[0]) + D[3] * (D[3] - D[1])
        wanted = masked(D[3], scores, 0.4) * 0.7 + masked(D[2], D[2].square(), 0.4) * 0.5
        assert error(got[layer.name].dense(), wanted / 1.2) < 1e-12


def test_loss_decrease_is_the_loss_that_the_run_has_won() -> None:
    layers = with_anchors(checkpoints())
    for layer in layers:
        D, G = [update.dense() for update in layer], gradient(layer)
        seen = layers.anchors.observe(layers, sm.Entries())
        scores = sm.LossDecrease()(layer, (0, 1, 3), seen)
        # The stand-in's gradient is the same everywhere, so the way between does not matter.
        assert error(scores, -D[3] * G) < 1e-12
    got = run(sm.movement([("a0", "a1", "a3")], 0.4, sm.LossDecrease()), checkpoints())
    for layer in layers:
        D, G = [update.dense() for update in layer], gradient(layer)
        wanted = masked(D[3], -D[3] * G, 0.4) * 0.7 + masked(D[2], -D[2] * G, 0.4) * 0.5
        assert error(got[layer.name].dense(), wanted / 1.2) < 1e-12


def test_one_checkpoint_is_magnitude_pruning() -> None:
    layers = make_layers([2, 3])
    wanted = run(sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(0.4)), sm.Mean()), layers)
    got = run(sm.movement(density=0.4), layers)
    assert all(error(got[name].dense(), wanted[name].dense()) < 1e-12 for name in wanted)


def test_a_run_that_came_to_the_layer_late() -> None:
    layers = make_layers([2, 0, 3])
    assert all(update.rank for update in run(sm.movement([("a1", "a2")], 1.0), layers).values())
    got = run(sm.movement([("a0", "a1")], 1.0), layers)  # and one whose last checkpoint lacks it
    for layer in layers:
        assert error(got[layer.name].dense(), layer.updates[2].dense() / 2) < 1e-12
    for score in (sm.Displacement(), sm.LossDecrease()):
        assert run(sm.movement([("a0", "a1", "a2")], score=score), layers)


def test_wrong_arguments_are_named() -> None:
    layers = make_layers([2, 3])
    for runs in ([("a0", "b")], [("a0",), ("a0", "a1")], [()], [("a0", "a0")]):
        with pytest.raises(MethodError, match="runs"):
            sm.prepare(sm.movement(runs), layers)
    with pytest.raises(MethodError, match="anchors and a model"):
        sm.prepare(sm.movement(score=sm.LossDecrease()), layers)
    with pytest.raises(MethodError, match="anchors and a model"):
        sm.prepare(sm.loraprune(), layers)
    dense = [
        changed(layer, updates=(sm.Dense(low_rank(layer.shape, 2, 0).dense()),) * 2)
        for layer in layers
    ]
    for method in (sm.loraprune(), sm.gradpruner()):
        with pytest.raises(MethodError, match="dense"):
            sm.prepare(method, with_anchors(dense))
    for make in (
        lambda: sm.loraprune(axis="rows"),
        lambda: sm.loraprune(power=3),
        lambda: sm.loraprune(density=20),
        lambda: sm.gradpruner(by="layer"),
        lambda: sm.gradpruner(density=0),
        lambda: sm.GradientProduct(3),
    ):
        with pytest.raises(MethodError):
            make()
    for method in (
        sm.loraprune(),
        sm.gradpruner(),
        sm.movement([("a", "b"), ("c",)]),
        sm.movement(),
    ):
        assert repr(sm.parse(repr(method))) == repr(method)
