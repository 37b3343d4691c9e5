"""Mergers that combine whole updates by where they lie:
the geometric median, Krum, Model Stock, and slerp for two.

They see updates through their inner products alone (`lowrank.gram`), so low rank stays low rank. In
all of them, and in those of `entrywise.py`, an adapter of weight 0 does not count, one of negative
weight counts as its opposite with weight |w|, and one without the layer is a member whose
update is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import RTOL
from sapmerge.core.lowrank import gram, weighted_sum, whole_gram
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream
from sapmerge.core.updates import Dense, LowRank, Update, absent
from sapmerge.errors import MethodError

__all__ = ["GeometricMedian", "Krum", "ModelStock", "Slerp"]

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(Gram matrix, positive weights) of the members -> one coefficient per member."""


@part
class GeometricMedian:
    """The update X that minimises sum_k w_k ||X - D_k||, of the whole adapter:
    half of them cannot move it far.

    Weiszfeld's iteration on the coefficients of X = sum a_k D_k, through Gram matrices. Where one
    of the D_k is the minimum it is returned as it is; where the minimum is not unique (two adapters
    of equal weight), the mean of those D_k that are minima.

    Args:
        scope: "adapter": distances over all layers together; "layer": a median for each layer.

    Source: Pillutla et al., "Robust aggregation for federated learning" (RFA),
    https://arxiv.org/abs/1912.13445
    """

    scope: Literal["adapter", "layer"] = "adapter"
    fitted: tuple[float, ...] | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> GeometricMedian:
        return (
            replace(self, fitted=_coefficients(layers, _geometric_median))
            if self.scope == "adapter"
            else self
        )

    def __call__(self, layer: Layer) -> Update:
        return _combine(layer, _fitted(self, self.fitted, layer, _geometric_median))


