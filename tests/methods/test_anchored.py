"""Fisher, RegMean, tune and the scorers on activations:
official numbers, plain autograd, and identities.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.errors import AnchorError, MethodError, NonFiniteError
from sapmerge.losses import entropy
from tests import conftest
from tests.anchors import models
from tests.anchors.models import anchored, random_updates
from tests.conftest import changed, error, low_rank, make_layers, run

HERE = Path(__file__).parents[1] / "goldens"
ENTRIES = {
    entry["key"]: entry for entry in json.loads((HERE / "anchored.json").read_text())["entries"]
}
NUMBERS, INPUTS = load_file(HERE / "anchored.safetensors"), load_file(HERE / "inputs.safetensors")
Q, V = "layers.0.q_proj", "layers.1.v_proj"


def tensor(name: str) -> Tensor:
    return (NUMBERS[name] if name in NUMBERS else INPUTS[name]).double()


# --- the classifier of the goldens: logits = classifier(l1(tanh(l0 x)))
# -----------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(16, 24, False),
            nn.Linear(24, 16, False),
            nn.Linear(16, 5),
        )
        for module, name in ((self.first, f"d3/base/{Q}/W0"), (self.second, f"d3/base/{V}/W0")):
            module.weight = nn.Parameter(tensor(name))
        self.head.weight, self.head.bias = (
            nn.Parameter(tensor(f"clf/head/{name}")) for name in ("weight", "bias")
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def surprise(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """MergeLM's sum over classes of sqrt(p) log p, with sqrt(p) a constant;
    a mean over the batch.
    """
    logs = torch.log_softmax(model(batch["x"]), -1)
    return ((logs / 2).exp().detach() * logs).sum(-1).mean()


def task(t: int) -> dict[str, sm.Update]:
    return {
        "first": sm.Dense(tensor(f"d3/t{t}/{Q}/dW")),
        "second": sm.Dense(tensor(f"d3/t{t}/{V}/dW")),
    }


def batches(t: int, size: int) -> list[dict[str, Tensor]]:
    return [{"x": x} for x in tensor(f"clf/X/t{t}").split(size)]


def fishers(t: int, size: int) -> dict[str, Tensor]:
    """By autograd: the squares of the gradients of sums over batches, over the number of samples;
    every parameter.
    """
    model = Classifier()
    for name, update in task(t).items():
        model.get_submodule(name).weight.data += update.dense()
    parameters, found = dict(model.named_parameters()), {}
    for batch in batches(t, size):
        grads = torch.autograd.grad(
            surprise(model, batch) * len(batch["x"]), list(parameters.values())
        )
        for name, grad in zip(parameters, grads):
            found[name] = found.get(name, 0.0) + grad.square() / 12
    return {
        name.removesuffix(".weight"): value.reshape(len(value), -1) for name, value in found.items()
    }


class Known:
    """Anchors whose Fisher information is known: layer -> (K, m, n)."""

    def __init__(self, found: Mapping[str, Sequence[Tensor]]) -> None:
        self.found = found

    def observe(self, layers: sm.LayerStream, units: sm.Units) -> Known:
        return self

    def moment(
        self, layer: str, adapter: int, part: str, statistic: str, at: str
    ) -> tuple[Tensor, Tensor]:
        assert (part, at) == ("entries", "adapter")
        return (self.found[layer][adapter],) * 2


@pytest.mark.parametrize("key", ["norm0_bs1", "norm1_bs1", "norm1_bs4"])
def test_fisher_is_the_official_code(key: str) -> None:
    """MergeLM's floor is an absolute 1e-6 on F and on norms:
    it is added to the F that is handed over, ours is 0.
    """
    size = int(key[-1])
    each = [fishers(t, size) for t in range(3)]
    pass_ = Known({name: [F[name] + 1e-6 for F in each] for name in each[0]})
    updates = [task(t) for t in range(3)]
    layers = [
        sm.Layer(
            name,
            tuple(u.get(name, sm.Dense(torch.zeros_like(each[0][name]))) for u in updates),
        )
        for name in each[0]
    ]
    method = sm.fisher(0.0, "batch" if size > 1 else "sample", normalize="norm1" in key)
    prepared = sm.prepare(method, conftest.Anchored(layers, pass_))
    for layer in layers[:2]:
        name = {"first": Q, "second": V}[layer.name]
        wanted = tensor(f"fisher/d3/{key}/{name}/W") - tensor(f"d3/base/{name}/W0")
        assert error(prepared(layer).dense(), wanted) < 1e-5
        assert (
            error(
                tensor(f"d3/base/{name}/W0") + prepared(layer).dense(),
                wanted + tensor(f"d3/base/{name}/W0"),
            )
            < 1e-6
        )


@pytest.mark.parametrize("size", [1, 4])
def test_anchors_measure_that_fisher_information(size: int) -> None:
    anchors, layers = anchored(Classifier(), batches(0, size), [task(0)], surprise)
    seen = anchors.observe(layers, sm.Entries())
    wanted = fishers(0, size), fishers(0, 1)
    for name in ("first", "second"):
        for statistic, F in zip(("batch square", "square"), wanted):
            halves = seen.moment(name, 0, "entries", statistic, "adapter")
            assert error((halves[0] + halves[1]) / 2, F[name]) < 1e-10


def test_fisher_with_equal_information_is_the_mean() -> None:
    for layer in make_layers([2, 0, 3], weights=(1.0, 0.5, 0.7)):
        F = low_rank(layer.shape, 3, 5).dense().square()
        known = Known({layer.name: [F] * 3})
        assert (
            error(sm.on_one_layer(sm.fisher(), layer, known).dense(), sm.mean()(layer).dense())
            < 1e-12
        )
        zero = Known({layer.name: [F * 0] * 3})
        assert (
            error(
                sm.on_one_layer(sm.fisher(floor=0.0), layer, zero).dense(), sm.mean()(layer).dense()
            )
            < 1e-12
        )


def test_fisher_takes_each_entry_from_who_needs_it() -> None:
    one, other = sm.Dense(torch.ones(2, 2).double()), sm.Dense(3 * torch.ones(2, 2).double())
    F = [
        torch.tensor([[1.0, 0.0], [1.0, 3.0]]).double(),
        torch.tensor([[0.0, 1.0], [1.0, 1.0]]).double(),
    ]
    got = sm.on_one_layer(sm.fisher(), sm.Layer("l", (one, other)), Known({"l": F})).dense()  # type: ignore[arg-type]
    torch.testing.assert_close(
        got, torch.tensor([[1.0, 3.0], [2.0, 1.5]]).double(), atol=1e-5, rtol=0
    )


def plain() -> tuple[Any, list[sm.Layer], nn.Module, list[Any], list[dict[str, sm.Update]]]:
    model = models.Plain().double()
    loader = [
        {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
        for b in models.plain_batches()
    ]
    updates = [random_updates(model, ["conv", "line", "twice", "head", "words"], 2, 1)]
    updates.append(random_updates(model, ["line", "twice", "head"], 3, 2))
    return *anchored(model, loader, updates, models.plain_loss), model, loader, updates


def inputs_of(
    model: nn.Module, updates: Mapping[str, sm.Update], loader: Any, name: str
) -> list[list[Tensor]]:
    """Per sample the inputs of a linear layer (tokens, n) at base + updates, over all its calls."""
    seen: list[list[Tensor]] = []

    def add(found: sm.Update) -> Callable[..., Tensor]:
        return lambda module, inputs, output: (
            output + nn.functional.linear(inputs[0], found.dense())
        )

    linear = {k: u for k, u in updates.items() if isinstance(model.get_submodule(k), nn.Linear)}
    others = {k: u for k, u in updates.items() if k not in linear}
    for k, u in others.items():
        weight = model.get_submodule(k).weight
        weight.data += (
            u.dense().T
            if isinstance(model.get_submodule(k), nn.Embedding)
            else u.dense().view_as(weight)
        )
    handles = [model.get_submodule(k).register_forward_hook(add(u)) for k, u in linear.items()]
    handles.append(
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, x: seen[-1].append(x[0].detach())
        )
    )
    for batch in loader:
        seen.append([])
        model(**batch)
    for handle in handles:
        handle.remove()
    for k, u in others.items():
        weight = model.get_submodule(k).weight
        weight.data -= (
            u.dense().T
            if isinstance(model.get_submodule(k), nn.Embedding)
            else u.dense().view_as(weight)
        )
    size = [len(calls[0]) for calls in seen]
    return [
        [call.reshape(n, -1, call.shape[-1])[s] for call in calls]
        for calls, n in zip(seen, size)
        for s in range(n)
    ]


@pytest.mark.parametrize(
    "bases", [(), (sm.SharedBasis(),), (sm.CoreSpace(),), (sm.SharedBasis(), sm.CoreSpace())]
)
@pytest.mark.parametrize("budget", [1 << 30, 1])
def test_grams_and_activations_are_those_of_the_inputs(bases: Sequence[Any], budget: int) -> None:
    anchors, layers, model, loader, updates = plain()
    anchors.budget = budget
    stream: Any = layers
    for basis in bases:
        stream = [sm.In(basis, sm.mean())._inside(layer)[1] for layer in stream]
    grams: dict[tuple[str, int], Tensor] = {}
    anchors.grams(stream, lambda layer, k, gram: grams.__setitem__((layer.name, k), gram))
    for layer in stream:
        if layer.name in ("twice", "head"):
            for k, found in enumerate(updates):
                samples = inputs_of(model, found, loader, layer.name)
                V = torch.eye(samples[0][0].shape[-1]).double()
                for frames in layer.frames:
                    V = V if frames.V is None else V @ frames.V
                x = torch.cat([torch.cat(calls) for calls in samples]) @ V
                assert error(grams[layer.name, k], x.T @ x / len(x)) < 1e-10
                for units in (sm.Entries(), sm.Factors(), sm.Directions()):
                    seen = anchors.observe(stream, units)
                    coordinates = units(layer.updates[k])
                    through = {
                        "entries": torch.eye(V.shape[1]).double(),
                        "A": torch.eye(V.shape[1]).double(),
                    }
                    if "B" in coordinates.values:
                        through["B"] = coordinates.values["A"]
                    if "directions" in coordinates.values:
                        through["directions"] = layer.updates[k].svd()[2][
                            : len(coordinates.values["directions"])
                        ]
                    for part, values in coordinates.values.items():
                        halves = seen.activations(layer.name, k, part)
                        for half, wanted in zip(halves, (samples[::2], samples[1::2])):
                            size = sum(
                                (torch.cat(c) @ V @ through[part].T).square().sum(0) for c in wanted
                            )
                            assert error(half, size.expand_as(half) * 2 / len(samples)) < 1e-9
                            assert (values * half).shape == values.shape


def test_embeddings_have_diagonal_grams_and_counts() -> None:
    anchors, layers, _, loader, _ = plain()
    words = next(layer for layer in layers if layer.name == "words")
    counts = torch.bincount(
        torch.cat([batch["ids"].flatten() for batch in loader]), minlength=11
    ).double()
    grams: dict[int, Tensor] = {}
    anchors.grams([words], lambda layer, k, gram: grams.__setitem__(k, gram))
    assert error(grams[0], counts / counts.sum()) < 1e-12
    sizes = anchors.observe([words], sm.Entries()).activations("words", 0, "entries")
    assert error((sizes[0] + sizes[1])[0] / 2, counts / 7) < 1e-12


@pytest.mark.parametrize("reduction", [0.0, 0.9, 1.0])
def test_regmean_on_anchors_has_the_least_error_of_outputs(reduction: float) -> None:
    _anchors, layers, model, loader, updates = plain()
    prepared = sm.prepare(sm.regmean(reduction), layers)
    head = next(layer for layer in layers if layer.name == "head")
    x = [
        torch.cat([torch.cat(c) for c in inputs_of(model, found, loader, "head")])
        for found in updates
    ]
    G = [a.T @ a / len(a) for a in x]
    G = [g * reduction + torch.diag(g.diagonal()) * (1 - reduction) for g in G]
    D = [update.dense() for update in head]
    wanted = sum(d @ g for d, g in zip(D, G)) @ torch.linalg.inv(sum(G))
    merged = prepared(head)
    assert isinstance(merged, sm.LowRank)
    assert merged.rank == 5
    assert error(merged.dense(), wanted) < 1e-8


def given(prefix: str = "lorm/s3/X") -> dict[str, dict[str, Tensor]]:
    """The authors' Gram matrices: sums over rows."""
    X = {f"t{t}": {name: tensor(f"{prefix}/t{t}/{name}") for name in (Q, V)} for t in range(3)}
    return {label: {name: x.T @ x for name, x in found.items()} for label, found in X.items()}


