"""Scorers, masks, rescalers, units, wrappers and composition:
values, and errors that say what to do.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.parts.mergers import linear
from tests import oracles
from tests.conftest import View, dense, error, low_rank, make_layers, run

D = torch.tensor([[3.0, -1.0, 0.0], [-2.0, 0.5, 4.0]])


def one(matrix: Tensor = D, **more: object) -> sm.Layer:
    return sm.Layer("proj", (sm.Dense(matrix),), adapters=("medical",), **more)  # type: ignore[arg-type]


def kept(prune: sm.Prune, layer: sm.Layer | None = None) -> Tensor:
    return prune(layer or one()).updates[0].dense()


# --- scorers, masks, rescalers
# ----------------------------------------------------------------------------------------


def test_magnitude_and_top_fraction() -> None:
    wanted = torch.tensor([[3.0, 0.0, 0.0], [-2.0, 0.0, 4.0]])
    assert torch.equal(kept(sm.Prune(sm.Magnitude(), sm.TopFraction(0.5))), wanted)
    # at least one
    assert torch.equal(kept(sm.Prune(sm.Magnitude(), sm.TopFraction(0.1))), D * (D == 4))
    assert torch.equal(kept(sm.Prune(sm.Magnitude(), sm.TopFraction(1))), D)
    assert torch.equal(kept(sm.Prune(sm.Magnitude(), sm.Threshold(2.0))), wanted)


def test_ties_at_the_cut() -> None:
    """Scope "layer" keeps the lowest indices, so the count is exact;
    scope "adapter" keeps them all.
    """
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0])
    assert sm.TopFraction(0.4)(scores).tolist() == [True, True, False, False, False]
    assert sm.TopFraction(0.4, scope="adapter")(scores).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("density", [1e-6, 0.003, 0.2, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize(
    "kind", ["random", "float64", "ascending", "two values", "constant", "columns", "one outlier"]
)
def test_the_highest_of_many_scores(kind: str, density: float) -> None:
    """Large tensors are cut where a sample says, whatever the sample is like:
    as sorting does it, ties by index.
    """
    scores = torch.rand(300, 1000, generator=torch.Generator().manual_seed(0))
    scores = {
        "random": scores,
        "float64": scores.double(),
        "ascending": torch.arange(300_000.0).view(300, 1000),
        "two values": (scores > 0.4).float(),
        "constant": torch.ones(300, 1000),
        "columns": scores * (torch.arange(1000) % 9 == 0),
        "one outlier": torch.zeros(300, 1000).index_fill_(1, torch.tensor([7]), 3.0),
    }[kind]
    wanted = torch.zeros(300_000, dtype=torch.bool)
    wanted[
        scores.flatten()
        .sort(descending=True, stable=True)
        .indices[: max(1, int(density * 300_000 + 1e-9))]
    ] = True
    assert torch.equal(sm.TopFraction(density)(scores), wanted.view(300, 1000))


def test_disjoint_mean_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not divide evenly into blocks, and a row longer than a block."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 7, 5, generator=generator) * (
        torch.rand(3, 7, 5, generator=generator) < 0.5
    )
    weights = (1.0, -2.0, 0.5)
    layer = sm.Layer("l", tuple(sm.Dense(matrix) for matrix in stack), weights=weights)
    factors = np.array(weights)[:, None, None]
    count = (np.abs(factors) * (stack.numpy() != 0)).sum(0)
    wanted = (factors * stack.double().numpy()).sum(0) / np.where(count > 0, count, 1)
    for block in (1, 10, 12, 1 << 17):
        monkeypatch.setattr(linear, "_BLOCK", block)
        np.testing.assert_allclose(sm.DisjointMean()(layer).dense().numpy(), wanted, atol=1e-6)


def test_adapter_scope_can_empty_a_layer() -> None:
    """One threshold for the whole adapter: the layer with small updates vanishes,
    the other one stays whole.
    """
    layers = [replace(one(), name="large"), replace(one(D * 1e-3), name="small")]
    method = sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(5 / 12, scope="adapter")), sm.Sum())
    merged = dense(run(method, layers))
    assert torch.equal(merged["large"], D)
    assert not merged["small"].any()


def test_adapter_scope_leaves_absent_layers_out_of_the_count() -> None:
    layers = [one(), sm.Layer("other", (sm.absent((50, 50), D),), adapters=("medical",))]
    method = sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(0.5, scope="adapter")), sm.Sum())
    assert int((run(method, layers)["proj"].dense() != 0).sum()) == 3


def test_adapter_scope_with_two_adapters_of_the_same_content() -> None:
    """The same adapter given twice (one digest) is pruned twice as it would be once."""
    matrix = torch.arange(1.0, 11.0)[None]
    copies = sm.Layer("l", (sm.Dense(matrix),) * 3, adapters=("a", "b", "c"), digests=("same",) * 3)
    prune = sm.Prune(sm.Magnitude(), sm.TopFraction(0.15, scope="adapter"))
    for update in sm.prepare(prune, [copies])(copies):
        assert int((update.dense() != 0).sum()) == 1


def test_random_is_uniform_and_reproducible() -> None:
    big = one(torch.ones(100, 100))
    for density in (0.1, 0.5, 0.9):
        prune = sm.Prune(sm.Random(3), sm.Threshold(1 - density))
        first = kept(prune, big)
        assert torch.equal(first, kept(prune, big))
        assert float(first.mean()) == pytest.approx(
            density, abs=6 * math.sqrt(density * (1 - density)) / 100
        )


@pytest.mark.parametrize("is_dense", [True, False])
def test_rescalers(is_dense: bool) -> None:
    original, pruned = (low_rank((6, 5), 3, seed) for seed in (1, 2))
    if is_dense:
        original, pruned = sm.Dense(original.dense()), sm.Dense(pruned.dense())
    assert sm.Keep()(pruned, original) is pruned
    torch.testing.assert_close(sm.Divide(0.25)(pruned, original).dense(), 4 * pruned.dense())
    for p in (1, 2):
        got = sm.MatchNorm(p)(pruned, original).dense()
        assert float(got.norm(p)) == pytest.approx(float(original.dense().norm(p)), rel=1e-12)
        torch.testing.assert_close(got / got.norm(), pruned.dense() / pruned.dense().norm())
    zero = pruned.scaled(0.0)
    assert not sm.MatchNorm()(zero, original).dense().any()


def test_disjoint_mean_counts_in_double() -> None:
    """Weights that float32 cannot hold (0.7) leave float64 results exact to 1e-15."""
    layer = sm.Layer("l", (sm.Dense(D.double()), sm.Dense(D.double())), weights=(0.7, 0.1))
    assert error(sm.DisjointMean()(layer).dense(), D.double()) < 1e-15


def test_elect_sign_where_the_sum_is_zero() -> None:
    """Opposite entries take the sign of all others together;
    without any majority they are dropped.
    """
    first, second = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-1.0, 2.0, 1.0]])
    layer = sm.Layer("l", (sm.Dense(first), sm.Dense(second)))
    assert [u.dense().tolist() for u in sm.ElectSign()(layer)] == [
        [[1.0, 2.0, 3.0]],
        [[0.0, 2.0, 1.0]],
    ]
    flipped = sm.Layer("l", (sm.Dense(-first), sm.Dense(-second)))
    assert [u.dense().tolist() for u in sm.ElectSign()(flipped)] == [
        [[-1.0, -2.0, -3.0]],
        [[0.0, -2.0, -1.0]],
    ]
    opposite = sm.Layer("l", (sm.Dense(first), sm.Dense(-first)))
    assert not any(u.dense().any() for u in sm.ElectSign()(opposite))


@pytest.mark.parametrize("method_name", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.4, 0.99])
def test_ties_is_peft_ties(method_name: str, density: float) -> None:
    """PEFT's own function, on the dense updates, with equal weights;
    where a vote is tied, PEFT elects plus.
    """
    from peft.utils import merge_utils

    layer = make_layers([3, 3, 3], {"l": (9, 8)})[0]
    wanted = merge_utils.ties(
        [u.dense() for u in layer], torch.ones(3).double(), density, method_name
    )  # type: ignore[arg-type]
    votes = sum(torch.from_numpy(oracles.trim(u.dense().numpy(), density)).sign() for u in layer)
    decided = (
        votes != 0 if method_name == "frequency" else torch.ones_like(wanted, dtype=torch.bool)
    )
    assert int(decided.sum()) > 30
    assert error(sm.ties(density, method_name)(layer).dense()[decided], wanted[decided]) < 1e-14


# --- units
# ----------------------------------------------------------------------------------------

UNITS = [sm.Entries(), sm.Factors(), sm.Directions(), sm.Layers()]


@pytest.mark.parametrize("units", UNITS, ids=repr)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_units_round_trip_and_gradient(units: sm.Units, rank: int) -> None:
    """Joining unchanged coordinates returns the update;
    the gradient is that of autograd through `join`.
    """
    update = low_rank((6, 5), rank, 4)
    G = low_rank((6, 5), 5, 5).dense()
    coordinates = units(update)
    assert error(coordinates.join(coordinates.values).dense(), update.dense()) < 1e-12
    pulled = coordinates.pull(View(G))
    assert set(pulled) == set(coordinates.values)
    for part, values in coordinates.values.items():
        assert pulled[part].shape == (1, *values.shape)
        for index in list(range(values.numel()))[:: max(1, values.numel() // 7)]:
            moved = []
            for step in (1e-5, -1e-5):
                other = values.clone().reshape(-1)
                other[index] += step
                joined = coordinates.join({**coordinates.values, part: other.view(values.shape)})
                moved.append(float((joined.dense() * G).sum()))
            assert (moved[0] - moved[1]) / 2e-5 == pytest.approx(
                float(pulled[part].flatten()[index]), abs=1e-6
            )


@pytest.mark.parametrize("units", UNITS, ids=repr)
def test_units_of_degenerate_updates(units: sm.Units) -> None:
    for update in (
        low_rank((1, 1), 1, 0),
        sm.LowRank(torch.zeros(4, 2), torch.ones(2, 3)),
        low_rank((1, 6), 4, 0),
    ):
        layer = sm.Layer("l", (update,))
        pruned = sm.Prune(sm.Magnitude(), sm.TopFraction(1.0), units=units)(layer).updates[0]
        assert pruned.shape == update.shape
        assert error(pruned.dense(), update.dense()) < 1e-6


def test_pruning_directions_is_truncation() -> None:
    """Keeping half of the singular directions by magnitude is the best approximation
    of half the rank.
    """
    update = low_rank((8, 7), 4, 0)
    pruned = sm.Prune(sm.Magnitude(), sm.TopFraction(0.5), units=sm.Directions())(
        sm.Layer("l", (update,))
    ).updates[0]
    assert isinstance(pruned, sm.LowRank)
    assert (
        error(pruned.dense(), torch.from_numpy(oracles.best_rank(update.dense().numpy(), 2)))
        < 1e-12
    )


def test_pruning_factors_stays_low_rank_and_counts_each_factor() -> None:
    update = low_rank((8, 7), 3, 0)
    prune = sm.Prune(sm.Magnitude(), sm.TopFraction(0.25), sm.MatchNorm(), units=sm.Factors())
    pruned = prune(sm.Layer("l", (update,))).updates[0]
    assert isinstance(pruned, sm.LowRank)
    assert int((pruned.A != 0).sum()) == int(0.25 * 21)
    assert int((pruned.B != 0).sum()) == 6
    assert pruned.norm() == pytest.approx(update.norm(), rel=1e-12)


def test_pruning_whole_layers() -> None:
    layers = [sm.Layer(f"l{k}", (low_rank((5, 5), 2, k).scaled(10.0**k),)) for k in range(4)]
    method = sm.Chain(
        sm.Prune(sm.Magnitude(), sm.TopFraction(0.5, scope="adapter"), units=sm.Layers()), sm.Sum()
    )
    merged = run(method, layers)
    assert [bool(merged[f"l{k}"].dense().any()) for k in range(4)] == [False, False, True, True]


# --- plain functions
# ----------------------------------------------------------------------------------------


def test_plain_functions_in_every_place() -> None:
    layer = sm.Layer("proj", (sm.Dense(D), sm.Dense(2 * D)), adapters=("x", "y"))
    seen = []

    def scorer(values: Tensor, stats: sm.Stats) -> Tensor:
        seen.append((stats.adapter, stats.layer, stats.part))
        return -values

    def hard(scores: Tensor) -> Tensor:
        return scores > 0

    def soft(scores: Tensor) -> Tensor:
        return torch.full_like(scores, 0.25)

    def double(pruned: sm.Update, original: sm.Update) -> sm.Update:
        assert original.shape == pruned.shape
        return pruned.scaled(2.0)

    def transpose_twice(layer: sm.Layer) -> sm.Layer:
        return layer.with_updates([sm.Dense(update.dense() + 1) for update in layer])

    def last(layer: sm.Layer) -> sm.Update:
        return layer.updates[-1]

    def units(update: sm.Update) -> sm.Coordinates:
        rows = update.dense()
        return sm.Coordinates(
            {"row0": rows[0]}, lambda parts: sm.Dense(torch.stack([parts["row0"], rows[1]])), dict
        )

    negative = sm.Chain(sm.Prune(scorer, hard, double), transpose_twice, last)
    torch.testing.assert_close(negative(layer).dense(), 4 * D * (D < 0) + 1)
    assert seen == [("x", "proj", "entries"), ("y", "proj", "entries")]
    assert torch.equal(sm.Chain(sm.Prune(sm.Magnitude(), soft), last)(layer).dense(), D / 2)
    only_first_row = sm.Chain(sm.Prune(scorer, hard, units=units), last)(layer).dense()
    assert torch.equal(only_first_row, torch.stack([2 * D[0] * (D[0] < 0), 2 * D[1]]))
    assert torch.equal(sm.on_one_layer(sm.MatchEnergy(last), layer).dense(), 1.5 * D)
    assert error(sm.In(sm.CoreSpace(), last)(layer).dense(), 2 * D) < 1e-6

    def basis(layer: sm.Layer) -> sm.Frames:
        return sm.Frames(U=torch.eye(2)[:, :1])

    assert torch.equal(sm.In(basis, last)(layer).dense(), 2 * D * torch.tensor([[1.0], [0.0]]))


def test_user_parts_with_a_pre_pass() -> None:
    """Whatever defines `prepare(layers)` is prepared, at any depth, on the layers it will see."""

    class Largest:
        """Scale by one over the largest entry of the whole model,
        as seen after the steps before.
        """

        factor = 1.0

        def prepare(self, layers: object) -> Largest:
            ready = Largest()
            ready.factor = 1 / max(float(u.dense().abs().max()) for layer in layers for u in layer)  # type: ignore[attr-defined]
            return ready

        def __call__(self, layer: sm.Layer) -> sm.Layer:
            return layer.with_updates([u.scaled(self.factor) for u in layer])

    def halve(layer: sm.Layer) -> sm.Layer:
        return layer.with_updates([u.scaled(0.5) for u in layer])

    layers = [replace(one(), name="x"), replace(one(D * 10), name="y")]
    for method in (
        sm.Chain(halve, Largest(), sm.Sum()),
        sm.ByModule({"*": sm.Chain(halve, Largest(), sm.Sum())}, sm.mean()),
    ):
        merged = dense(run(method, layers))
        torch.testing.assert_close(merged["x"], D / 40)
        torch.testing.assert_close(merged["y"], D / 4)
    # it needs anchors, but no module is left for it
    nobody = sm.ByModule({"*": sm.mean()}, default=sm.sap())
    torch.testing.assert_close(sm.prepare(nobody, layers)(layers[0]).dense(), D)


# --- wrappers
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 0.7], [1.0, -0.5, 0.7]])
@pytest.mark.parametrize(
    "inner", [sm.mean(), sm.ties(), sm.knots(), sm.core_space(), sm.dare(0.3)], ids=repr
)
def test_match_energy(inner: sm.Method, weights: list[float]) -> None:
    """Over all layers together, the result's norm is the mean norm of the inputs,
    weighted by |w|.
    """
    layers = make_layers([2, 4, 0], weights=weights) + make_layers(
        [1, 2, 3], {"more": (6, 11)}, weights=weights
    )
    merged = run(sm.MatchEnergy(inner), layers)
    plain = run(inner, layers)
    norms = [oracles.norm([layer.updates[k].dense().numpy() for layer in layers]) for k in range(3)]
    wanted = sum(abs(w) * size for w, size in zip(weights, norms)) / sum(abs(w) for w in weights)
    assert oracles.norm([update.dense().numpy() for update in merged.values()]) == pytest.approx(
        wanted, rel=1e-9
    )
    factors = {float((merged[n].dense() / plain[n].dense()).nanmedian()) for n in merged}
    assert max(factors) == pytest.approx(min(factors), rel=1e-9)  # one factor for the whole adapter


def test_match_energy_of_nothing() -> None:
    layers = [one(D * 0), one(D * 0)]
    assert not run(sm.MatchEnergy(sm.mean()), layers)["proj"].dense().any()


def test_by_module_routes() -> None:
    layers = make_layers(
        shapes={"vision.q": (4, 5), "vision.v": (6, 5), "text.q": (5, 5)}, weights=[1.0, 0.5, 0.7]
    )
    vision, text, q = sm.ties(0.3, scope="adapter"), sm.mean(), sm.task_arithmetic()
    merged = dense(run(sm.ByModule({"vision*": vision}, text), layers))
    apart = {**dense(run(vision, layers[:2])), **dense(run(text, layers[2:]))}
    # pre-passes see their own group only
    assert all(torch.equal(merged[name], apart[name]) for name in apart)
    first_match = dense(run(sm.ByModule({"vision.q": q, "vision*": vision}, text), layers))
    assert torch.equal(first_match["vision.q"], q(layers[0]).dense())


@pytest.mark.parametrize("pattern", ["visoin*", "vision"])
def test_by_module_refuses_a_pattern_that_matches_nothing(pattern: str) -> None:
    layers = make_layers(shapes={"vision.q": (4, 5), "text.q": (5, 5)})
    with pytest.raises(MethodError, match=pattern):
        run(sm.ByModule({pattern: sm.mean()}, sm.ties()), layers)


def test_in_runs_in_other_coordinates() -> None:
    """The method inside sees U^T D V; the result comes back as U M V^T, low-rank."""
    layers, seen = make_layers([2, 0, 3]), []

    def spy(layer: sm.Layer) -> sm.Update:
        seen.append((layer.name, layer.shape, layer.present, layer.adapters))
        return sm.Sum()(layer)

    merged = run(sm.In(sm.CoreSpace(), spy), layers)
    assert seen == [
        (layer.name, (5, 5), (True, False, True), ("a0", "a1", "a2")) for layer in layers
    ]
    for layer in layers:
        update = merged[layer.name]
        assert isinstance(update, sm.LowRank)
        assert update.rank <= 5
        assert error(update.dense(), sum(u.dense() for u in layer)) < 1e-10  # type: ignore[arg-type]


def test_bases_nest() -> None:
    layers = make_layers([2, 1, 3])
    nested = run(sm.In(sm.SharedBasis(), sm.In(sm.CoreSpace(), sm.mean())), layers)
    for name, update in run(sm.mean(), layers).items():
        assert error(nested[name].dense(), update.dense()) < 1e-10


def test_density_is_recorded() -> None:
    notes: dict[str, object] = {}
    layer = sm.Layer(
        "l", (sm.Dense(D), sm.absent((2, 3), D)), adapters=("x", "y"), record=notes.__setitem__
    )
    sm.ties(0.5)(layer)
    assert notes["density"] == {"x": 0.5}


# --- errors
# ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [sm.TopFraction, sm.ties, sm.dare, sm.magnitude_prune, sm.knots, sm.Divide, sm.dare_ties],
)
def test_a_density_in_per_cent(make: object) -> None:
    with pytest.raises(MethodError, match=r"for 20 % write 0\.2"):
        make(20)  # type: ignore[operator]
    for wrong in (0, -0.1, 101, float("nan"), "0.2", True, None):
        with pytest.raises(MethodError, match="density"):
            make(wrong)  # type: ignore[operator]


def test_wrong_arguments() -> None:
    with pytest.raises(MethodError, match="scope"):
        sm.TopFraction(0.2, scope="model")
    with pytest.raises(MethodError, match="majority_sign_method"):
        sm.ties(majority_sign_method="mass")
    with pytest.raises(MethodError, match="p=1 or p=2"):
        sm.MatchNorm(3)


def test_masks_and_scores_of_the_wrong_shape() -> None:
    with pytest.raises(MethodError, match=r"\(2,\).*\(2, 3\)"):
        sm.Prune(sm.Magnitude(), lambda scores: scores[:, 0] > 0)(one())
    with pytest.raises(
        MethodError, match=r"one score per value.*\(3,\).*\(2, 3\).*'proj'.*'medical'"
    ):
        sm.Prune(lambda values, stats: values[0], sm.TopFraction(0.5))(one())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_adapter_and_layer(bad: float) -> None:
    broken = D.clone()
    broken[0, 0] = bad
    for scope in ("layer", "adapter"):
        with pytest.raises(NonFiniteError, match=r"'proj'.*'medical'"):
            run(sm.ties(0.5, scope=scope), [one(broken)])


def test_a_chain_needs_a_merger_at_its_end_and_only_there() -> None:
    with pytest.raises(MethodError, match="merger"):
        sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(0.5)))(one())
    with pytest.raises(MethodError, match="merger"):
        sm.Chain(sm.Mean(), sm.ElectSign())(one())
    with pytest.raises(MethodError, match="merger"):
        sm.Chain()


def test_weights_that_sum_to_zero_have_no_mean() -> None:
    layer = sm.Layer("l", (sm.Dense(D), sm.Dense(D)), weights=(0.5, -0.5))
    with pytest.raises(MethodError, match=r"sum to zero.*Sum"):
        sm.mean()(layer)
    assert not sm.task_arithmetic()(layer).dense().any()


def test_a_gradient_without_anchors() -> None:
    def saliency(values: Tensor, stats: sm.Stats) -> Tensor:
        return (values * stats.gradient).abs()

    with pytest.raises(MethodError, match="pass anchors and a model") as caught:
        sm.Chain(sm.Prune(saliency, sm.TopFraction(0.5)), sm.Mean())(one())
    assert "'proj'" in str(caught.value)
    assert "'medical'" in str(caught.value)


def test_factors_of_a_dense_update() -> None:
    with pytest.raises(MethodError, match=r"dense already.*units=Entries\(\)"):
        sm.Prune(sm.Magnitude(), sm.TopFraction(0.5), units=sm.Factors())(one())


def test_layers_and_updates_that_do_not_fit() -> None:
    with pytest.raises(MethodError, match=r"\(3, 2\).*\(4, 5\)"):
        sm.LowRank(torch.zeros(3, 2), torch.zeros(4, 5))
    with pytest.raises(MethodError, match="matrix"):
        sm.Dense(torch.zeros(3))
    with pytest.raises(MethodError, match=r"x: \(2, 3\), y: \(3, 2\)"):
        sm.Layer("l", (sm.Dense(D), sm.Dense(D.T)), adapters=("x", "y"))
    with pytest.raises(MethodError, match="at least one"):
        sm.Layer("l", ())
    with pytest.raises(MethodError, match="1 updates but 2 weights"):
        sm.Layer("l", (sm.Dense(D),), weights=(1.0, 2.0))