@part
class Krum:
    """The adapter that lies closest to its neighbours,
    or the mean of the `select` closest ones (multi-Krum).

    The score of an adapter is the sum of the squared distances to its K - f - 2 (at least one)
    nearest others, f = `byzantine`. The `select` lowest are averaged with their weights; scores
    that tie at the cut are all taken, so that the order does not matter (for K = 3 the two of the
    closest pair always tie).

    Args:
        byzantine: how many adapters may be arbitrary; the theorem needs K >= 2 f + 3. None: as many
            as it allows.
        select: how many adapters are averaged; 1 is Krum.
        scope: "adapter": distances over all layers together (the paper);
            "layer": a choice for each layer.

    Raises:
        MethodError: too few adapters for `byzantine` or `select`.

    Source: Blanchard et al., "Machine learning with adversaries", https://arxiv.org/abs/1703.02757
    """

    byzantine: int | None = None
    select: int = 1
    scope: Literal["adapter", "layer"] = "adapter"
    fitted: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.byzantine is not None and self.byzantine < 0:
            raise MethodError(
                f"Krum's byzantine is a number of adapters, at least 0; got {self.byzantine!r}"
            )
        if self.select < 1:
            raise MethodError(
                f"Krum's select is a number of adapters, at least 1; got {self.select!r}"
            )

    def prepare(self, layers: LayerStream) -> Krum:
        return (
            replace(self, fitted=_coefficients(layers, self._choose))
            if self.scope == "adapter"
            else self
        )

    def __call__(self, layer: Layer) -> Update:
        return _combine(layer, _fitted(self, self.fitted, layer, self._choose))

    def _choose(self, products: Tensor, weights: Tensor) -> Tensor:
        count = len(weights)
        if self.byzantine is not None and count < 2 * self.byzantine + 3:
            raise MethodError(
                f"Krum withstands byzantine={self.byzantine} only among {2 * self.byzantine + 3} "
                "adapters or more; "
                f"got {count}: write byzantine={max(0, (count - 3) // 2)}, or None"
            )
        if self.select > count:
            raise MethodError(
                f"Krum cannot select {self.select} of {count} adapters; write select={count} or "
                "less"
            )
        if count == 1:
            return torch.ones_like(weights)
        byzantine = max(0, (count - 3) // 2) if self.byzantine is None else self.byzantine
        distances = _squared_distances(products)
        distances.fill_diagonal_(math.inf)
        scores = distances.sort(dim=1).values[:, : max(1, count - byzantine - 2)].sum(1)
        cut = scores.sort().values[self.select - 1]
        chosen = torch.where(scores <= cut * (1 + 1e-9), weights, 0.0)
        return chosen / chosen.sum()


@part
class ModelStock:
    """t mean_k(D_k) with t = N c / (1 + (N - 1) c), c the mean cosine between updates of the layer.

    t is where the plane through the adapters is closest to the centre they scatter around, so it
    shrinks what they do not share: adapters of unrelated tasks (c = 0) give the base model, and c <
    0 points away from their mean. Made for adapters of one task. With weights, p = w / sum w: c is
    the mean over pairs weighted by p_i p_j, and N = 1 / sum p^2. The cosine with a zero update is
    0; where 1 + (N - 1) c vanishes so does the mean direction, and t is 0.
    So it is in a layer that only one adapter has: the others count as zero updates.

    Args:
        scope: "layer" (the paper) or "row": a t for every row (mergekit's `filter_wise`).

    Source: Jang et al., "Model Stock", https://arxiv.org/abs/2403.19522 (no official code).
    mergekit floors the product of two norms at 1e-6,
    so that small LoRA rows seem orthogonal; we do not.
    """

    scope: Literal["layer", "row"] = "layer"

    def __call__(self, layer: Layer) -> Update:
        index, signs, weights = members(layer)
        shares = weights / weights.sum()
        mean = _combine(layer, _spread(layer, index, shares * signs))
        if len(index) == 1:
            return mean
        updates = [layer.updates[k] for k in index]
        products = gram(updates)[..., None] if self.scope == "layer" else _row_gram(updates)
        products = products * torch.outer(signs, signs)[..., None]
        sizes = products.diagonal().T.clamp(min=0.0).sqrt()
        norms = sizes[:, None] * sizes[None]
        cosines = torch.where(norms > 0, products / torch.where(norms > 0, norms, 1.0), 0.0).clamp(
            -1.0, 1.0
        )
        pairs = torch.outer(shares, shares).fill_diagonal_(0.0)
        c = (pairs[..., None] * cosines).sum((0, 1)) / pairs.sum()
        number = float(1 / shares.square().sum())
        below = 1 + (number - 1) * c
        t = torch.where(below > 1e-6, number * c / torch.where(below > 1e-6, below, 1.0), 0.0)
        layer.record("model_stock", float(t.mean()))
        if self.scope == "layer":
            return mean.scaled(float(t))
        column = t[:, None].to(device=mean.device, dtype=mean.dtype)
        return (
            LowRank(mean.B * column, mean.A)
            if isinstance(mean, LowRank)
            else Dense(mean.matrix * column)
        )


@part
class Slerp:
    """Spherical interpolation of two adapters: (sin((1 - t) a) D_1 + sin(t a) D_2) / sin a,
    a the angle between them.

    t = w_2 / (w_1 + w_2), so weights (1 - t, t) stand for the t of mergekit, and equal ones for the
    middle. Where the directions are opposite (cosine below -0.9995) or one update is zero there is
    no arc: linear interpolation. With one adapter it is that adapter.

    Raises:
        MethodError: more than two adapters.

    Source: Shoemake, "Animating rotation with quaternion curves", 1985;
    here per layer, on updates instead of weights.
    """

    def prepare(self, layers: LayerStream) -> Slerp:
        for layer in layers:
            self._two(layer)
            break
        return self

    def _two(self, layer: Layer) -> tuple[list[int], Tensor, Tensor]:
        index, signs, weights = members(layer)
        if len(index) > 2:
            raise MethodError(
                f"slerp interpolates between two adapters; got {len(index)}: use mean() for more"
            )
        return index, signs, weights

    def __call__(self, layer: Layer) -> Update:
        index, signs, weights = self._two(layer)
        shares = weights / weights.sum()
        if len(index) == 2:
            products = gram([layer.updates[k] for k in index])
            norms = float((products[0, 0].clamp(min=0) * products[1, 1].clamp(min=0)).sqrt())
            cosine = float(products[0, 1] * signs.prod()) / norms if norms > 0 else -1.0
            angle = math.acos(min(1.0, max(-1.0, cosine)))
            if cosine >= -0.9995 and math.sin(angle) > 1e-7:
                shares = torch.sin(shares * angle) / math.sin(angle)
        return _combine(layer, _spread(layer, index, shares * signs))


def members(layer: Layer) -> tuple[list[int], Tensor, Tensor]:
    """Who counts: the indices of the adapters with a weight, the signs of their weights,
    and their magnitudes.
    """
    index = [k for k, weight in enumerate(layer.weights) if weight != 0]
    if not index:
        raise MethodError(f"the weights {layer.weights} are all zero: no adapter counts")
    weights = torch.tensor([layer.weights[k] for k in index], dtype=torch.float64)
    return index, weights.sign(), weights.abs()


def _spread(layer: Layer, index: Sequence[int], coefficients: Tensor) -> tuple[float, ...]:
    """Coefficients of the members -> one per adapter, 0 for the others."""
    spread = {k: float(coefficients[place]) for place, k in enumerate(index)}
    return tuple(spread.get(k, 0.0) for k in range(len(layer)))


def _coefficients(layers: Iterable[Layer], rule: Rule) -> tuple[float, ...] | None:
    """What a rule makes of the Gram matrix summed over all layers; None without layers."""
    total, last = whole_gram(layers)
    if last is None:
        return None
    index, signs, weights = members(last)
    chosen = rule(total[index][:, index] * torch.outer(signs, signs), weights)
    return _spread(last, index, chosen * signs)


def _fitted(
    owner: GeometricMedian | Krum, fitted: tuple[float, ...] | None, layer: Layer, rule: Rule
) -> tuple[float, ...] | None:
    """The coefficients of the whole adapter, or for scope "layer" those of the layer."""
    if owner.scope == "layer":
        return _coefficients([layer], rule)
    if fitted is None:
        raise unprepared(owner)
    return fitted


def _combine(layer: Layer, coefficients: tuple[float, ...] | None) -> Update:
    """sum_k a_k D_k, without those of coefficient 0."""
    shares = coefficients or (0.0,) * len(layer)
    layer.record("coefficients", dict(zip(layer.adapters, shares, strict=True)))
    none = absent(layer.shape, layer.updates[0].rows(torch.zeros(0, dtype=torch.int64)))
    used = [u if share != 0 else none for u, share in zip(layer, shares, strict=True)]
    return weighted_sum(layer.with_updates(used), shares)


def _squared_distances(products: Tensor) -> Tensor:
    """||D_i - D_j||^2; exactly 0 where it is rounding."""
    sizes = products.diagonal()
    squares = (sizes[:, None] + sizes[None]) - 2 * products
    return torch.where(squares > RTOL**2 * sizes.max(), squares, 0.0)


def _geometric_median(products: Tensor, weights: Tensor) -> Tensor:
    largest = float(products.diagonal().max())
    if largest <= 0:
        return weights / weights.sum()
    products = products / largest
    distances = _squared_distances(products).sqrt()
    minima = torch.tensor(
        [_is_minimum(k, products, distances, weights) for k in range(len(weights))]
    )
    if bool(minima.any()):
        chosen = torch.where(minima, weights, 0.0)
        return chosen / chosen.sum()
    shares = weights / weights.sum()
    for _ in range(2000):
        inside = products @ shares
        squares = products.diagonal() - 2 * inside + shares @ inside
        pulls = weights / squares.clamp(min=1e-24).sqrt()
        moved = pulls / pulls.sum()
        done = float((moved - shares).abs().max()) < 1e-14
        shares = moved
        if done:
            break
    return shares


def _is_minimum(k: int, products: Tensor, distances: Tensor, weights: Tensor) -> bool:
    """Whether D_k is a geometric median: the others together pull on it no more than its
    own weight holds.
    """
    apart = distances[k] > 0
    pulls = torch.where(apart, weights / torch.where(apart, distances[k], 1.0), 0.0)
    force = pulls.clone()
    force[k] -= pulls.sum()
    return math.sqrt(max(0.0, float(force @ products @ force))) <= float(weights[~apart].sum()) * (
        1 + 1e-7
    )


def _row_gram(updates: Sequence[Update]) -> Tensor:
    """(K, K, m): the inner products of the updates row by row, float64, on the CPU."""
    count, m = len(updates), updates[0].shape[0]
    out = torch.zeros(count, count, m, dtype=torch.float64)
    for i, x in enumerate(updates):
        for j, y in enumerate(updates[: i + 1]):
            if isinstance(x, LowRank) and isinstance(y, LowRank):
                rows = (x.B.double() @ (x.A.double() @ y.A.double().T) * y.B.double()).sum(1)
            else:
                rows = (x.dense().double() * y.dense().double()).sum(1)
            out[i, j] = out[j, i] = rows.cpu()
    return out