def s3_layers() -> list[sm.Layer]:
    return [
        sm.Layer(
            name,
            tuple(
                sm.LowRank(tensor(f"s3/t{t}/{name}/B"), tensor(f"s3/t{t}/{name}/A"))
                for t in range(3)
            ),
            adapters=("t0", "t1", "t2"),
        )
        for name in (Q, V)
    ]


@pytest.mark.parametrize("alpha", ["0.0", "0.5", "1.0"])
def test_regmean_is_fed_mammoth(alpha: str) -> None:
    prepared = sm.prepare(sm.regmean(float(alpha), given()), s3_layers())
    for layer in s3_layers():
        assert (
            error(prepared(layer).dense(), tensor(f"regmean_dense/s3/alpha{alpha}/{layer.name}/dW"))
            < 1e-5
        )
        dense = changed(layer, updates=(sm.Dense(layer.updates[0].dense()), *layer.updates[1:]))
        assert (
            error(
                sm.prepare(sm.regmean(float(alpha), given()), [dense])(dense).dense(),
                prepared(layer).dense(),
            )
            < 1e-9
        )


@pytest.mark.parametrize("ratio", ["0.1", "0.9"])
def test_regmean_is_mergelm(ratio: str) -> None:
    """MergeLM merges weights; with the inputs of each model at base + its own update ours is that
    minus the base.
    """
    merged: dict[str, list[Any]] = {}
    for t in range(3):
        anchors, layers = anchored(Classifier(), batches(t, 4), [task(t)], surprise)
        anchors.grams(layers, lambda layer, k, gram: merged.setdefault(layer.name, []).append(gram))
    for name, golden in (("first", Q), ("second", V)):
        labels = ("t0", "t1", "t2")
        layer = sm.Layer(name, tuple(task(t)[name] for t in range(3)), adapters=labels)
        got = sm.on_one_layer(
            sm.regmean(float(ratio), {k: {name: gram} for k, gram in zip(labels, merged[name])}),
            layer,
        ).dense()
        base = tensor(f"d3/base/{golden}/W0")
        assert error(base + got, tensor(f"regmean/d3/a{ratio}/{golden}/W")) < 1e-5


