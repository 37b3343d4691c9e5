"""AdaMerging: its gradient against autograd, its steps against torch's Adam, and what it learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.errors import MethodError
from tests import conftest
from tests.anchors import models
from tests.anchors.models import anchored, random_updates
from tests.conftest import changed, error, make_layers

WEIGHTS = (1.0, 0.5)


def plain(
    weights: tuple[float, ...] = WEIGHTS,
) -> tuple[Any, list[sm.Layer], nn.Module, list[Any], list[Any]]:
    model = models.Plain().double()
    loader = [
        {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
        for b in models.plain_batches()
    ]
    updates = [random_updates(model, ["conv", "line", "twice", "head", "words"], 2, 1)]
    updates.append(random_updates(model, ["line", "twice", "head"], 3, 2))
    anchors, layers = anchored(model, loader, updates, models.plain_loss)
    layers = conftest.Anchored([changed(layer, weights=weights) for layer in layers], anchors)
    return anchors, layers, model, loader, updates


def by_autograd(
    model: nn.Module, loader: Any, layers: list[sm.Layer], c: Tensor, loss: Any
) -> tuple[Tensor, Tensor]:
    """The loss at base + sum c w D, and its gradient in c (layers, K), through `torch.func`."""
    c = c.clone().requires_grad_()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    for row, layer in zip(c, layers):
        D = sum(x * w * u.dense() for x, w, u in zip(row, layer.weights, layer))
        key = f"{layer.name}.weight"
        embedding = isinstance(model.get_submodule(layer.name), nn.Embedding)
        parameters[key] = parameters[key] + (D.T if embedding else D.reshape(parameters[key].shape))

    class Bound(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, parameters, args, kwargs)

    sizes = [len(batch["ids"]) for batch in loader]
    total = sum(n * loss(Bound(), batch) for n, batch in zip(sizes, loader)) / sum(sizes)
    return total.detach(), torch.autograd.grad(total, c)[0]


@pytest.mark.parametrize("dense", [False, True])
def test_slopes_are_the_gradient(dense: bool) -> None:
    anchors, layers, model, loader, _ = plain()
    if dense:
        layers = [
            changed(layer, updates=tuple(sm.Dense(u.dense()) for u in layer)) for layer in layers
        ]
    c = torch.rand(len(layers), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.words.padding_idx = None  # autograd leaves the padding row out, as the anchors do
    value, wanted = by_autograd(model, loader, layers, c, models.plain_loss)
    updates = {
        x.name: sm.Dense(sum(k * w * u.dense() for k, w, u in zip(row, x.weights, x)))
        for row, x in zip(c, layers)
    }
    loss, slopes = anchors.slopes(updates, {x.name: list(x) for x in layers})
    assert abs(loss - float(value)) < 1e-10
    for row, layer in zip(wanted, layers):
        assert error(slopes[layer.name] * torch.tensor(layer.weights), row) < 1e-9, layer.name


@pytest.mark.parametrize("scope", ["layer", "adapter"])
def test_steps_are_those_of_adam(scope: str) -> None:
    _, layers, model, loader, _ = plain()
    model.words.padding_idx = None
    layers.sort(key=lambda layer: layer.name)
    found: dict[str, Any] = {}
    method = sm.adamerging(scope, init=0.3, lr=0.05, steps=6)
    prepared = sm.prepare(method, layers)
    c = torch.full(
        (len(layers) if scope == "layer" else 1, 2), 0.3, dtype=torch.float64
    ).requires_grad_()
    adam, losses = torch.optim.Adam([c], lr=0.05), []
    for _ in range(6):
        value, gradient = by_autograd(
            model, loader, layers, c.detach().expand(len(layers), 2), models.plain_loss
        )
        losses.append(float(value))
        c.grad = gradient if scope == "layer" else gradient.sum(0, keepdim=True)
        adam.step()
        c.data.clamp_(0, 1)
    for row, layer in zip(c.detach().expand(len(layers), 2), layers):
        got = prepared(changed(layer, record=found.__setitem__)).dense()
        wanted = sum(x * w * u.dense() for x, w, u in zip(row, layer.weights, layer))
        assert error(got, wanted) < 1e-8, layer.name
        assert found["coefficients"] == pytest.approx(
            dict(zip(layer.adapters, row.tolist())), abs=1e-8
        )
        assert found["fit_loss"] == pytest.approx(losses, abs=1e-9)


def test_it_learns_whom_to_trust() -> None:
    """One adapter moves the head where the anchors want it, the other somewhere else."""
    model = models.Plain().double()
    updates = [random_updates(model, ["head"], 2, k) for k in (1, 2)]
    head = nn.Sequential()
    head.add_module("head", copy.deepcopy(model.head))
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
    y = nn.functional.linear(
        x, head.head.weight.detach() + updates[0]["head"].dense(), head.head.bias.detach()
    )

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    _, layers = anchored(head, [{"x": x, "y": y}], updates, loss)
    found: dict[str, Any] = {}
    prepared = sm.prepare(sm.adamerging(lr=0.05, steps=100), layers)
    got = prepared(changed(layers[0], record=found.__setitem__))
    assert found["coefficients"]["a0"] > 0.95
    assert found["coefficients"]["a1"] < 0.05
    assert found["fit_loss"][-1] < 1e-2 * found["fit_loss"][0]
    assert error(got.dense(), updates[0]["head"].dense()) < 0.1
    again = sm.prepare(sm.adamerging(lr=0.05, steps=100), layers)(layers[0])
    assert torch.equal(got.dense(), again.dense())


def test_directions_reach_the_closed_form() -> None:
    """The best coefficients of rank-one terms are those of a least squares problem."""
    (layer,) = make_layers((2, 3), {"l": (7, 6)}, weights=(1.0, 0.5))
    terms = []
    for update, weight in zip(layer, layer.weights):
        U, s, Vh = torch.linalg.svd(update.dense())
        terms += [weight * s[i] * torch.outer(U[:, i], Vh[i]) for i in range(update.rank)]
    M = torch.stack([term.flatten() for term in terms], 1)
    wanted = torch.tensor([0.2, 0.7, 0.5, 0.9, 0.4]).double()
    noise = torch.randn(42, generator=torch.Generator().manual_seed(0)).double()
    noise -= M @ torch.linalg.lstsq(M, noise[:, None]).solution[:, 0]
    target = (M @ wanted + noise).view(7, 6)
    anchors = conftest.QuadraticLoss([layer], {"l": target})
    found: dict[str, Any] = {}
    noting = changed(layer, record=found.__setitem__)
    got = sm.on_one_layer(sm.tara(lr=0.01, steps=500), noting, anchors)
    coefficients = [c for row in found["direction_coefficients"].values() for c in row]
    assert coefficients == pytest.approx(wanted.tolist(), abs=1e-3)
    assert error(got.dense(), (M @ wanted).view(7, 6)) < 1e-2
    assert found["fit_loss"][-1] == pytest.approx(float(noise.square().sum()) / 2, rel=1e-3)


def test_directions_of_one_rank_are_layers() -> None:
    """With adapters of rank one, TARA is layer-wise AdaMerging."""
    layers = make_layers((1, 1, 1), weights=(1.0, 0.5, 0.7))
    anchors = conftest.LinearLoss(layers)
    stream = conftest.Anchored(layers, anchors)
    one, other = (sm.prepare(make(steps=4), stream) for make in (sm.tara, sm.adamerging))
    for layer in layers:
        assert error(one(layer).dense(), other(layer).dense()) < 1e-12


def test_directions_on_a_model_are_steps_of_adam() -> None:
    """Slopes of rank-one terms by autograd through the dense weights."""
    _, layers, model, loader, _ = plain()
    model.words.padding_idx = None
    layers.sort(key=lambda layer: layer.name)
    terms = []
    for layer in layers:
        members = []
        for member in layer.members:
            if member.absent:
                continue
            U, s, Vh = torch.linalg.svd(member.update.dense(), full_matrices=False)
            members += [
                sm.Member(sm.LowRank(U[:, i : i + 1] * s[i], Vh[i : i + 1]), "x", member.weight)
                for i in range(member.update.rank)
            ]
        terms.append(layer.with_members(members))
    width = max(map(len, terms))
    c = torch.full((len(terms), width), 0.3, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([c], lr=0.05)
    for _ in range(3):
        _, gradient = by_autograd(model, loader, terms, c.detach(), models.plain_loss)
        c.grad = gradient
        adam.step()
        c.data.clamp_(0, 1)
    prepared = sm.prepare(sm.tara(lr=0.05, steps=3), layers)
    for row, layer, term in zip(c.detach(), layers, terms):
        wanted = sum(x * w * u.dense() for x, w, u in zip(row, term.weights, term))
        assert error(prepared(layer).dense(), wanted) < 1e-8, layer.name


def test_in_a_basis_the_coefficients_are_the_same() -> None:
    _, layers, *_ = plain()
    plainly = sm.prepare(sm.adamerging(steps=3), layers)
    for basis in (sm.CoreSpace(), sm.SharedBasis(), sm.SharedBasis(scaled=False)):
        inside = sm.prepare(sm.In(basis, sm.adamerging(steps=3)), layers)
        for layer in layers:
            assert error(inside(layer).dense(), plainly(layer).dense()) < 1e-8


def test_no_steps_is_a_scaled_sum() -> None:
    for layer in make_layers(weights=(1.0, 0.5, 0.7)):
        got = sm.on_one_layer(sm.adamerging(init=0.3, steps=0), layer, conftest.LinearLoss())
        assert error(got.dense(), 0.3 * sm.task_arithmetic()(layer).dense()) < 1e-12


def test_wrong_arguments_are_named() -> None:
    for arguments in ({"scope": "row"}, {"init": 1.5}, {"lr": 0.0}, {"steps": -1}):
        with pytest.raises(MethodError):
            sm.adamerging(**arguments)
    assert repr(sm.parse(repr(sm.adamerging()))) == repr(sm.adamerging())
    named = sm.adamerging(loss=sm.anchors.entropy)
    assert "loss=entropy" in repr(named)
    assert repr(sm.parse(repr(named))) == repr(named)
