"""What the accuracy benchmarks rest on: splits that leak nothing, halves that are fixed,
intervals that are right.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bed import families
from bed.bootstrap import gain, of_family, paired, rights
from bed.clients import HELD, split
from bed.contenders import decorrelated, quantised, truncated
from bed.trial import pack, unpack
from dg.data import Domain, Task

import sapmerge as sm
from tests.conftest import low_rank


def task(*sizes: int) -> Task:
    """Two domains of numbered one-pixel images, so many in each class."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    domains = {
        name: Domain(torch.arange(len(labels)).view(-1, 1, 1, 1), labels) for name in ("one", "two")
    }
    return Task("numbers", domains, torch.eye(len(sizes)), torch.zeros(4, 1), torch.zeros(4, 1))


def test_a_small_class_is_halved_and_an_empty_one_refused() -> None:
    train, test = task(200, 30).split("one", seed=3, train=60)
    assert torch.bincount(train.labels).tolist() == [60, 15]
    assert torch.bincount(test.labels).tolist() == [50, 15]
    assert not set(train.images.flatten().tolist()) & set(test.images.flatten().tolist())
    with pytest.raises(ValueError, match="class 1 has 1 images"):
        task(200, 1).split("one", seed=3, train=60)


def test_nobody_trains_on_what_is_tested_in_another_style() -> None:
    """The pictures that are held out are the same in each domain and for each seed."""
    made = task(50, 50)
    tested = [
        set(split(made, name, seed, 0)[1].images.flatten().tolist())
        for name in ("one", "two")
        for seed in "ab"
    ]
    assert len(tested[0]) == 2 * HELD
    assert all(some == tested[0] for some in tested)
    trained = [
        set(split(made, name, "a", 10)[0].images.flatten().tolist()) for name in ("one", "two")
    ]
    assert not (trained[0] | trained[1]) & tested[0]
    assert trained[0] != trained[1]


def test_the_halves_are_those_of_the_hash() -> None:
    """Written out, so that a new family or another rule is noticed."""
    assert families.choosing() == [
        "printed-digits",
        "pacs",
        "tones",
        "noisy-digits",
        "language",
        "textures",
    ]
    assert families.confirming() == [
        "coco-styles",
        "drawn-digits",
        "corruptions",
        "digits",
        "photo-styles",
        "art-styles",
        "rotations",
    ]


def row(family: str, seed: int, method: str, right: list[bool]) -> dict[str, object]:
    place = {
        "family": family,
        "seed": seed,
        "target": "t",
        "regime": "A",
        "init": "own",
        "setting": "equal",
    }
    return {
        **place,
        "method": method,
        "length": "as is",
        "right": pack(torch.tensor(right)),
        "images": len(right),
    }


def test_differences_are_paired_and_a_family_counts_once() -> None:
    """Family x has two seeds with +50 and 0 points, y one with -100:
    the mean over families is -37.5.
    """
    rows = [row("x", 0, "a", [True, True]), row("x", 0, "b", [True, False])]
    rows += [row("x", 1, "a", [True, False]), row("x", 1, "b", [True, False])]
    rows += [
        row("y", 0, "a", [False, False]),
        row("y", 0, "b", [True, True]),
        row("y", 1, "a", [True, True]),
    ]
    differences = paired(rights(rows, "a", "as is"), rights(rows, "b", "as is"))
    assert of_family(differences) == {"x": 25.0, "y": -100.0}
    found = gain(differences, draws=400)
    assert (found.mean, found.worst, found.trials) == (-37.5, -100.0, 3)
    assert found.low == pytest.approx(-100.0)
    assert found.high > 0


def test_the_interval_of_many_families_is_that_of_their_means() -> None:
    """With many images and one seed, what is left is the spread of families:
    1.96 standard errors of their mean.
    """
    generator = np.random.default_rng(0)
    made = {(f"f{k}", 0, "t"): np.full(10, generator.normal(0.02, 0.03)) for k in range(60)}
    found, means = gain(made), [100 * float(x[0]) for x in made.values()]
    error = float(np.std(means)) / 60**0.5
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_bits_come_back() -> None:
    bits = [True, False, False, True, True] + [False] * 9
    assert unpack(pack(torch.tensor(bits)), len(bits)) == bits


def test_transforms_of_the_bed() -> None:
    """`decorrelated` at equal strengths is `Decorrelate`; rank 8 of 8 is nothing cut;
    int8 is near.
    """
    layer = sm.Layer("l", tuple(low_rank((20, 30), 4, k) for k in range(3)))
    wanted = sm.Decorrelate(strength=0.5)(layer)
    for one, other in zip(decorrelated(0.5, 0.5)(layer), wanted, strict=True):
        torch.testing.assert_close(one.dense(), other.dense().to(one.dtype), atol=1e-5, rtol=1e-4)
    for one, other in zip(truncated(4)(layer), layer, strict=True):
        torch.testing.assert_close(one.dense(), other.dense(), atol=1e-5, rtol=1e-4)
    for one, other in zip(truncated(2)(layer), layer, strict=True):
        assert one.norm() == pytest.approx(other.norm(), rel=1e-5)
    for one, other in zip(quantised(layer), layer, strict=True):
        assert float((one.dense() - other.dense()).norm()) < 0.02 * other.norm()