def test_regmean_identities() -> None:
    for layer in make_layers([2, 0, 3], weights=(1.0, 0.5, 0.7)):
        n = layer.shape[1]
        alike = {label: {layer.name: 3 * torch.eye(n)} for label in layer.adapters}
        diagonal = {label: {layer.name: 3 * torch.ones(n)} for label in layer.adapters}
        for grams in (alike, diagonal):
            assert (
                error(
                    sm.on_one_layer(sm.regmean(grams=grams), layer).dense(),
                    sm.mean()(layer).dense(),
                )
                < 1e-12
            )
        # The same on W = W0 + D.
        G = {
            a: {layer.name: low_rank((n, n), n, k).dense() for k in [i]}
            for i, a in enumerate(layer.adapters)
        }
        G = {a: {name: g.T @ g for name, g in found.items()} for a, found in G.items()}
        W0 = low_rank(layer.shape, 4, 9).dense()
        whole = changed(layer, updates=tuple(sm.Dense(W0 + u.dense()) for u in layer))
        got = sm.on_one_layer(sm.regmean(grams=G), whole).dense() - W0
        assert error(got, sm.on_one_layer(sm.regmean(grams=G), layer).dense()) < 1e-9


def test_given_grams_are_taken_into_a_basis() -> None:
    layer, grams = s3_layers()[0], given()
    plainly = sm.on_one_layer(sm.regmean(0.9, grams), layer).dense()
    shared = sm.on_one_layer(sm.In(sm.SharedBasis(), sm.regmean(0.9, grams)), layer)
    assert error(shared.dense(), plainly) < 1e-9
    core = sm.on_one_layer(sm.In(sm.CoreSpace(), sm.regmean(0.5, grams)), layer).dense()
    frames = sm.CoreSpace()(layer)
    assert frames.V is not None
    inside = {
        label: {layer.name: frames.V.T @ found[layer.name] @ frames.V}
        for label, found in grams.items()
    }
    small = changed(layer, updates=tuple(frames.inside(update) for update in layer))
    assert (
        error(core, frames.outside(sm.on_one_layer(sm.regmean(0.5, inside), small)).dense()) < 1e-9
    )


