"""Mergers: Layer -> one update. They alone see the weights of the adapters (and ElectSign, which votes).

A plain function is a merger too: `lambda layer: layer.updates[0]`.
"""

from __future__ import annotations

import torch

from sapmerge.errors import MethodError
from sapmerge.layer import Dense, Layer, LowRank, Update
from sapmerge.lowrank import concatenate
from sapmerge.recipe import part

__all__ = ["DisjointMean", "Mean", "Sum"]


def weighted_sum(layer: Layer, weights: tuple[float, ...]) -> Update:
    """sum_k weights[k] D_k; low-rank updates are concatenated, exactly."""
    low = [(u, w) for u, w in zip(layer, weights, strict=True) if isinstance(u, LowRank) and u.rank]
    dense = [(u, w) for u, w in zip(layer, weights, strict=True) if isinstance(u, Dense)]
    factors = concatenate([u for u, _ in low], [w for _, w in low]) if low else None
    if not dense:
        return layer.updates[0] if factors is None else factors
    total = torch.zeros_like(dense[0][0].matrix) if factors is None else factors.dense()
    for update, weight in dense:
        total = total + update.matrix * weight
    return Dense(total)


@part
class Sum:
    """sum_k w_k D_k (task arithmetic, Ilharco et al., https://arxiv.org/abs/2212.04089)."""

    def __call__(self, layer: Layer) -> Update:
        return weighted_sum(layer, layer.weights)


@part
class Mean:
    """sum_k w_k D_k / sum_k w_k. An adapter without the layer counts with an update of zero.

    Raises:
        MethodError: the weights sum to zero.
    """

    def __call__(self, layer: Layer) -> Update:
        total = sum(layer.weights)
        if abs(total) <= 1e-12 * sum(abs(weight) for weight in layer.weights):
            raise MethodError(f"the weights {layer.weights} sum to zero, so they have no mean; use Sum()")
        return weighted_sum(layer, tuple(weight / total for weight in layer.weights))


@part
class DisjointMean:
    """In every entry the mean of the adapters that are not zero there: sum w D / sum |w| [D != 0].

    Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708
    """

    def __call__(self, layer: Layer) -> Update:
        present = [(update.dense(), weight) for update, weight in zip(layer, layer.weights, strict=True) if update.rank]
        if not present:
            return layer.updates[0]
        total, count = torch.zeros_like(present[0][0]), torch.zeros_like(present[0][0])
        for matrix, weight in present:
            total += weight * matrix
            count += (matrix != 0).to(count.dtype) * abs(weight)
        return Dense(torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0))
