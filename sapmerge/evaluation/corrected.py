"""Shares of classes, corrected for the errors of the classifier that counted them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sapmerge.errors import SapmergeError
from sapmerge.evaluation.intervals import Interval, check_resampling, normal_quantile, share_of

__all__ = ["Corrected", "CorrectedShares", "corrected_share", "corrected_shares", "on_simplex"]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Corrected(Interval):
    """A share, corrected for the errors of the classifier that counted it.

    Args:
        clipped: whether the estimate lay outside of [0, 1].
    """

    clipped: bool = False


def corrected_share(
    called: int, total: int, right0: int, m0: int, right1: int, m1: int, level: float = 0.95
) -> Corrected:
    """The share of class 0 in what a classifier with known errors called: CLEAM's point, and an
    interval of ours.

        p = (q - (1 - a1)) / (a0 + a1 - 1)
        q = called / total,  a0 = right0 / m0,  a1 = right1 / m1

    The interval knows that a0 and a1 are estimates, too (delta method; the variances are those with
    one more right and one more wrong):

        var p = (var q + p^2 var a0 + (1 - p)^2 var a1) / (a0 + a1 - 1)^2

    CLEAM's does not, so its 95 % interval covers .46 to .92 in simulations, and this one .93 to
    .99.

    Args:
        called: how many of the sample the classifier calls class 0.
        total: the size of the sample.
        right0: how many labelled items of class 0 it calls 0.
        m0: of how many.
        right1: how many labelled items of class 1 it calls 1.
        m1: of how many.
        level: of the interval, in (0, 1).

    Raises:
        SapmergeError: counts that cannot be; a0 + a1 <= 1, a classifier that knows nothing.

    Example:
        >>> print(corrected_share(500, 1000, right0=190, m0=200, right1=176, m1=180))
        0.515 [0.475, 0.555]

    Source: Teo et al., "On measuring fairness in generative models" (CLEAM),
    https://arxiv.org/abs/2310.19297. The point is Rogan and Gladen's, American Journal of
    Epidemiology 1978.
    """
    q, z = share_of("called", called, total), normal_quantile(level)
    a0, a1 = share_of("right0", right0, m0), share_of("right1", right1, m1)
    slope = a0 + a1 - 1
    if slope <= 0:
        raise SapmergeError(
            f"the classifier is right on {a0:.2f} of class 0 and {a1:.2f} of class 1, which is no "
            "better than a guess (their sum is at most 1): nothing can be corrected with it"
        )
    share = (q - (1 - a1)) / slope
    spread = (
        _variance(called, total)
        + share**2 * _variance(right0, m0)
        + (1 - share) ** 2 * _variance(right1, m1)
    )
    half = z * math.sqrt(spread) / slope
    low, value, high = (min(1.0, max(0.0, end)) for end in (share - half, share, share + half))
    return Corrected(value, low, high, clipped=not 0 <= share <= 1)


@dataclass(frozen=True, eq=False)
class CorrectedShares:
    """The shares of K classes, corrected for the errors of the classifier that counted them.

    Args:
        shares: (K,), of sum 1.
        low: (K,), the lower ends of their intervals, each by itself.
        high: (K,), the upper ends.
        condition: of the classifier's confusion: how much it can blow up an error of the counts.
        clipped: whether the unrestricted solution has a negative share.
    """

    shares: Floats
    low: Floats
    high: Floats
    condition: float
    clipped: bool


def corrected_shares(
    confusion: ArrayLike, called: ArrayLike, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> CorrectedShares:
    """The shares of K classes in what a classifier with known confusions called.

        min over the simplex of ||C^T p - q||^2,  C = confusion / its row sums, q = called / its sum

    Intervals are percentiles over draws of C's rows and q from their posteriors (Dirichlet, 1/2
    added to each count): the classifier is an estimate, too.

    Args:
        confusion: (K, K) counts of labelled items: row is the true class, column what it was
            called.
        called: (K,) counts of the sample.
        level: of each interval, in (0, 1).
        draws: how many.
        seed: of the draws.

    Raises:
        SapmergeError: counts that cannot be; a confusion that cannot be inverted.

    Example:
        >>> found = corrected_shares([[90, 10], [20, 80]], [550, 450])
        >>> [round(float(share), 3) for share in found.shares]
        [0.5, 0.5]

    Source: as `corrected_share`, whose point this is for two classes.
    """
    counts, sample = _counts(confusion, called)
    check_resampling(level, draws)
    rates, q = counts / counts.sum(1, keepdims=True), sample / sample.sum()
    condition = float(np.linalg.cond(rates))
    if not condition < 1e8:
        raise SapmergeError(
            "some classes are called alike whatever they are (the confusion cannot be inverted): "
            "nothing can be corrected with this classifier; join these classes"
        )
    shares = on_simplex(rates.T[None], q[None])[0]
    generator = np.random.default_rng(seed)
    drawn = np.empty((draws, *counts.shape))
    for number, row in enumerate(counts):
        drawn[:, :, number] = generator.dirichlet(row + 0.5, size=draws)
    fits = on_simplex(drawn, generator.dirichlet(sample + 0.5, size=draws))
    low, high = np.quantile(fits, ((1 - level) / 2, (1 + level) / 2), axis=0)
    unrestricted = cast("Floats", np.linalg.solve(rates.T, q))
    return CorrectedShares(
        shares,
        np.minimum(low, shares),
        np.maximum(high, shares),
        condition,
        clipped=bool(np.any(unrestricted < 0)),
    )


def _counts(confusion: ArrayLike, called: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64, checked."""
    try:
        counts: Floats = np.asarray(confusion, dtype=np.float64)
        sample: Floats = np.asarray(called, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SapmergeError(f"expected a (K, K) confusion and (K,) calls: {error}") from None
    if counts.ndim != 2 or not counts.size or counts.shape != 2 * sample.shape:
        raise SapmergeError(
            f"expected a (K, K) confusion and (K,) calls; got {counts.shape} and {sample.shape}"
        )
    both = np.concatenate([counts.ravel(), sample])
    if not np.isfinite(both).all() or both.min() < 0 or not counts.sum(1).all() or not sample.sum():
        raise SapmergeError(
            "counts are at least 0, with at least one labelled item of every class and one call"
        )
    return counts, sample


def on_simplex(matrix: Floats, target: Floats, steps: int = 20_000) -> Floats:
    """min_p ||M p - t||^2 with p >= 0, sum p = 1, for every M (draws, K, K) and t (draws, K):
    projected gradients with momentum, which starts anew where it points uphill.
    """
    gram: Floats = np.einsum("kji,kjl->kil", matrix, matrix)
    pull: Floats = np.einsum("kji,kj->ki", matrix, target)
    step = 1 / np.linalg.eigvalsh(gram)[:, -1:].clip(1e-300)
    point = np.full(target.shape, 1 / target.shape[1])
    ahead, age = point, np.zeros((len(point), 1))
    for _ in range(steps):
        moved = _projected(ahead - step * (np.einsum("kij,kj->ki", gram, ahead) - pull))
        change = moved - point
        uphill = np.sum((ahead - moved) * change, axis=1, keepdims=True) > 0
        age = np.where(uphill, 0, age + 1)
        ahead = moved + change * (age / (age + 3))
        point = moved
        if np.abs(change).max() < 1e-14:
            break
    return point


def _projected(points: Floats) -> Floats:
    """The nearest points of the simplex: max(x - c, 0) with sum 1."""
    ordered = -np.sort(-points, axis=1)
    numbers = np.arange(1, points.shape[1] + 1, dtype=np.float64)
    excess = (np.cumsum(ordered, axis=1) - 1) / numbers
    last = np.count_nonzero(ordered > excess, axis=1) - 1
    return np.maximum(points - excess[np.arange(len(points)), last][:, None], 0)


def _variance(count: int, total: int) -> float:
    """Of a share, with one more of either kind, so that it is not 0 where none or all are."""
    share = (count + 1) / (total + 2)
    return share * (1 - share) / total