@pytest.mark.parametrize("shape", ["matrix", "diagonal"])
def test_regmean_where_no_anchor_looks(shape: str) -> None:
    """A singular sum of Gram matrices: the pseudo-inverse drops what nobody has seen,
    `unseen` keeps the mean of it.
    """
    layer = make_layers([2, 3], {"l": (5, 6)})[0]
    frame = (
        torch.linalg.qr(low_rank((6, 4), 4, 1).dense())[0]
        if shape == "matrix"
        else torch.eye(6)[:, :4].double()
    )
    cores = [
        low_rank((4, 4), 4, k).dense() if shape == "matrix" else torch.diag(torch.rand(4).double())
        for k in (2, 3)
    ]
    G = [frame @ core @ core.T @ frame.T for core in cores]
    grams = {a: {"l": g if shape == "matrix" else g.diagonal()} for a, g in zip(layer.adapters, G)}
    D = [update.dense() for update in layer]
    wanted = sum(d @ g for d, g in zip(D, G)) @ torch.linalg.pinv(
        sum(G), rtol=1e-10, hermitian=True
    )
    assert error(sm.on_one_layer(sm.regmean(1.0, grams), layer).dense(), wanted) < 1e-8
    rest = torch.eye(6).double() - frame @ frame.T
    assert (
        error(
            sm.on_one_layer(sm.regmean(1.0, grams, unseen=1.0), layer).dense(),
            wanted + sum(D) / 2 @ rest,
        )
        < 1e-8
    )
    one = changed(
        layer,
        updates=layer.updates[:1],
        adapters=layer.adapters[:1],
        weights=(1.0,),
        digests=("d",),
    )
    assert error(sm.on_one_layer(sm.regmean(1.0, grams, unseen=1.0), one).dense(), D[0]) < 1e-8


