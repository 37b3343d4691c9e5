"""A short run of every target; FUZZ_SECONDS is the time for all of them together."""

from __future__ import annotations

import os
import random

import pytest

from .drive import run
from .mutators import mutate
from .targets import TARGETS, Broken, seed

SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz(target: str) -> None:
    TARGETS[target](seed(target))
    assert run(target, SECONDS / len(TARGETS), start=int(os.environ.get("FUZZ_SEED", "0"))) > 20


@pytest.mark.parametrize("target", TARGETS)
def test_mutation_is_reproducible(target: str) -> None:
    made = [mutate(target, seed(target), random.Random(number)) for number in range(50)]
    assert made == [mutate(target, seed(target), random.Random(number)) for number in range(50)]
    assert len(set(made)) > 25


def test_a_broken_promise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets can fail: a reader that gives a wrong scaling,
    and one that raises the wrong error.
    """
    from tests.corpus import oracle

    from . import targets

    monkeypatch.setattr(oracle, "by_pattern", lambda table, name, default: 5)
    with pytest.raises(Broken, match="scaling"):
        TARGETS["config"](seed("config"))
    monkeypatch.setattr(targets, "open_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TARGETS["header"](seed("header"))
