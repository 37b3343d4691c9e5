"""Mergers that look at the r rank-one units b_k a_k of an adapter:
columns of B with their rows of A.

The units are those of the factors as they are, or of the balanced form,
which depends on the update alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.layer import Layer, seed_of
from sapmerge.core.linalg import numerical_rank, split_evenly
from sapmerge.core.part import part
from sapmerge.core.updates import Dense, LowRank, Update, zero_of
from sapmerge.errors import MethodError
from sapmerge.parts.masks import TopFraction, check_density

__all__ = ["ClusterUnits", "RobustFactors", "RobustSum"]


@part
class RobustSum:
    """RobustMerge of the paper: sum_t B~_t diag(S^_t) A~_t, without cross terms.

    A~ and B~ are the factors with only their largest entries kept; S_t[k] =
    |A_t[k]|_1 / |A~_t[k]|_1 gives row k of A its weight back, and S^_t = w_t S_t / sum_i |w_i| S_i,
    rank by rank. So the sum is a mean over the adapters.

    Args:
        density: the fraction of entries kept, per factor.
        balance: take the balanced factors instead of those that were trained. The published numbers
            need False; then the result depends on how B A is split into factors,
            beyond a common scale (B / c, c A).

    A rank that an adapter does not have, whose unit b_k a_k is zero,
    or whose row of A is pruned whole has S = 0.
    """

    density: float = 0.2
    balance: bool = False

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, layer: Layer) -> Update:
        tasks = [_Task.of(pair, self.density, alive=True) for pair in _factors(layer, self.balance)]
        if not tasks:
            return zero_of(layer.updates[0])
        total = _per_rank([task.weight * task.scores for task in tasks])
        shares = [
            task.sign * _over(task.weight * task.scores, total[: len(task.scores)])
            for task in tasks
        ]
        return _rounded(
            torch.cat([task.B * share for task, share in zip(tasks, shares, strict=True)], dim=1),
            torch.cat([task.A for task in tasks]),
            layer,
        )


@part
class RobustFactors:
    """RobustMerge of the authors' code: merges A and B separately, so cross terms B~_i A~_j enter.

    A' = f sum_t A~_t and B'[:, k] = f sum_t c_t[k] B~_t[:, k] / sum_t c_t[k], with c_t = S_t of
    `RobustSum`, raised to its own order statistic number floor((1 - top_ranks) r):
    only the largest `top_ranks` share of scores stay distinct.

    Args:
        density: the fraction of entries kept, per factor. The code keeps n - int(0.8 n) + 1 of n.
        top_ranks: 0.2 in the code; 1.0 does not clamp (the re-implementation in
            Compress-then-Merge).
        factor: f, 2.0 in the code, on A' and on B', so the update is 4 times the mean of B~
            times the sum of A~.

    A weight multiplies c_t (and its sign B~_t); a weight of 0 leaves the adapter out. Shorter
    adapters are padded with ranks of c = 0. A row of A that is pruned whole gets c = 0;
    the code divides by zero there and returns NaN.
    """

    density: float = 0.2
    top_ranks: float = 0.2
    factor: float = 2.0

    def __post_init__(self) -> None:
        check_density(self.density)
        if not 0 < self.top_ranks <= 1:
            raise MethodError(
                f"top_ranks is a share of the ranks, in (0, 1]; got {self.top_ranks!r}"
            )

    def __call__(self, layer: Layer) -> Update:
        tasks = [
            _Task.of(pair, self.density, alive=False) for pair in _factors(layer, balance=False)
        ]
        if not tasks:
            return zero_of(layer.updates[0])
        scores = [task.weight * self._clamped(task.scores) for task in tasks]
        total = _per_rank(scores)
        A = total.new_zeros(len(total), layer.shape[1])
        B = total.new_zeros(layer.shape[0], len(total))
        for task, score in zip(tasks, scores, strict=True):
            rank = len(score)
            A[:rank] += self.factor * task.A
            B[:, :rank] += self.factor * task.sign * task.B * _over(score, total[:rank])
        return _rounded(B, A, layer)

    def _clamped(self, scores: Tensor) -> Tensor:
        alive = scores > 0
        if not bool(alive.any()):
            return scores
        ordered = scores[alive].sort().values
        floor = ordered[min(int((1 - self.top_ranks) * len(ordered) + 1e-9), len(ordered) - 1)]
        return torch.where(alive, scores.clamp(min=float(floor)), scores)


@part
class ClusterUnits:
    """k-means over the units u = [a; b] of all adapters;
    the merged adapter has one unit per cluster.

    The centroid c = mean u_i is multiplied by mean |u_i|_inf / |c|_inf, which gives back what
    averaging took, and B by the output scale. (a, b) and (-a, -b) are the same unit: each takes the
    sign that agrees with its centroid (the largest entry of a is positive where neither does), and
    distances are min(|u - c|, |u + c|). So neither signs nor the order of units matter.

    Args:
        rank: k, the number of clusters; None: the largest number of units of an adapter.
        balance: take the units of the balanced factors, so that the result depends on the updates
            alone.
        output_scale: "adapter": sqrt(r / k) with r the mean number of units of an adapter
            (TARA-Merge); "all": sqrt(N / k) with N the number of all units (Compress-then-Merge).
            The second is sqrt(K) larger.
        starts: of k-means++, seeded by `seed`, the layer's name and the adapters' content; the best
            is taken.
        seed: of the starts.

    Weights |w| weigh the units in the means, the sign of w is that of b.
    Units that are zero are left out.
    """

    rank: int | None = None
    balance: bool = True
    output_scale: Literal["adapter", "all"] = "adapter"
    starts: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None and (isinstance(self.rank, bool) or self.rank < 1):
            raise MethodError(
                f"rank is the number of clusters, at least 1, or None; got {self.rank!r}"
            )
        if self.starts < 1:
            raise MethodError(f"starts is at least 1; got {self.starts!r}")

    def __call__(self, layer: Layer) -> Update:
        pairs = sorted(_factors(layer, self.balance), key=lambda pair: (pair.digest, pair.weight))
        pairs = [pair for pair in (pair.nonzero() for pair in pairs) if pair.A.shape[0]]
        if not pairs:
            return zero_of(layer.updates[0])
        pairs = [pair.canonical() for pair in pairs]
        A = torch.cat([pair.A for pair in pairs])
        B = torch.cat([pair.B * pair.sign for pair in pairs], dim=1)
        counts = [pair.A.shape[0] for pair in pairs]
        weights = torch.cat(
            [A.new_full((n,), abs(pair.weight)) for n, pair in zip(counts, pairs, strict=True)]
        )
        k = min(self.rank or max(counts), sum(counts))
        seed = seed_of(self.seed, layer.name, *(pair.digest for pair in pairs))
        means = signed_kmeans(A @ A.T + B.T @ B, weights, k, seed, self.starts)
        units = sum(counts) / (len(pairs) if self.output_scale == "adapter" else 1)
        sizes = torch.maximum(A.abs().amax(1), B.abs().amax(0))
        centre_A, centre_B = means @ A, B @ means.T
        have = torch.maximum(centre_A.abs().amax(1), centre_B.abs().amax(0))
        ratio = _over(means.abs() @ sizes, have)
        return _rounded(centre_B * ratio * (units / k) ** 0.5, centre_A * ratio[:, None], layer)


def signed_kmeans(gram: Tensor, weights: Tensor, k: int, seed: int, starts: int) -> Tensor:
    """k-means of points and their negatives, from inner products alone.

    Args:
        gram: (N, N) inner products, float64.
        weights: (N,) positive.
        k: the number of clusters, at most N.
        seed: of the k-means++ starts.
        starts: how many; the one of least weighted distance is taken.

    Returns:
        (at most k, N): row c holds the signed, normalised weights of the points of cluster c; c's
        centroid is its product with the points. Fewer rows if there are fewer different points.
    """
    if k >= len(gram):
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    best: Tensor | None = None
    least = float("inf")
    for start in range(starts):
        means, distance = _lloyd(gram, weights, _plus_plus(gram, weights, k, seed_of(seed, start)))
        if best is None or distance < least * (1 - 1e-9):
            best, least = means, distance
    assert best is not None
    return best


def _plus_plus(gram: Tensor, weights: Tensor, k: int, seed: int) -> Tensor:
    """k-means++: the next centre is drawn with probability w d^2. Rows select points."""
    generator = torch.Generator().manual_seed(seed)
    norms = gram.diagonal()
    near = norms.new_full(norms.shape, float("inf"))
    chosen: list[int] = []
    for _ in range(k):
        mass = weights * (torch.where(near > 1e-14 * norms, near, 0.0) if chosen else 1.0)
        total = float(mass.sum())
        if total <= 0:
            break
        edges = torch.cumsum(mass, 0)
        draw = float(torch.rand(1, generator=generator, dtype=torch.float64)) * float(edges[-1])
        index = int(torch.searchsorted(edges, edges.new_tensor(draw), right=True))
        index = min(index, int(mass.nonzero()[-1]))
        chosen.append(index)
        near = torch.minimum(near, (norms + norms[index] - 2 * gram[index].abs()).clamp(min=0))
    means = gram.new_zeros(len(chosen), len(gram))
    means[torch.arange(len(chosen)), torch.tensor(chosen)] = 1.0
    return means


def _lloyd(gram: Tensor, weights: Tensor, means: Tensor) -> tuple[Tensor, float]:
    """Assign, average, until nothing moves: the means,
    and the weighted sum of squared distances.
    """
    before: Tensor | None = None
    points = torch.arange(len(gram), device=gram.device)
    while True:
        products = means @ gram
        squares = gram.diagonal() + (products * means).sum(1, keepdim=True) - 2 * products.abs()
        nearest = squares.argmin(0)
        distance = (weights * squares[nearest, points].clamp(min=0)).sum()
        size = (gram.diagonal() * (products * means).sum(1)[nearest]).clamp(min=0).sqrt()
        signs = torch.where(products[nearest, points] < -1e-9 * size, -1.0, 1.0).to(gram.dtype)
        members = torch.zeros_like(means)
        members[nearest, points] = signs * weights
        members = members[members.any(1)]
        members = members / members.abs().sum(1, keepdim=True)
        if before is not None and float(distance) >= float(before) * (1 - 1e-12):
            return members, float(distance)
        means, before = members, distance


@dataclass(frozen=True)
class _Pair:
    """The factors of one adapter in float64, with its weight and digest."""

    B: Tensor
    A: Tensor
    weight: float
    digest: str

    @property
    def sign(self) -> float:
        return -1.0 if self.weight < 0 else 1.0

    def nonzero(self) -> _Pair:
        """Only the units that are not zero."""
        alive = self.A.any(1) & self.B.any(0)
        return _Pair(self.B[:, alive], self.A[alive], self.weight, self.digest)

    def canonical(self) -> _Pair:
        """The largest entry of every row of A positive."""
        signs = self.A.gather(1, self.A.abs().argmax(1, keepdim=True)).sign()
        return _Pair(self.B * signs[:, 0], self.A * signs, self.weight, self.digest)


@dataclass(frozen=True)
class _Task:
    """The pruned factors of one adapter and the compensation S of every rank."""

    B: Tensor
    A: Tensor
    scores: Tensor
    weight: float
    sign: float

    @staticmethod
    def of(pair: _Pair, density: float, alive: bool) -> _Task:
        keep = TopFraction(density)
        A, B = (factor * keep(factor.abs()) for factor in (pair.A, pair.B))
        scores = _over(pair.A.abs().sum(1), A.abs().sum(1))
        if alive:
            scores = scores * pair.B.any(0)
        return _Task(B, A, scores, abs(pair.weight), pair.sign)


def _factors(layer: Layer, balance: bool) -> list[_Pair]:
    """The factors of every adapter that has the layer and a weight;
    a dense update has only balanced ones.
    """
    pairs: list[_Pair] = []
    for member in layer.members:
        if not member.counts:
            continue
        update, weight, digest = member.update, member.weight, member.digest
        if isinstance(update, Dense) or balance:
            U, sigma, Vh = update.svd()
            pairs.append(_Pair(*split_evenly(U, sigma, Vh, numerical_rank(sigma)), weight, digest))
        else:
            pairs.append(_Pair(update.B.double(), update.A.double(), weight, digest))
    return pairs


def _per_rank(scores: Sequence[Tensor]) -> Tensor:
    """The sum over adapters of the scores of rank k, for every k that one of them has."""
    total = scores[0].new_zeros(max(len(score) for score in scores))
    for score in scores:
        total[: len(score)] += score
    return total


def _over(values: Tensor, divisor: Tensor) -> Tensor:
    """values / divisor, and 0 where the divisor is 0."""
    return torch.where(divisor > 0, values / torch.where(divisor > 0, divisor, 1.0), 0.0)


def _rounded(B: Tensor, A: Tensor, layer: Layer) -> LowRank:
    dtype = layer.updates[0].dtype
    return LowRank(B.to(dtype), A.to(dtype))