def test_what_is_prepared_does_not_ask_again() -> None:
    """The model may change between the pre-pass and the merge."""
    _anchors, layers, model, _, _ = plain()
    for method in (
        sm.fisher(),
        sm.regmean(),
        sm.tune((sm.mean(), sm.regmean())),
        sm.adamerging(steps=2),
    ):
        prepared = sm.prepare(method, layers)
        before = [prepared(layer).dense() for layer in layers]
        model.head.weight.data += 1.0
        after = [prepared(layer).dense() for layer in layers]
        model.head.weight.data -= 1.0
        assert all(torch.equal(one, other) for one, other in zip(before, after))


# --- tune
# ----------------------------------------------------------------------------------------


def test_tune_finds_the_scale_and_the_method_that_made_the_data() -> None:
    model, target = models.Plain().double(), None
    updates = [random_updates(model, ["head"], 2, k) for k in (1, 2)]
    # 1.5 times the mean
    target = 0.5 * (updates[0]["head"].dense() + updates[1]["head"].dense()) * 1.5
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double()
    wanted = nn.functional.linear(x, model.head.weight.detach() + target, model.head.bias.detach())
    head = nn.Sequential()
    head.add_module("head", model.head)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    for size in (12, 3):
        loader = [{"x": a, "y": b} for a, b in zip(x.split(size), wanted.split(size))]
        _, layers = anchored(head, loader, updates, loss)
        notes: dict[str, Any] = {}
        scales = (0.5, 1.0, 1.5, 2.0)
        method = sm.tune(
            {"ties": sm.ties(0.2), "mean": sm.mean(), "pruned": sm.magnitude_prune(0.3)}, scales
        )
        prepared = sm.prepare(method, layers)
        got = prepared(changed(layers[0], record=notes.__setitem__))
        assert error(got.dense(), target) < 1e-12
        assert notes["tuned"]["chosen"] == "mean"
        assert notes["tuned"]["scale"] == 1.5
        curve = notes["tuned"]["loss"]
        assert set(curve) == {"ties", "mean", "pruned"}
        assert curve["mean"][1.5] < 1e-20 < curve["mean"][1.0] < curve["mean"][0.5]
        half = x[1::2] if size == 12 else torch.cat(x.split(3)[1::2])
        # at scale 1, a third of the target is missing
        residual = nn.functional.linear(half, target / 3)
        assert abs(curve["mean"][1.0] - float(residual.square().mean())) < 1e-12


def test_tune_prepares_on_one_half_and_looks_at_the_other() -> None:
    asked: list[tuple[str, object]] = []

    class Halves(conftest.LinearLoss):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def halves(self) -> tuple[Halves, Halves]:
            return Halves("even"), Halves("odd")

        def observe(self, layers: sm.LayerStream, units: sm.Units) -> Any:
            asked.append(("observe", self.name))
            return super().observe(layers, units)

        def loss_of(self, updates: Any, loss: Any = None) -> float:
            asked.append(("loss", self.name))
            return super().loss_of(updates, loss)

    layers = conftest.Anchored(make_layers(), Halves("all"))
    sm.prepare(sm.tune((sm.sap_original(0.5), sm.mean())), layers)
    steps = [step for step, _ in groupby(asked)]
    assert steps[:2] == [("observe", "even"), ("loss", "odd")]
    assert set(steps[2:]) <= {("observe", "all")}
    assert asked.count(("loss", "odd")) == 2


