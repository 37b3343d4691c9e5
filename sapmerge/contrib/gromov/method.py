"""DGSM-TEFM: updates aligned layer by layer, and merged."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from sapmerge.contrib.gromov.plans import Plan, gromov_plan, neuron_distances
from sapmerge.core.layer import Layer
from sapmerge.core.linalg import numerical_rank, svd
from sapmerge.core.part import part
from sapmerge.core.protocols import Method
from sapmerge.core.updates import Dense, Update, zero_of
from sapmerge.errors import MethodError
from sapmerge.parts.wrappers import Chain

__all__ = ["GromovMerge", "dgsm_tefm"]


@part
class GromovMerge:
    """The first update, and the others brought into its coordinates, layer by layer.

        D' = T_L D T_R^T,    W = D_1 + sum_k lam_k P D'_k + (1 - lam_k) (1 - P) D'_k

    with P the projection on the leading left vectors of D_1 and lam = 1 / (1 + exp(d)), d the
    distance of the plan. lam is at most 1/2: identical updates give D + D / 2, and the part outside
    of the subspace weighs at least as much as that inside. `average` says mean instead.

    Every layer is matched by itself, so what leaves one layer need not fit what enters the next. If
    you have both bases, `GromovAlign` matches each stream once.

    Args:
        rank: of the subspace and of the distances; None: the numerical rank of each update.
        average: the weighted mean of D_1 and the D'_k.
        inputs: "align" them, too, or "keep" them, where bases share their inputs.
    """

    rank: int | None = None
    average: bool = False
    inputs: Literal["align", "keep"] = "align"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise MethodError(f"rank is at least 1; got {self.rank!r}")
        if self.inputs not in ("align", "keep"):
            raise MethodError(f'inputs is "align" or "keep"; got {self.inputs!r}')

    def __call__(self, layer: Layer) -> Update:
        members = [member for member in layer.members if member.counts]
        members = [member for member in members if member.update.norm() > 0]
        if not members:
            return zero_of(layer.updates[0])
        first, *others = members
        reference = first.update.dense().double()
        left, sigma, _ = svd(reference)
        U = left[:, : self.rank or numerical_rank(sigma)]
        total, weight = first.weight * reference, first.weight
        for member in others:
            aligned, distance = self._aligned(reference, member.update.dense().double())
            inside = U @ (U.T @ aligned)
            share = 1 / (1 + math.exp(distance))
            mixed = share * inside + (1 - share) * (aligned - inside)
            total = total + member.weight * (aligned if self.average else mixed)
            weight += member.weight
        if self.average:
            if weight == 0:
                raise MethodError("the weights sum to 0, and there is no mean")
            total = total / weight
        return Dense(total.to(layer.updates[0].dtype))

    def _aligned(self, one: Tensor, other: Tensor) -> tuple[Tensor, float]:
        plan = self._plan(one, other)
        moved = plan.transport.to(other) @ other
        if self.inputs == "align":
            moved = moved @ self._plan(one.T, other.T).transport.to(other).T
        return moved, plan.distance

    def _plan(self, one: Tensor, other: Tensor) -> Plan:
        return gromov_plan(neuron_distances(one, self.rank), neuron_distances(other, self.rank))


def dgsm_tefm(
    rank: int | None = None, average: bool = False, inputs: Literal["align", "keep"] = "align"
) -> Method:
    """DGSM-TEFM's static form: updates of bases that do not correspond, aligned to the first one.

    Needs the extra `gromov`. See `GromovMerge` for the formula.

    Args:
        rank: of the subspace and of the distances; None: the numerical rank of each update.
        average: the mean of the aligned updates instead of the formula.
        inputs: "align" or "keep" the inputs.

    Deviations. The published metric between orthonormal columns is constant, so its plan is
    uniform; distances here are between neurons. The dynamic map over plans is left out: started at
    the identity it did not move in 30 planted cases, started elsewhere it collapses the subspace.

    Example:
        >>> from sapmerge.contrib import gromov
        >>> gromov.dgsm_tefm(rank=6, average=True)
        Chain(GromovMerge(rank=6, average=True, inputs='align'))
    """
    return Chain(GromovMerge(rank, average, inputs))
