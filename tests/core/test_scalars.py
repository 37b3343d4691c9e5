"""Numbers of NumPy and torch mean the numbers of Python that they hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import sapmerge as sm

KINDS: list[Callable[[float], object]] = [np.float64, np.float32, np.array, torch.tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_does_not_tell_who_made_its_numbers(kind: Callable[[float], object]) -> None:
    made, plain = sm.ties(density=kind(0.25)), sm.ties(density=0.25)  # type: ignore[arg-type]
    assert repr(made) == repr(plain)
    assert sm.parse(repr(made)) == plain
    seeded = sm.dare(0.5, seed=np.int64(3))  # type: ignore[arg-type]
    assert repr(seeded) == repr(sm.dare(0.5, seed=3))


@pytest.mark.parametrize("wrong", [np.float64(20.0), np.bool_(True), np.float32("nan")])
def test_what_is_wrong_stays_wrong(wrong: object) -> None:
    with pytest.raises(sm.MethodError, match="fraction kept"):
        sm.ties(density=wrong)  # type: ignore[arg-type]