def test_tune_in_a_basis_measures_the_update_itself() -> None:
    _anchors, layers, *_ = plain()
    for basis in (sm.SharedBasis(), sm.SharedBasis(scaled=False), sm.CoreSpace()):
        curves = []
        for method in (
            sm.tune((sm.mean(),), (0.5, 1.0)),
            sm.In(basis, sm.tune((sm.mean(),), (0.5, 1.0))),
        ):
            notes: dict[str, Any] = {}
            sm.prepare(method, layers)(changed(layers[0], record=notes.__setitem__))
            curves.append(next(iter(notes["tuned"]["loss"].values())))
        assert all(abs(curves[0][scale] - curves[1][scale]) < 1e-9 for scale in (0.5, 1.0))


def test_halves_are_every_other_batch_or_sample() -> None:
    model = models.clip()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS])
    updates = [{name: adapter.update(name) for name in adapter.modules} for adapter in adapters]
    for sizes, wanted in (((4, 3, 2), ([4, 2], [3])), ((5,), ([3], [2]))):
        anchors, _ = anchored(model, models.pairs(sizes), updates)
        halves = anchors.halves()
        assert anchors.used
        assert (
            tuple([len(batch["input_ids"]) for batch in half.batches] for half in halves) == wanted
        )
        if len(sizes) == 1:
            whole = models.pairs(sizes)[0]
            assert torch.equal(
                next(iter(halves[1].batches))["pixel_values"], whole["pixel_values"][1::2]
            )
    anchors, _ = anchored(model, models.pairs((1,)), updates)
    with pytest.raises(AnchorError, match="halves"):
        anchors.halves()
    lonely = [{**models.pairs((3,))[0], "table": torch.zeros(7)}]
    anchors, _ = anchored(
        model, lonely, updates, lambda model, batch: model(batch["pixel_values"]).sum()
    )
    with pytest.raises(AnchorError, match="told apart"):
        anchors.halves()


# --- scorers on activations
# ----------------------------------------------------------------------------------------


def wanda_layers() -> tuple[conftest.Anchored, nn.Module, list[dict[str, Tensor]]]:
    module = nn.Sequential()
    module.add_module("l", nn.Linear(16, 24, bias=False).double())
    loader = [{"input": x[None]} for x in tensor("wanda/toy/X")]
    layers = anchored(
        module, loader, [{"l": sm.Dense(tensor("wanda/toy/W"))}], lambda m, b: m(b["input"]).mean()
    )[1]
    return layers, module, loader


def test_activation_is_wanda() -> None:
    layers, *_ = wanda_layers()
    seen: list[Tensor] = []

    def scorer(values: Tensor, stats: sm.Stats) -> Tensor:
        seen.append(sm.Activation()(values, stats))
        return seen[-1]

    method = sm.Chain(sm.Prune(scorer, sm.PerRow(0.5)), sm.Mean())
    merged = sm.prepare(method, layers)(layers[0]).dense()
    assert error(seen[0], tensor("wanda/toy/metric")) < 1e-6
    kept = tensor("wanda/toy/metric").argsort(1, descending=True)[:, :8]
    wanted = torch.zeros(24, 16).double().scatter(1, kept, tensor("wanda/toy/W").gather(1, kept))
    assert torch.equal(merged, wanted)


def test_activation_on_directions_is_the_norm_of_their_outputs() -> None:
    _anchors, layers, model, loader, updates = plain()
    head = next(layer for layer in layers if layer.name == "head")
    x = torch.cat([torch.cat(calls) for calls in inputs_of(model, updates[1], loader, "head")])
    spy = {}

    def scorer(values: Tensor, stats: sm.Stats) -> Tensor:
        spy.setdefault((stats.adapter, stats.layer), sm.Activation()(values, stats))
        return values

    sm.prepare(
        sm.Chain(sm.Prune(scorer, sm.TopFraction(0.5), units=sm.Directions()), sm.Mean()), layers
    )
    U, sigma, Vh = head.updates[1].svd()
    for k in range(3):
        output = torch.outer(x @ Vh[k], U[:, k] * sigma[k])
        assert abs(float(spy["a1", "head"][k]) - float(output.norm()) / 7**0.5) < 1e-9


