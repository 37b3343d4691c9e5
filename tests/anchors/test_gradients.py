"""Gradients in the coordinates of every unit, against plain autograd on the dense weight W0 + D,
in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.anchors import statistics as observing
from sapmerge.core.frames import Frames
from sapmerge.core.linalg import finite
from sapmerge.errors import AnchorError, MethodError
from sapmerge.losses import alignment, centered_alignment, contrastive, language_modeling
from tests.anchors import models
from tests.anchors.models import anchored, dense_gradients, random_updates, spied
from tests.conftest import error

UNITS = {
    "factors": sm.Factors(),
    "directions": sm.Directions(),
    "entries": sm.Entries(),
    "layers": sm.Layers(),
}
WRAPS: dict[str, tuple[Any, ...]] = {
    "plain": (),
    "shared": (sm.SharedBasis(),),
    "unscaled": (sm.SharedBasis(scaled=False),),
    "core": (sm.CoreSpace(),),
    "unbalanced": (sm.CoreSpace(balance=False),),
    "nested": (sm.SharedBasis(), sm.CoreSpace()),
    "nested, unscaled": (sm.CoreSpace(), sm.SharedBasis(scaled=False)),
}
LINEAR = ["conv", "same", "line", "twice", "head", "words"]


def in_bases(bases: Sequence[Any]) -> Callable[[Any], Any]:
    def wrap(method: Any) -> Any:
        for basis in reversed(bases):
            method = sm.In(basis, method)
        return method

    return wrap


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, sm.Update]]]:
    model = models.Plain().double()
    batches = [
        {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
        for b in models.plain_batches()
    ]
    updates = [random_updates(model, LINEAR, 2, 1), random_updates(model, LINEAR[2:], 3, 2)]
    return model, batches, updates


def expected(
    layer: sm.Layer, k: int, G: Tensor, units: Any, bases: Sequence[Any]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The unit's values, and by autograd through `join` and the frames the gradient of <G,
    D(values)>.
    """
    frames: list[Frames] = []
    for basis in bases:
        frames.append(basis(layer))
        layer = sm.Layer(layer.name, tuple(frames[-1].inside(update) for update in layer))
    coordinates = units(layer.updates[k])
    leaves = {name: value.clone().requires_grad_() for name, value in coordinates.values.items()}
    if "layer" in leaves:  # join takes a number: D = v D0 / ||D0||
        update: sm.Update = layer.updates[k]
        update = sm.Dense(update.dense() / update.norm() * leaves["layer"])
    else:
        update = coordinates.join(leaves)
    for frame in reversed(frames):
        update = frame.outside(update)
    (update.dense() * G).sum().backward()
    return coordinates.values, {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("bases", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_units_against_autograd(plain: Any, units: Any, bases: Sequence[Any]) -> None:
    model, batches, updates = plain
    _, layers = anchored(model, batches, updates, models.plain_loss)
    spy = spied(layers, units, in_bases(bases))
    seen = 0
    for k, found in enumerate(updates):
        _, gradients, _ = dense_gradients(model, found, batches, models.plain_loss)
        for layer in layers:
            if layer.name in found:
                assert float(gradients[layer.name].norm()) > 1e-4
                values, wanted = expected(layer, k, gradients[layer.name], units, bases)
                for part, grad in wanted.items():
                    key = (f"a{k}", layer.name, part)
                    assert torch.equal(spy.values[key], values[part])
                    assert error(spy.gradient[key], grad) < 1e-9, key
                    seen += 1
    assert seen == len(spy.gradient) > 0


MODELS = {
    "clip": (
        models.clip,
        models.pairs,
        alignment,
        ["vision_model.encoder.layers.0.self_attn.q_proj", "text_projection"],
    ),
    "clip, centered": (
        models.clip,
        models.pairs,
        centered_alignment,
        [
            "visual_projection",
            "text_model.embeddings.token_embedding",
            "vision_model.embeddings.patch_embedding",
        ],
    ),
    "siglip": (
        models.siglip,
        lambda: models.pairs(masked=False),
        contrastive,
        ["vision_model.encoder.layers.1.mlp.fc1"],
    ),
    "dual encoder": (
        models.dual_encoder,
        models.pairs,
        alignment,
        ["text_model.encoder.layer.0.output.dense", "vision_model.encoder.layers.0.mlp.fc1"],
    ),
    "llama": (
        models.llama,
        models.sentences,
        language_modeling,
        ["model.layers.0.mlp.up_proj", "model.embed_tokens"],
    ),
    "llava": (
        models.llava,
        models.prompts,
        language_modeling,
        [
            "model.vision_tower.encoder.layers.0.self_attn.k_proj",
            "model.multi_modal_projector.linear_1",
            "model.language_model.layers.1.self_attn.o_proj",
            "lm_head",
        ],
    ),
}


@pytest.mark.parametrize(("build", "batches", "loss", "names"), MODELS.values(), ids=MODELS)
def test_models_against_autograd(build: Any, batches: Any, loss: Any, names: list[str]) -> None:
    model = build().double()
    loader = [
        {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        for batch in batches()
    ]
    names = [
        name if has(model, name) else name.replace("vision_tower.", "vision_tower.vision_model.")
        for name in names
    ]
    updates = random_updates(model, names, 2, 3)
    anchors, layers = anchored(model, loader, [updates], loss)
    spy = spied(layers, sm.Entries())
    value, gradients, _ = dense_gradients(model, updates, loader, loss)
    # the models' own loss is float32 inside
    tolerance = 1e-6 if loss is language_modeling else 1e-9
    for name in names:
        assert float(gradients[name].norm()) > 1e-6
        assert error(spy.gradient["a0", name, "entries"], gradients[name]) < tolerance, name
    assert anchors.losses()[0] == pytest.approx(value, rel=1e-6)


def has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def test_the_identities_of_first_order_saliency(plain: Any) -> None:
    """sum A*dA = <D, G> = sum B*dB; rank by rank too;
    the directions and the layer sum to the same.
    """
    model, batches, updates = plain
    _, layers = anchored(model, batches, updates, models.plain_loss)
    seen = {name: spied(layers, units) for name, units in UNITS.items()}
    _, gradients, _ = dense_gradients(model, updates[0], batches, models.plain_loss)
    for name, update in updates[0].items():
        effect = float((update.dense() * gradients[name]).sum())
        products = {
            (unit, part): spy.values["a0", name, part] * spy.gradient["a0", name, part]
            for unit, spy in seen.items()
            for part in ("A", "B", "directions", "entries", "layer")
            if ("a0", name, part) in spy.values
        }
        assert len(products) == 5
        for product in products.values():
            assert float(product.sum()) == pytest.approx(effect, rel=1e-9, abs=1e-12)
        rho = products["factors", "A"].sum(1)
        assert torch.allclose(rho, products["factors", "B"].sum(0), rtol=1e-9, atol=1e-12)
        # balanced factors
        assert torch.allclose(rho, products["directions", "directions"], rtol=1e-9, atol=1e-12)


def test_directions_without_a_dense_gradient(plain: Any) -> None:
    """u_i^T G v_i = u_i^T dB z_i with v_i = A^T z_i (identity 4.5), from dB = G A^T alone."""
    model, batches, updates = plain
    _, layers = anchored(model, batches, updates, models.plain_loss)
    spy = spied(layers, sm.Directions())
    _, gradients, _ = dense_gradients(model, updates[0], batches, models.plain_loss)
    for name, update in updates[0].items():
        assert isinstance(update, sm.LowRank)
        dB = gradients[name] @ update.A.T
        U, _, Vh = update.svd()
        z = torch.linalg.solve(update.A @ update.A.T, update.A @ Vh.T)
        assert error(spy.gradient["a0", name, "directions"], (U * (dB @ z)).sum(0)) < 1e-9


@pytest.mark.parametrize(
    "bases", [(), (sm.SharedBasis(),), (sm.CoreSpace(),)], ids=["plain", "shared", "core"]
)
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_the_factorisation_of_an_adapter_changes_nothing(
    plain: Any, units: Any, bases: Sequence[Any]
) -> None:
    model, batches, updates = plain
    R = {
        r: torch.randn(r, r, dtype=torch.float64) + 3 * torch.eye(r, dtype=torch.float64)
        for r in (2, 3)
    }
    Q = {r: torch.linalg.qr(matrix).Q for r, matrix in R.items()}
    gauges: list[Callable[[sm.LowRank], sm.LowRank]] = [
        lambda u: sm.LowRank(u.B / 7, u.A * 7),
        lambda u: sm.LowRank(u.B @ Q[u.rank].T, Q[u.rank] @ u.A),
        lambda u: sm.LowRank(u.B @ torch.linalg.inv(R[u.rank]), R[u.rank] @ u.A),
    ]
    scores = scores_of(model, batches, updates, units, bases)
    for gauge in gauges:
        other = [{name: gauge(update) for name, update in found.items()} for found in updates]
        for key, score in scores_of(model, batches, other, units, bases).items():
            assert error(score, scores[key]) < 1e-9, key


def scores_of(model: Any, batches: Any, updates: Any, units: Any, bases: Any) -> dict[Any, Tensor]:
    _, layers = anchored(model, batches, updates, models.plain_loss)
    spy = spied(layers, units, in_bases(bases))
    return {key: (value * spy.gradient[key]).abs() for key, value in spy.values.items()}


@pytest.mark.parametrize("at", ["adapter", "base"])
@pytest.mark.parametrize(
    ("statistic", "function"), [("absolute", torch.abs), ("square", torch.square)]
)
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_statistics_per_sample_equal_a_loop_over_samples(
    plain: Any, units: Any, statistic: str, function: Any, at: str
) -> None:
    model, batches, updates = plain
    _, layers = anchored(model, batches, updates, models.plain_loss)
    spy = spied(layers, units, statistic=statistic, at=at)
    zero = {name: update.scaled(0.0) for name, update in updates[0].items()}
    _, _, each = dense_gradients(
        model, updates[0] if at == "adapter" else zero, models.singles(batches), models.plain_loss
    )
    assert len(each) == 7
    for layer in layers:
        per_sample = (
            [expected(layer, 0, grads[layer.name], units, ())[1] for grads in each]
            if layer.updates[0].rank
            else []
        )
        for part in per_sample[0] if per_sample else ():
            wanted = sum(function(found[part]) for found in per_sample) / len(each)
            assert error(spy.gradient["a0", layer.name, part], wanted) < 1e-9


@pytest.mark.parametrize(
    ("scorer", "formula"),
    [
        (sm.Taylor(), lambda v, g, a, s: (v * g).abs()),
        (sm.SignedTaylor(), lambda v, g, a, s: -v * g),
        (sm.PerSampleTaylor(), lambda v, g, a, s: v.abs() * a),
        (sm.SecondOrder(), lambda v, g, a, s: v.square() * s / 2),
    ],
)
def test_scorers(plain: Any, scorer: Any, formula: Any) -> None:
    model, batches, updates = plain
    _, layers = anchored(model, batches, updates, models.plain_loss)
    spies = [spied(layers, sm.Factors(), statistic=s) for s in ("mean", "absolute", "square")]
    found: dict[Any, Tensor] = {}

    def kept(values: Tensor, stats: Any) -> Tensor:
        scores = scorer(values, stats)
        if stats.half is None:
            found[stats.adapter, stats.layer, stats.part] = scores
        return scores

    sm.prepare(sm.Prune(kept, sm.TopFraction(0.5), units=sm.Factors()), layers)
    assert found
    for key, scores in found.items():
        assert torch.allclose(
            scores, formula(spies[0].values[key], *(spy.gradient[key] for spy in spies))
        )


def test_the_halves_average_to_the_whole_and_are_every_other_sample(plain: Any) -> None:
    model, batches, updates = plain
    anchors, layers = anchored(model, batches, updates, models.plain_loss)
    _, _, each = dense_gradients(model, updates[0], models.singles(batches), models.plain_loss)
    observation = anchors.observe(layers, sm.Entries())
    for statistic, function in (
        ("mean", lambda g: g),
        ("absolute", torch.abs),
        ("square", torch.square),
    ):
        one, other = observation.moment("twice", 0, "entries", statistic, "adapter")
        terms = [function(grads["twice"]) for grads in each]
        assert error((one + other) / 2, sum(terms) / 7) < 1e-9
        assert error(one, 2 * sum(terms[::2]) / 7) < 1e-9
        assert error(other, 2 * sum(terms[1::2]) / 7) < 1e-9
    with pytest.raises(MethodError, match="'mean', 'absolute' or 'square'"):
        observation.moment("twice", 0, "entries", "median", "adapter")


def test_one_sample_has_no_halves(plain: Any) -> None:
    model, batches, updates = plain
    anchors, layers = anchored(model, models.singles(batches)[:1], updates, models.plain_loss)
    one, other = anchors.observe(layers, sm.Factors()).moment("head", 1, "B", "mean", "adapter")
    assert torch.equal(one, other)
    assert float(one.norm()) > 0


@pytest.mark.parametrize("sizes", [(7,), (1, 6), (2, 2, 3), (1,) * 7])
def test_batches_of_any_size_are_weighted_by_samples(plain: Any, sizes: Sequence[int]) -> None:
    model, batches, updates = plain
    samples = models.singles(batches)
    split, start = [], 0
    for size in sizes:
        rows = samples[start : start + size]
        split.append({key: torch.cat([row[key] for row in rows]) for key in rows[0]})
        start += size
    for statistic in ("mean", "absolute"):
        whole = spied(
            anchored(model, batches, updates, models.plain_loss)[1],
            sm.Factors(),
            statistic=statistic,
        )
        other = spied(
            anchored(model, split, updates, models.plain_loss)[1], sm.Factors(), statistic=statistic
        )
        for key, gradient in whole.gradient.items():
            assert error(other.gradient[key], gradient) < 1e-9


def test_gradients_at_the_base_take_one_pass_for_all_adapters(plain: Any) -> None:
    model, batches, updates = plain
    anchors, layers = anchored(model, batches, updates, models.plain_loss)
    passes: list[int | None] = []
    run = anchors.backward
    anchors.backward = lambda adapter, watched: (passes.append(adapter), run(adapter, watched))[1]  # type: ignore
    spy = spied(layers, sm.Factors(), at="base")
    assert passes == [None]
    zero = {name: update.scaled(0.0) for found in updates for name, update in found.items()}
    _, gradients, _ = dense_gradients(model, zero, batches, models.plain_loss)
    for layer in layers:
        for k, update in enumerate(layer):
            if update.rank:
                for part, grad in expected(layer, k, gradients[layer.name], sm.Factors(), ())[
                    1
                ].items():
                    assert error(spy.gradient[f"a{k}", layer.name, part], grad) < 1e-9
    spied(layers, sm.Factors())
    assert passes == [None, 0, 1]


@pytest.mark.parametrize("units", [sm.Factors(), sm.Entries()], ids=["factors", "entries"])
@pytest.mark.parametrize("scope", ["layer", "adapter"])
def test_a_small_budget_changes_passes_and_nothing_else(plain: Any, units: Any, scope: str) -> None:
    model, batches, updates = plain
    results, passes = [], []
    entries = units == sm.Entries()
    sizes = [
        sum(8 * (math.prod(u.shape) if entries else u.rank * sum(u.shape)) for u in found.values())
        for found in updates
    ]
    for budget in (1 << 30, max(sizes), 1):
        anchors, layers = anchored(model, batches, updates, models.plain_loss, budget=budget)
        count, run = [0], anchors.backward
        anchors.backward = lambda *args, count=count, run=run: (count.append(1), run(*args))[1]  # type: ignore

        # two statistics: the groups must not drive each other out
        def both(values: Tensor, stats: Any) -> Tensor:
            return values.abs() * (stats.gradient.abs() + stats.moment("square").sqrt())

        method = sm.prepare(sm.Prune(both, sm.TopFraction(0.5, scope), units=units), layers)
        results.append([update.dense() for layer in layers for update in method(layer)])
        passes.append(sum(count))
    for same in zip(*results):
        assert all(torch.equal(same[0], other) for other in same[1:])
    sweeps = 1 if scope == "layer" else 3
    # two statistics of two adapters, also in turn; per layer of each
    assert passes == [
        4,
        4,
        2 * sweeps * (6 + 4),
    ]


def test_adapters_that_do_not_fit_together_have_their_turns(plain: Any) -> None:
    model, batches, updates = plain
    anchors, layers = anchored(model, batches, updates, models.plain_loss)
    assert [turn for turn, _ in anchors.in_turn(layers, sm.Factors())] == [[0, 1]]
    anchors.budget = 1000
    turns = [
        (turn, seen, seen.moment("head", turn[0], "B", "mean", "adapter"))
        for turn, seen in anchors.in_turn(layers, sm.Factors())
    ]
    assert [turn for turn, _, _ in turns] == [[0], [1]]
    whole = anchored(model, batches, updates, models.plain_loss)[0].observe(layers, sm.Factors())
    for (k,), seen, halves in turns:
        assert all(map(torch.equal, halves, whole.moment("head", k, "B", "mean", "adapter")))
        with pytest.raises(KeyError):
            seen.moment("head", 1 - k, "B", "mean", "adapter")


@pytest.mark.parametrize("count", [2, 4, 5, 7, 9, 16])
def test_all_have_had_their_turn_after_four(
    plain: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """And what is the same for all of them ran once."""
    model, batches, updates = plain
    anchors, layers = anchored(model, batches, [updates[0]] * count, models.plain_loss)
    monkeypatch.setattr(observing, "_LEAST", 1)
    passes: list[int | None] = []
    run = anchors.backward
    anchors.backward = lambda adapter, watched: (passes.append(adapter), run(adapter, watched))[1]  # type: ignore
    turns = [turn for turn, _ in anchors.in_turn(layers, sm.Factors())]
    assert [k for turn in turns for k in turn] == list(range(count))
    assert 1 < len(turns) <= 4
    spied(layers, sm.Factors(), at="base")
    assert passes == [None]
    spied(layers, sm.Factors())
    assert passes[1:] == list(range(count))


def test_a_layer_without_gradient_in_a_group_of_its_own(plain: Any) -> None:
    """It is a warning with a small budget, too; a loss that depends on no layer at
    all is an error.
    """

    def loss(model: Any, batch: Any) -> Tensor:
        return model.head(batch["x"]).square().mean()

    model, _, updates = plain
    inputs = [{"x": torch.randn(3, model.head.in_features).to(next(model.parameters()))}]
    found = []
    for budget in (1 << 30, 1):
        _, layers = anchored(model, inputs, updates, loss, budget=budget)
        with pytest.warns(sm.SapmergeWarning, match="take no part in the anchor loss"):
            method = sm.prepare(sm.sap_original(0.5), layers)
        found.append({layer.name: method(layer).dense() for layer in layers})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    _, layers = anchored(model, inputs, updates, lambda model, batch: batch["x"].sum())
    with pytest.raises(AnchorError, match="depends on no layer that the adapters change"):
        sm.prepare(sm.sap_original(0.5), layers)


def test_samples_that_a_layer_mixes() -> None:
    """A layer that sees all samples as one row of tokens: exact means, no statistics per sample."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.reshape(-1, 3)).tanh().view(len(x), -1).sum(1)

    model = Mixing().double()
    batches = [{"x": torch.randn(size, 4, 3, dtype=torch.float64)} for size in (2, 5)]
    loss = lambda model, batch: model(**batch).mean()  # noqa: E731
    updates = random_updates(model, ["layer"], 1, 0)
    _, layers = anchored(model, batches, [updates], loss)
    spy = spied(layers, sm.Entries())
    assert (
        error(
            spy.gradient["a0", "layer", "entries"],
            dense_gradients(model, updates, batches, loss)[1]["layer"],
        )
        < 1e-9
    )
    with pytest.raises(AnchorError, match=r"8 rows|1 rows for 2 samples"):
        spied(anchored(model, batches, [updates], loss)[1], sm.Entries(), statistic="absolute")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        lambda: nn.Conv2d(3, 4, 2, stride=2, padding="valid"),
        lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular"),
        lambda: nn.Conv1d(3, 4, 3, padding=2, stride=2),
        lambda: nn.Conv1d(3, 4, 2, padding="same"),
        lambda: nn.Embedding(9, 4, padding_idx=2),
        lambda: scaled_embedding(),
        lambda: gpt_conv1d(),
    ],
    ids=[
        "conv2d",
        "valid",
        "circular",
        "conv1d",
        "same",
        "embedding",
        "scaled embedding",
        "Conv1D",
    ],
)
def test_kinds_of_layers(build: Any) -> None:
    layer = build()
    model = nn.Module()
    model.add_module("layer", layer.double())
    model.forward = lambda x: layer(x).tanh().flatten(1)  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        batches = [{"x": torch.randint(0, 9, (size, 5), generator=generator)} for size in (3, 2)]
    else:
        shape = (
            (3, 6, 7)
            if isinstance(layer, nn.Conv2d)
            else (3, 8)
            if isinstance(layer, nn.Conv1d)
            else (5, 3)
        )
        batches = [
            {"x": torch.randn(size, *shape, generator=generator, dtype=torch.float64)}
            for size in (3, 2)
        ]
    weight = layer.weight
    transposed = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    m, n = (weight.shape[1], weight.shape[0]) if transposed else (len(weight), weight[0].numel())
    B, A = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, 2), (2, n)))
    loss = lambda model, batch: model.forward(**batch).square().sum(1).mean()  # noqa: E731
    anchors, layers = anchored(model, batches, [{"layer": sm.LowRank(B, A)}], loss)
    spy = spied(layers, sm.Entries())
    twin = copy.deepcopy(layer)
    change = (B @ A).T if transposed else (B @ A).reshape(weight.shape)
    twin.weight.data = (weight + change).detach()
    value = sum(twin(b["x"]).tanh().flatten(1).square().sum() for b in batches) / 5
    value.backward()
    wanted = twin.weight.grad.T if transposed else twin.weight.grad.flatten(1)
    assert anchors.losses()[0] == pytest.approx(float(value), rel=1e-12)
    assert error(spy.gradient["a0", "layer", "entries"], wanted) < 1e-9
    other = anchored(model, batches, [{"layer": sm.Dense(B @ A)}], loss)[0]
    assert other.losses()[0] == pytest.approx(float(value), rel=1e-12)


def scaled_embedding() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=1.75)


def gpt_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 3)


def test_conv3d_is_refused() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 1))
    updates = random_updates(model, ["0"], 1, 0, torch.float32)
    _, layers = anchored(
        model, [{"input": torch.randn(2, 1, 2, 2, 2)}], [updates], lambda m, b: m(b["input"]).sum()
    )
    with pytest.raises(AnchorError, match="Conv3d layers are not supported"):
        spied(layers, sm.Factors())


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            y = self.layer(x)
            x.add_(1.0)
            return (y * x).mean()

    model = Overwrites()
    updates = random_updates(model, ["layer"], 1, 0, torch.float32)
    _, layers = anchored(model, [{"x": torch.randn(2, 3)}], [updates], lambda m, b: m(**b))
    with pytest.raises(AnchorError, match="'layer' is changed in place"):
        spied(layers, sm.Factors())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_anywhere(dtype: torch.dtype, bad: float) -> None:
    for size in (1, 7, 33, 1000):
        for place in {0, size // 2, size - 1}:
            tensor = torch.linspace(-1, 1, size).to(dtype)
            assert finite(tensor)
            tensor[place] = bad
            assert not finite(tensor)
            assert not finite(torch.full_like(tensor, bad))
    assert finite(torch.zeros(0, 3))


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 3, 2, 6)])
def test_activations_in_place(shape: tuple[int, ...]) -> None:
    """The gradient of a layer is that of its output before it was changed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Hardtanh(inplace=True)
    ).double()
    batches = [{"input": torch.randn(shape, dtype=torch.float64)}]
    loss = lambda model, batch: model(**batch).square().mean()  # noqa: E731
    updates = random_updates(model, ["0", "2"], 2, 1)
    wanted = dense_gradients(model, updates, batches, loss)[1]
    found = spied(anchored(model, batches, [updates], loss)[1], sm.Entries()).gradient
    for name, gradient in wanted.items():
        assert float(gradient.norm()) > 1e-3
        assert error(found["a0", name, "entries"], gradient) < 1e-12
