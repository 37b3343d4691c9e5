"""Intervals against goldens, and whether they cover what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sapmerge as sm
from sapmerge.evaluation import (
    corrected_share,
    corrected_shares,
    macc,
    over_seeds,
    paired,
    wilson,
)
from sapmerge.evaluation.corrected import on_simplex

GOLDEN = load_file(Path(__file__).parent / "goldens" / "federated" / "evaluation.safetensors")


def test_wilson() -> None:
    for right, total, low, high in GOLDEN["wilson"]:
        found = wilson(int(right), int(total))
        assert (found.value, found.low, found.high) == pytest.approx((right / total, low, high))


def test_wilson_at_another_level() -> None:
    """At one standard deviation, by the quadratic whose roots are the ends: (p - x)^2 n = z^2 x (1
    - x).
    """
    found, z = wilson(30, 40, level=0.6826894921370859), 1.0
    roots = np.roots([1 + z / 40, -2 * 0.75 - z / 40, 0.75**2])
    assert sorted((found.low, found.high)) == pytest.approx(sorted(roots))


@pytest.mark.parametrize(("right", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_counts_that_cannot_be(right: int, total: int) -> None:
    with pytest.raises(sm.SapmergeError, match="right: expected a count"):
        wilson(right, total)


def test_student() -> None:
    """The table of the t distribution: 12.706 for one degree of freedom, 2.776 for four, 2.262 for
    nine; and 99 %.
    """
    for count, level, quantile in (
        (2, 0.95, 12.7062),
        (5, 0.95, 2.7764),
        (10, 0.95, 2.2622),
        (10, 0.99, 3.2498),
    ):
        values = np.random.default_rng(count).normal(size=count)
        found = over_seeds(list(values), level)
        assert found.value == pytest.approx(values.mean())
        half = quantile * values.std(ddof=1) / count**0.5
        assert (found.low, found.high) == pytest.approx(
            (values.mean() - half, values.mean() + half), rel=1e-4
        )
    assert np.isnan(over_seeds([3.0]).low)


def test_the_paired_difference() -> None:
    a, b = GOLDEN["paired.a"], GOLDEN["paired.b"]
    found = paired(a, b)
    assert found.value == pytest.approx(float(GOLDEN["paired.difference"][0]))
    assert found.low < found.value < found.high
    assert paired(a, b) == found
    turned = paired(b, a)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=0.01)
    assert paired(a, a).width == 0


def test_one_seed_has_the_interval_of_its_images() -> None:
    """Of many independent images: the mean of the differences, and 1.96 standard errors."""
    generator = np.random.default_rng(0)
    gap = generator.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=2000)
    found, error = paired(gap, np.zeros(2000)), gap.std() / 2000**0.5
    assert (found.low, found.high) == pytest.approx(
        (gap.mean() - 1.96 * error, gap.mean() + 1.96 * error), abs=0.1 * error
    )


def test_images_and_seeds_are_both_resampled() -> None:
    """Images that differ alike for all seeds: five seeds are no more than one. And the other way
    round.
    """
    generator = np.random.default_rng(1)
    image, seed = generator.normal(size=(1, 100)), generator.normal(size=(40, 1))
    alike = paired(np.repeat(image, 5, 0), np.zeros((5, 100)))
    assert alike.width == pytest.approx(2 * 1.96 * image.std() / 10, rel=0.1)
    apart = paired(np.repeat(seed, 100, 1), np.zeros((40, 100)))
    assert apart.width == pytest.approx(2 * 1.96 * seed.std() / 40**0.5, rel=0.1)


def test_tables_that_do_not_pair() -> None:
    with pytest.raises(sm.SapmergeError, match=r"\(2, 3\) and \(3, 2\)"):
        paired(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(sm.SapmergeError, match="NaN"):
        paired([[1.0, np.nan]], [[1.0, 1.0]])


def test_macc() -> None:
    assert macc({"a": {"rank-1": 90, "mAP": 70}, "b": {"rank-1": 50, "mAP": 10}}) == 55
    with pytest.raises(sm.SapmergeError, match="'b' has the measures"):
        macc({"a": {"rank-1": 90, "mAP": 70}, "b": {"rank-1": 50}})
    with pytest.raises(sm.SapmergeError, match="expected per cent"):
        macc({"a": {"rank-1": 101}})
    with pytest.warns(sm.SapmergeWarning, match="71 per cent"):
        macc({"a": {"rank-1": 0.71}})


def test_corrected_share() -> None:
    found = corrected_share(500, 1000, right0=190, m0=200, right1=176, m1=180)
    assert (found.value, found.low, found.high) == pytest.approx(
        tuple(GOLDEN["cleam.ours"]), abs=1e-12
    )
    assert not found.clipped


def test_the_other_class_has_the_other_share() -> None:
    one = corrected_share(300, 1000, 190, 200, 160, 180)
    other = corrected_share(700, 1000, 160, 180, 190, 200)
    assert (one.value, one.low, one.high) == pytest.approx(
        (1 - other.value, 1 - other.high, 1 - other.low)
    )


def test_a_share_below_zero_is_clipped_and_says_so() -> None:
    found = corrected_share(0, 1000, 190, 200, 176, 180)
    assert (found.value, found.low, found.clipped) == (0, 0, True)


def test_a_classifier_that_knows_nothing_is_refused() -> None:
    with pytest.raises(sm.SapmergeError, match="no better than a guess"):
        corrected_share(500, 1000, 100, 200, 90, 180)


def official(calls: np.ndarray, a0: float, a1: float) -> tuple[float, float]:
    """CLEAM's interval: of the mean of batches' shares, with the classifier taken for exact."""
    half = 1.96 * calls.std() / len(calls) ** 0.5
    ends = ((calls.mean() + side - (1 - a1)) / (a0 + a1 - 1) for side in (-half, half))
    return tuple(ends)  # type: ignore[return-value]


def test_the_official_interval_is_reproduced() -> None:
    found = official(GOLDEN["cleam.q"], 0.947, 0.983)
    assert found == pytest.approx(tuple(GOLDEN["cleam.official"][1:]))


@pytest.mark.parametrize(
    ("share", "labelled", "a0", "a1", "official_covers"),
    [(0.5, 200, 0.95, 0.9, 0.75), (0.9, 1000, 0.95, 0.98, 0.8), (0.5, 200, 0.7, 0.8, 0.6)],
)
def test_what_intervals_of_a_share_cover(
    share: float, labelled: int, a0: float, a1: float, official_covers: float
) -> None:
    """500 worlds with 30 batches of 400 and a classifier that is measured on so many labelled items
    per class.
    """
    generator = np.random.default_rng(0)
    ours = theirs = 0
    for _ in range(500):
        right0, right1 = generator.binomial(labelled, a0), generator.binomial(labelled, a1)
        first = generator.binomial(400, share, size=30)
        called = generator.binomial(first, a0) + generator.binomial(400 - first, 1 - a1)
        found = corrected_share(int(called.sum()), 12000, right0, labelled, right1, labelled)
        ours += found.low <= share <= found.high
        low, high = official(called / 400, right0 / labelled, right1 / labelled)
        theirs += low <= share <= high
    assert 0.93 <= ours / 500 <= 0.99
    assert theirs / 500 < official_covers


def test_corrected_shares() -> None:
    """The least squares over the simplex; a negative share is cut and the others give it up."""
    found = on_simplex(GOLDEN["multi.C"].T[None], GOLDEN["multi.q"][None])[0]
    assert found == pytest.approx(GOLDEN["multi.p"], abs=1e-12)


def test_two_classes_are_the_formula() -> None:
    found = corrected_shares([[190, 10], [4, 176]], [500, 500])
    one = corrected_share(500, 1000, 190, 200, 176, 180)
    assert found.shares == pytest.approx([one.value, 1 - one.value], abs=1e-10)
    assert (found.low[0], found.high[0]) == pytest.approx((one.low, one.high), abs=0.006)
    assert found.condition == pytest.approx(
        float(np.linalg.cond([[0.95, 0.05], [4 / 180, 176 / 180]]))
    )
    assert not found.clipped


def test_a_share_that_must_be_negative() -> None:
    found = corrected_shares([[90, 5, 5], [5, 90, 5], [5, 5, 90]], [500, 490, 10])
    assert found.clipped
    assert found.shares[2] == 0
    assert found.shares.sum() == pytest.approx(1)


def test_what_the_intervals_of_shares_cover() -> None:
    """200 worlds of three classes, one of them absent, and 100 labelled items of each."""
    generator, true = np.random.default_rng(0), np.array([0.7, 0.3, 0.0])
    rates = np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.05, 0.15, 0.8]])
    hits = np.zeros(3)
    for number in range(200):
        confusion = np.stack([generator.multinomial(100, row) for row in rates])
        called = sum(
            generator.multinomial(n, row)
            for n, row in zip(generator.multinomial(1000, true), rates)
        )
        found = corrected_shares(confusion, called, draws=300, seed=number)
        hits += (found.low <= true) & (true <= found.high)
    assert (hits / 200 >= 0.91).all()


def test_confusions_that_cannot_be_inverted() -> None:
    with pytest.raises(sm.SapmergeError, match="join these classes"):
        corrected_shares([[50, 50, 0], [50, 50, 0], [0, 0, 100]], [1, 1, 1])
    with pytest.raises(sm.SapmergeError, match="at least one labelled item"):
        corrected_shares([[0, 0], [1, 1]], [1, 1])
    with pytest.raises(sm.SapmergeError, match=r"got \(2, 2\) and \(3,\)"):
        corrected_shares([[1, 0], [0, 1]], [1, 1, 1])


def test_tables_that_are_none() -> None:
    """Seeds with unequal numbers of images, words, nothing, and an infinite number of trials."""
    for wrong in ([[1], [1, 0]], [["a"]], [[None, object()]]):
        with pytest.raises(sm.SapmergeError, match="every seed with the same images"):
            paired(wrong, wrong)  # type: ignore[arg-type]
        with pytest.raises(sm.SapmergeError, match="expected"):
            corrected_shares(wrong, [1])  # type: ignore[arg-type]
    with pytest.raises(sm.SapmergeError, match="expected"):
        corrected_shares(np.zeros((0, 0)), [])
    with pytest.raises(sm.SapmergeError, match="expected a count"):
        wilson(1, float("inf"))  # type: ignore[arg-type]