def test_snip_is_a_share_of_the_tensor() -> None:
    class Stats:
        def moment(self, statistic: str, at: str) -> Tensor:
            assert (statistic, at) == ("mean", "base")
            return torch.tensor([2.0, -1.0, 0.0])

    values = torch.tensor([1.0, -2.0, 5.0])
    assert sm.SNIP(at="base")(values, Stats()).tolist() == [0.5, 0.5, 0.0]  # type: ignore[arg-type]
    assert sm.SNIP(at="base")(values * 0, Stats()).tolist() == [0.0, 0.0, 0.0]  # type: ignore[arg-type]


def test_saliency_of_factors_is_the_reference() -> None:
    """Our gradients and scores against the recorded ones of a linear layer with a cross entropy."""
    X, y, W0 = (
        tensor("lora_vs_dense/q_proj/X"),
        NUMBERS["lora_vs_dense/q_proj/y"],
        tensor(f"d3/base/{Q}/W0"),
    )
    module = nn.Sequential()
    module.add_module("l", nn.Linear(16, 24, bias=False))
    module.l.weight = nn.Parameter(W0)
    update = sm.LowRank(2.0 * tensor(f"s3/t0/{Q}/B"), tensor(f"s3/t0/{Q}/A"))

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    anchors, layers = anchored(module, [{"x": X, "y": y}], [{"l": update}], loss)
    key = "lora_vs_dense/q_proj"
    assert abs(anchors.losses()[0] - float(tensor(f"{key}/loss"))) < 1e-10
    entries = anchors.observe(layers, sm.Entries())
    G = sum(entries.moment("l", 0, "entries", "mean", "adapter")) / 2
    assert error(G, tensor(f"{key}/G")) < 1e-9
    assert error((update.dense() * G).abs(), tensor(f"{key}/score_dense")) < 1e-9
    # They sum over the parts of seven samples in the mean loss; ours are means over the losses of
    # the samples.
    square, absolute = (
        sum(entries.moment("l", 0, "entries", statistic, "adapter")) / 2
        for statistic in ("square", "absolute")
    )
    assert error(square / 7, tensor(f"{key}/fisher_diag_sumsq")) < 1e-9
    assert error(absolute * update.dense().abs(), tensor(f"{key}/per_sample_abs_sum")) < 1e-9
    directions = anchors.observe(layers, sm.Directions()).moment(
        "l", 0, "directions", "mean", "adapter"
    )
    sigma = sm.Directions()(update).values["directions"]
    scores = ((directions[0] + directions[1]) / 2 * sigma).abs()
    assert error(scores, tensor(f"{key}/singular_scores")) < 1e-9


# --- errors
# ----------------------------------------------------------------------------------------


def test_what_is_missing_is_said() -> None:
    layers = make_layers()
    for method in (sm.fisher(), sm.regmean(), sm.tune(), sm.adamerging()):
        with pytest.raises(MethodError, match="anchors and a model"):
            sm.prepare(method, layers)
        with pytest.raises(MethodError, match="looks at whole adapters"):
            method(layers[0])
    with pytest.raises(MethodError, match="anchors and a model"):
        sm.Chain(sm.Prune(sm.Activation(), sm.PerRow(0.5)), sm.Mean())(layers[0])
    layers = conftest.Anchored(layers, conftest.LinearLoss())
    pruned = sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(0.5)), sm.FisherMean())
    with pytest.raises(MethodError, match="only the first step"):
        sm.prepare(pruned, layers)
    _anchors, real, *_ = plain()
    with pytest.raises(MethodError, match="single inputs"):
        sm.prepare(
            sm.Chain(sm.Prune(sm.Activation(), sm.TopFraction(0.5), units=sm.Layers()), sm.Mean()),
            real,
        )


