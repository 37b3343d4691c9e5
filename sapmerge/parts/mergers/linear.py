"""Mergers: Layer -> one update. They alone see the weights of the adapters (and
ElectSign, which votes).

A plain function is a merger too: `lambda layer: layer.updates[0]`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import add_up
from sapmerge.core.part import part
from sapmerge.core.protocols import LayerStream
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import MethodError, SapmergeWarning

__all__ = ["DisjointMax", "DisjointMean", "FactorMean", "FactorSum", "Mean", "Sum"]

_BLOCK = 1 << 17  # entries of which four arrays fit into a cache


def total_weight(layer: Layer, advice: str) -> float:
    """The sum of the weights, by which a mean divides.

    Raises:
        MethodError: it is zero; `advice` ends the message.
    """
    return _total(layer.weights, advice)


def _total(weights: tuple[float, ...], advice: str) -> float:
    total = sum(weights)
    if abs(total) <= 1e-12 * sum(abs(weight) for weight in weights):
        raise MethodError(f"the weights {weights} sum to zero, so they have no mean{advice}")
    return total


def shared_out(weights: Sequence[float], say: Sequence[float]) -> tuple[float, ...]:
    """The weights times the say of each adapter; those of one sign keep their sum,
    and stay if none counts.
    """
    out = list(weights)
    for sign in (1, -1):
        group = [k for k, weight in enumerate(weights) if weight * sign > 0]
        counted = sum(weights[k] * say[k] for k in group)
        if counted != 0:
            factor = sum(weights[k] for k in group) / counted
            for k in group:
                out[k] = weights[k] * say[k] * factor
    return tuple(out)


def reweighed(layer: Layer, weights: Sequence[float]) -> Layer:
    """The layer with other weights, which the report tells."""
    layer.record("weights", dict(zip(layer.adapters, weights, strict=True)))
    return layer.with_weights(weights)


@part
class Sum:
    """sum_k w_k D_k (task arithmetic, Ilharco et al., https://arxiv.org/abs/2212.04089)."""

    def __call__(self, layer: Layer) -> Update:
        return sum_of(self, layer, layer)

    def shares(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """What every update is multiplied by in the sum."""
        return weights


@part
class Mean:
    """sum_k w_k D_k / sum_k w_k. An adapter without the layer counts with an update of zero.

    Raises:
        MethodError: the weights sum to zero.
    """

    def __call__(self, layer: Layer) -> Update:
        return sum_of(self, layer, layer)

    def shares(self, weights: tuple[float, ...]) -> tuple[float, ...]:
        """What every update is multiplied by in the sum."""
        total = _total(weights, "; use Sum()")
        return tuple(weight / total for weight in weights)


def sum_of(merger: Sum | Mean, layer: Layer, updates: Iterable[Update]) -> Update:
    """What a sum makes of a layer with other updates, which are looked at one after the other."""
    shares = merger.shares(layer.weights)
    return add_up(zip(updates, shares, strict=True), layer.updates[0])


@part
class DisjointMean:
    """In every entry the mean of the adapters that are not zero there: sum w D / sum |w| [D != 0].

    Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708
    """

    def __call__(self, layer: Layer) -> Update:
        present = [(m.update.dense(), m.weight) for m in layer.members if not m.absent]
        if not present:
            return layer.updates[0]
        total = torch.zeros_like(present[0][0])
        rows = max(1, _BLOCK // max(layer.shape[1], 1))
        for start in range(0, layer.shape[0], rows):
            block = total[start : start + rows]
            count = torch.zeros_like(block)
            for matrix, weight in present:
                some = matrix[start : start + rows]
                block.add_(some, alpha=weight)
                count.add_(some.sign().abs_(), alpha=abs(weight))
            # where nobody counts, the total is 0
            block.div_(count.clamp_min_(torch.finfo(count.dtype).tiny))
        return Dense(total)


@part
class DisjointMax:
    """In every entry the update of largest magnitude, times the sign of its weight.

    After `ElectSign` all candidates of an entry agree:
    the "max" of the TIES code, and the unified update of EMR.
    """

    def __call__(self, layer: Layer) -> Update:
        present = [(m.update.dense(), m.weight) for m in layer.members if m.counts]
        if not present:
            return layer.updates[0].scaled(0.0)
        best = torch.zeros_like(present[0][0])
        for matrix, weight in present:
            best = torch.where(matrix.abs() > best.abs(), matrix * math.copysign(1.0, weight), best)
        return Dense(best)


@part
class FactorMean:
    """The mean of the Bs times the mean of the As:
    (sum p_k B_k)(sum p_k A_k), p = w / sum w (FedAvg on LoRA, FedIT).

    Not the mean of the updates: the product contains the cross terms B_i A_j, and depends on how
    every update is split into factors. alpha / r is folded into B.
    An adapter without the layer counts with factors of zero.

    Raises:
        MethodError: unequal ranks, a dense update, or weights that sum to zero.

    Source: Zhang et al., "Towards building the federated GPT" (FedIT),
    https://arxiv.org/abs/2305.05644
    """

    def prepare(self, layers: LayerStream) -> FactorMean:
        _warn_of_cross_terms(layers)
        return self

    def __call__(self, layer: Layer) -> Update:
        total = total_weight(layer, "; use FactorSum()")
        shares = [weight / total for weight in layer.weights]
        return _apart(layer, shares, shares)


@part
class FactorSum:
    """(sum sqrt|w_k| B_k)(sum sign(w_k) sqrt|w_k| A_k):
    what PEFT's `add_weighted_adapter` calls "linear".

    Not the sum of the updates, for the same reasons as `FactorMean`. PEFT splits alpha / r evenly
    between the factors; here it is folded into B, which differs where adapters do not share it.
    """

    def prepare(self, layers: LayerStream) -> FactorSum:
        _warn_of_cross_terms(layers)
        return self

    def __call__(self, layer: Layer) -> Update:
        roots = [math.sqrt(abs(weight)) for weight in layer.weights]
        signed = [
            math.copysign(root, weight) for root, weight in zip(roots, layer.weights, strict=True)
        ]
        return _apart(layer, roots, signed)


def _warn_of_cross_terms(layers: LayerStream) -> None:
    for layer in layers:
        _factors(layer)
    warnings.warn(
        "A and B are merged separately: the result is not the average of the updates (cross terms "
        "B_i A_j enter, and it depends on how each update is split into factors); mean() averages "
        "the updates",
        SapmergeWarning,
        stacklevel=2,
    )


def _apart(layer: Layer, left: Sequence[float], right: Sequence[float]) -> Update:
    """(sum left_k B_k)(sum right_k A_k)."""
    factors = _factors(layer)
    if not factors:
        return layer.updates[0]
    return LowRank(
        torch.stack([left[k] * update.B for k, update in factors]).sum(0),
        torch.stack([right[k] * update.A for k, update in factors]).sum(0),
    )


def _factors(layer: Layer) -> list[tuple[int, LowRank]]:
    """The adapters that have the layer, with factors of one rank."""
    present = [(k, update) for k, update in enumerate(layer) if not update.absent]
    low = [(k, update) for k, update in present if isinstance(update, LowRank)]
    if len(low) < len(present):
        raise MethodError(
            f"layer {layer.name!r}: an update is dense and has no factors to average; use mean()"
        )
    if len({update.rank for _, update in low}) > 1:
        ranks = ", ".join(f"{layer.adapters[k]}: {update.rank}" for k, update in low)
        raise MethodError(
            f"layer {layer.name!r}: factors can only be averaged at one rank; got {ranks}; use "
            "mean()"
        )
    return low
