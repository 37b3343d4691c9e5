"""LoRM: the authors' numbers, the regression that it solves, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.errors import MethodError
from tests.conftest import changed, error, low_rank, make_layers
from tests.methods.test_anchored import Q, V, given, s3_layers, tensor


def sharing(factor: str) -> list[sm.Layer]:
    """The adapters of s3, the factor of the first in all of them."""
    out = []
    for layer in s3_layers():
        first = layer.updates[0]
        updates = [
            sm.LowRank(first.B, u.A) if factor == "B" else sm.LowRank(u.B, first.A) for u in layer
        ]
        out.append(changed(layer, updates=tuple(updates)))
    return out


@pytest.mark.parametrize("alpha", ["0.0", "0.5", "1.0"])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_official_numbers(factor: str, alpha: str) -> None:
    other = "B" if factor == "A" else "A"
    layers = sharing(other)
    prepared = sm.prepare(sm.lorm(factor, float(alpha), given()), layers)
    for layer in layers:
        merged = prepared(layer)
        assert isinstance(merged, sm.LowRank)
        assert (
            error(
                getattr(merged, factor),
                tensor(f"lorm_{factor}/s3/alpha{alpha}/{layer.name}/{factor}"),
            )
            < 1e-5
        )
        assert torch.equal(getattr(merged, other), getattr(layer.updates[0], other))


def test_merging_A_is_regmean() -> None:
    layers = [changed(layer, weights=(1.0, 0.5, -0.7)) for layer in sharing("B")]
    lorm, regmean = (
        sm.prepare(m, layers) for m in (sm.lorm("A", 0.9, given()), sm.regmean(0.9, given()))
    )
    for layer in layers:
        assert error(lorm(layer).dense(), regmean(layer).dense()) < 1e-9
        assert lorm(layer).rank == 4


def test_merging_B_has_the_least_error_of_outputs() -> None:
    layers = [changed(layer, weights=(1.0, 0.5, 0.7)) for layer in sharing("A")]
    prepared, grams = sm.prepare(sm.lorm("B", 1.0, given()), layers), given()

    def loss(X: Tensor, layer: sm.Layer) -> float:
        terms = zip(layer.adapters, layer, layer.weights)
        return sum(
            w * float(((X - u.dense()) @ grams[a][layer.name] * (X - u.dense())).sum())
            for a, u, w in terms
        )

    for layer in layers:
        merged = prepared(layer)
        for seed in range(5):
            near = sm.LowRank(
                merged.B + 0.01 * low_rank((layer.shape[0], 4), 4, seed).dense(), merged.A
            )
            assert loss(near.dense(), layer) > loss(merged.dense(), layer)


def test_an_adapter_without_the_layer_counts_as_zero() -> None:
    for factor, other in (("A", "B"), ("B", "A")):
        layer = sharing(other)[0]
        zero = sm.LowRank(
            layer.updates[2].B * (factor == "A"), layer.updates[2].A * (factor == "B")
        )
        zero = sm.LowRank(zero.B, zero.A)
        with_zero = changed(layer, updates=(*layer.updates[:2], zero))
        without = changed(layer, updates=(*layer.updates[:2], sm.absent(layer.shape, zero.A)))
        method = sm.lorm(factor, 0.5, given())
        assert (
            error(
                sm.on_one_layer(method, with_zero).dense(), sm.on_one_layer(method, without).dense()
            )
            < 1e-9
        )
        none = changed(layer, updates=(sm.absent(layer.shape, zero.A),) * 3)
        assert sm.on_one_layer(method, none).rank == 0


def test_what_is_not_shared_is_refused_before_any_work() -> None:
    for factor in "AB":
        with pytest.raises(MethodError, match=r"do not share.*regmean"):
            sm.prepare(sm.lorm(factor, 0.0, given()), s3_layers())
    for shared, factor in (("B", "B"), ("A", "A")):  # the wrong one is shared
        with pytest.raises(MethodError, match="do not share"):
            sm.on_one_layer(sm.lorm(factor, 0.0, given()), sharing(shared)[0])
    layer = sharing("B")[0]
    dense = changed(layer, updates=tuple(sm.Dense(u.dense()) for u in layer))
    with pytest.raises(MethodError, match="dense"):
        sm.on_one_layer(sm.lorm(grams=given()), dense)
    with pytest.raises(MethodError, match="anchors and a model"):
        sm.on_one_layer(sm.lorm(), layer)
    ranks = sm.Layer("l", tuple(make_layers([2, 3], {"l": (4, 5)})[0].updates))
    with pytest.raises(MethodError, match="do not share"):
        sm.on_one_layer(sm.lorm(), ranks)


def test_wrong_arguments_are_named() -> None:
    for make in (lambda: sm.lorm("C"), lambda: sm.lorm(reduction=-0.1), lambda: sm.LoRMB(2.0)):
        with pytest.raises(MethodError):
            make()
    assert repr(sm.parse(repr(sm.lorm("B", 0.5)))) == repr(sm.lorm("B", 0.5))
    assert {Q, V} == {layer.name for layer in s3_layers()}