class Hiding(nn.Module):
    """What is not finite after the first layer is hidden from the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).nan_to_num(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("order", "what"), [((0, 1), "output of layer 'first'"), ((1, 0), "inputs of layer 'first'")]
)
def test_inputs_that_are_not_finite_are_refused(order: tuple[int, int], what: str) -> None:
    """Those of a layer without an update, too."""
    x = torch.randn(4, 3).double()
    x[1, 2] = float("inf")
    model = Hiding()
    updates = [random_updates(model, [name], 1, 0) for name in ("first", "second")]
    _, layers = anchored(
        model, [{"x": x}], [updates[k] for k in order], lambda m, b: m(b["x"]).mean()
    )
    with pytest.raises(NonFiniteError, match=what):
        sm.prepare(sm.regmean(), layers)


def test_wrong_arguments_are_named() -> None:
    for make in (
        lambda: sm.fisher(floor=-1.0),
        lambda: sm.fisher(floor=float("nan")),
        lambda: sm.fisher(square="mean"),
        lambda: sm.regmean(1.5),
        lambda: sm.regmean(unseen=2.0),
        lambda: sm.tune({}),
        lambda: sm.tune((sm.mean(),), ()),
        lambda: sm.tune((sm.mean(),), (float("inf"),)),
    ):
        with pytest.raises(MethodError):
            make()
    layer = make_layers([2, 2], {"l": (4, 5)})[0]
    for grams in (
        {},
        {"a0": {"l": torch.eye(5)}},
        {"a0": {"l": torch.eye(4)}, "a1": {"l": torch.eye(5)}},
        {a: {"l": torch.full((5, 5), float("nan"))} for a in ("a0", "a1")},
    ):
        with pytest.raises(MethodError, match="Gram"):
            sm.on_one_layer(sm.regmean(grams=grams), layer)
    for method in (
        sm.fisher(0.1, "batch", True),
        sm.regmean(0.5, unseen=1.0),
        sm.tune({0.5: sm.sap(0.5)}, (1.0, 2.0)),
    ):
        assert repr(sm.parse(repr(method))) == repr(method)
    named = sm.tune((sm.mean(), sm.ByModule({"*": sm.mean()}, sm.mean())))
    assert list(named.candidates) == ["Chain(Mean())", "candidate 2"]
    assert repr(sm.parse(repr(named))) == repr(named)
    assert set(run(sm.regmean(), make_layers([0, 0])))


def test_entropy_is_that_of_the_predictions() -> None:
    model, batch = models.clip(), models.pairs((4,))[0]
    output = model(**batch)
    p = torch.softmax(output.logits_per_image, -1)
    assert (
        abs(float(entropy(model, batch).detach()) - float(-(p * p.log()).sum(-1).mean().detach()))
        < 1e-4
    )
    model, batch = models.llama(), models.sentences((3,))[0]
    p = torch.softmax(model(**batch).logits, -1)
    assert (
        abs(float(entropy(model, batch).detach()) - float(-(p * p.log()).sum(-1).mean().detach()))
        < 1e-4
    )
    with pytest.raises(AnchorError, match="dict batches"):
        entropy(nn.Linear(2, 2), torch.zeros(1, 2))  # type: ignore[arg-type]


def test_through_merge_on_a_clip() -> None:
    """The whole way, float32: every method runs, its loss is recorded,
    and the model is as it was.
    """
    model, loader = models.clip(), models.pairs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters, _ = models.adapters(model, [models.BOTH_TARGETS, models.VISION_TARGETS])
    wanda = sm.Chain(sm.Prune(sm.Activation(), sm.PerRow(0.5)), sm.Mean())
    factors = sm.Chain(
        sm.Prune(sm.Activation(), sm.TopFraction(0.5), units=sm.Factors()), sm.Mean()
    )
    methods = {
        "fisher": sm.fisher(),
        "regmean": sm.regmean(),
        "tune": sm.tune((sm.mean(), sm.ties(0.3)), (0.5, 1.0)),
        "adamerging": sm.adamerging(loss=entropy, steps=2),
        "loraprune": sm.loraprune(),
        "gradpruner": sm.gradpruner(),
        "movement": sm.movement([("a0", "a1")], score=sm.LossDecrease()),
        "wanda": wanda,
        "wanda on factors": factors,
        "in a basis": sm.In(sm.CoreSpace(), sm.regmean()),
        "fisher in a basis": sm.In(sm.CoreSpace(), sm.fisher()),
        "fisher per batch": sm.fisher(square="batch", normalize=True),
    }
    for name, method in methods.items():
        merged = models.merge(adapters, loader, model, method=method)
        updates = dict(merged.updates())
        assert sum(update.norm() for update in updates.values()) > 0, name
        again = dict(models.merge(adapters[::-1], loader, model, method=method).updates())
        assert all(torch.equal(updates[key].dense(), again[key].dense()) for key in updates), name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = models.merge(adapters, loader, model, method=methods["tune"]).report
    assert report.notes["tuned"]["chosen"]
