"""LoraHub's search: it finds a minimiser that is known, in any order of the adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from tests import conftest
from tests.conftest import changed, make_layers

K = 3


def orthogonal(weights: tuple[float, ...] = (1.0,) * K) -> tuple[sm.Layer, Tensor]:
    """Orthonormal updates: the loss |sum c D - T|^2 / 2 falls apart into one per coefficient."""
    frames = torch.linalg.qr(conftest.low_rank((6, 6), 6, 1).dense())[0]
    updates = [sm.LowRank(frames[:, k : k + 1], frames[k : k + 1]) for k in range(K)]
    layer = sm.Layer("l", updates, ("a", "b", "c"), weights, ("z", "x", "y"))
    return layer, torch.stack([update.dense().flatten() for update in updates], 1)


def fit(layer: sm.Layer, target: Tensor, **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    anchors = conftest.QuadraticLoss([layer], {"l": target})
    sm.on_one_layer(sm.lorahub(**arguments), changed(layer, record=found.__setitem__), anchors)
    return found


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_it_finds_the_minimiser(penalty: float) -> None:
    """c = soft(b, penalty / K), within the bounds."""
    layer, M = orthogonal()
    b = torch.tensor([0.8, -0.5, 0.05]).double()
    found = fit(layer, (M @ b).view(6, 6), penalty=penalty, steps=800)
    wanted = b.sign() * (b.abs() - penalty / K).clamp_min(0)
    assert list(found["coefficients"].values()) == pytest.approx(wanted.tolist(), abs=2e-3)
    least = float((wanted - b).square().sum()) / 2 + penalty * float(wanted.abs().mean())
    assert min(found["search_loss"]) == pytest.approx(least, abs=1e-4)


def test_forty_evaluations_come_near_it() -> None:
    layer, M = orthogonal()
    b = torch.tensor([0.8, -0.5, 0.3]).double()
    found = fit(layer, (M @ b).view(6, 6), penalty=0.0)
    losses = found["search_loss"]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(float(b.square().sum()) / 2)
    assert min(losses) < 0.1 * losses[0]


def test_bounds_hold() -> None:
    layer, M = orthogonal()
    target = (M @ torch.tensor([5.0, -5.0, 0.2]).double()).view(6, 6)
    found = list(fit(layer, target, penalty=0.0, steps=600)["coefficients"].values())
    assert found == pytest.approx([1.5, -1.5, 0.2], abs=5e-3)


def test_weights_multiply_what_is_searched() -> None:
    layer, M = orthogonal((2.0, 0.5, 1.0))
    target = (M @ torch.tensor([0.8, -0.5, 0.3]).double()).view(6, 6)
    found = list(fit(layer, target, penalty=0.0, steps=800)["coefficients"].values())
    assert found == pytest.approx([0.4, -1.0, 0.3], abs=5e-3)


def test_the_order_of_adapters_changes_no_bit() -> None:
    layers = make_layers(weights=(1.0, 0.5, 0.7))
    targets = {x.name: 0.3 * x.updates[0].dense() - x.updates[2].dense() for x in layers}
    order = [2, 0, 1]
    both = []
    for some in (layers, [x.with_members(x.members[k] for k in order) for x in layers[::-1]]):
        stream = conftest.Anchored(some, conftest.QuadraticLoss(some, targets))
        for scope in ("adapter", "layer"):
            found: dict[str, Any] = {}
            prepared = sm.prepare(sm.lorahub(scope, steps=30, seed=5), stream)
            for layer in some:
                prepared(
                    changed(layer, record=lambda k, v, n=layer.name: found.update({(n, k): v}))
                )
            both.append(found)
    assert both[0] == both[2]
    assert both[1] == both[3]
    adapters = [both[0][x.name, "coefficients"] for x in layers]
    assert all(row == adapters[0] for row in adapters)
    layerwise = [both[1][x.name, "coefficients"] for x in layers]
    assert layerwise[0] != layerwise[1]


def test_seeds_differ_and_repeat() -> None:
    layer, M = orthogonal()
    target = (M @ torch.tensor([0.8, -0.5, 0.3]).double()).view(6, 6)
    one, same, other = (fit(layer, target, seed=seed)["search_loss"] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_wrong_arguments_are_named() -> None:
    for arguments in ({"scope": "row"}, {"steps": -1}, {"bound": 0.0}, {"init": 2.0}):
        with pytest.raises(sm.MethodError):
            sm.lorahub(**arguments)
    with pytest.raises(sm.MethodError, match="anchors"):
        sm.prepare(sm.lorahub(), make_layers())
