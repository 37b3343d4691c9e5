"""Parts of the user's that return something else than they should: the error names the part,
what it returned and what is wanted, and nothing of an adapter is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sapmerge as sm


def _layer() -> sm.Layer:
    generator = torch.Generator().manual_seed(0)
    return sm.Layer("mlp", [sm.Dense(torch.randn(4, 3, generator=generator)) for _ in range(2)])


def _prune(
    scorer: Any = sm.Magnitude(), mask: Any = sm.TopFraction(0.5), rescaler: Any = sm.Keep()
) -> sm.Method:
    return sm.Chain(sm.Prune(scorer, mask, rescaler), sm.Mean())


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "bools as scores": (lambda: _prune(lambda v, s: v > 0), r"numbers.*torch\.bool.*mlp.*mask"),
    "no mask": (lambda: _prune(mask=lambda s: None), "mask.*NoneType"),
    "an array as mask": (lambda: _prune(mask=lambda s: (s > 0).numpy()), "mask.*ndarray"),
    "a matrix for an update": (
        lambda: _prune(rescaler=lambda pruned, original: pruned.dense()),
        "LowRank.*Dense.*Tensor.*mlp",
    ),
    "no update": (lambda: _prune(rescaler=lambda pruned, original: None), "NoneType.*mlp"),
    "matrices for updates": (
        lambda: sm.Chain(lambda layer: layer.with_updates([u.dense() for u in layer]), sm.Mean()),
        "mlp.*LowRank.*Dense.*adapter0.*Tensor",
    ),
    "too few updates": (
        lambda: sm.Chain(lambda layer: layer.with_updates(list(layer)[:1]), sm.Mean()),
        "mlp.*2 adapters; got 1",
    ),
    "whole numbers": (
        lambda: lambda layer: sm.Dense(layer.updates[0].dense().sign().long()),
        r"floats; got torch\.int64",
    ),
    "an array": (lambda: lambda layer: sm.Dense(layer.updates[0].dense().numpy()), "got float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_part_returns_is_checked(name: str) -> None:
    make, text = WRONG[name]
    with pytest.raises(sm.MethodError, match=text):
        sm.on_one_layer(make(), _layer())


def test_a_scorer_that_writes_into_its_values_is_refused() -> None:
    layer = _layer()
    with pytest.raises(sm.MethodError, match=r"changes the values.*mlp.*adapter0"):
        sm.on_one_layer(_prune(lambda values, stats: values.abs_()), layer)
    own = sm.on_one_layer(_prune(lambda values, stats: values.abs()), _layer())
    wanted = sm.on_one_layer(_prune(), _layer())
    assert torch.equal(own.dense(), wanted.dense())
