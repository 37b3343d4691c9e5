"""Adapters held against each other: who agrees with the others has the say, and who is far longer is shortened.

Both look at whole adapters, through norms and inner products alone, and need neither a model nor anchors.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import field, replace
from statistics import median_high
from typing import cast

import torch
from torch import Tensor

from sapmerge.compose import Mapped, prepare
from sapmerge.errors import MethodError, SapmergeWarning
from sapmerge.layer import Layer, LayerStream, Method, Update
from sapmerge.lowrank import whole_gram
from sapmerge.mergers import shared_out
from sapmerge.recipe import part

__all__ = ["ClipNorms", "WeighByAgreement"]

_FEW = 0.1
"""Of an equal share: who has less than this is named in a warning."""


@part
class WeighByAgreement:
    """Weigh every adapter by how much it agrees with the others: by the mean cosine of its update with theirs.

        weight_k ~ sum_{j != k} max(0, cos(D_k, D_j) + prior)

    Adapters of one base are nearly orthogonal; what they have learned in common makes their cosines positive. One that
    was trained on wrong labels shares little with the others, and one with a flipped sign is opposed to them. Copies of
    one adapter are asked once, and share its say. Two adapters weigh the same, whatever they are.

    The given weights are multiplied; those of one sign keep their sum. Agreement is that of the updates without weights
    (who merges with a negative weight means it), over all layers together, inside `In` in its coordinates. Adapters of
    weight 0 or without updates are not asked.

    Args:
        method: any method.
        prior: added to every cosine, in [0, 1): adapters that have nothing to do with each other weigh the same.
        copies: from this cosine on, two adapters are copies of each other; in (0, 1).

    Warns:
        SapmergeWarning: names adapters with less than a tenth of an equal share.

    Source: the agreement of predictors tells their quality without any label: Parisi et al., "Ranking and combining
    multiple predictors without labeled data", https://arxiv.org/abs/1303.3257; here one step of the power iteration
    for their leading eigenvector, so that of two camps the larger one does not silence the other.
    """

    method: Method
    prior: float = 0.02
    copies: float = 0.9
    shares: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (0 <= self.prior < 1 and 0 < self.copies < 1):
            raise MethodError(
                "WeighByAgreement's prior is a cosine in [0, 1), and copies one in (0, 1); "
                f"got {self.prior!r} and {self.copies!r}"
            )

    def prepare(self, layers: LayerStream) -> WeighByAgreement:
        products, one = whole_gram(layers)
        done = replace(self, shares=() if one is None else self._shares(products, one))
        return replace(done, method=prepare(self.method, Mapped(layers, done._weighed)))

    def __call__(self, layer: Layer) -> Update:
        if self.shares is None:
            return self.prepare(cast("LayerStream", [layer]))(layer)
        total = sum(self.shares) or 1.0
        layer.record("agreement", {label: s / total for label, s in zip(layer.adapters, self.shares, strict=True)})
        return self.method(self._weighed(layer))

    def _weighed(self, layer: Layer) -> Layer:
        return replace(layer, weights=shared_out(layer.weights, self.shares or ()))

    def _shares(self, products: Tensor, layer: Layer) -> tuple[float, ...]:
        """One factor per adapter, of mean 1 over those that are asked; 1 for all of them if none agrees with any."""
        norms = products.diagonal().sqrt()
        asked = (torch.tensor(layer.weights) != 0) & (norms > 0)
        both = torch.outer(asked, asked)
        units = torch.where(norms > 0, norms, 1.0)
        cosines = products / torch.outer(units, units)
        same = (cosines >= self.copies) & both | torch.eye(len(layer), dtype=torch.bool)
        votes = torch.where(both & ~same, (cosines + self.prior).clamp_min(0), 0.0)
        copies = same.sum(1)
        agreement = (votes / copies).sum(1) / copies
        if not agreement.any():
            agreement = asked.double()
        shares = [float(share) for share in agreement * asked.sum() / agreement.sum().clamp_min(1e-300)]
        few = [repr(layer.adapters[k]) for k, share in enumerate(shares) if asked[k] and share < _FEW]
        if few:
            message = f"{', '.join(few)}: agree with hardly any other adapter, and have next to no say"
            warnings.warn(f"{message} (WeighByAgreement)", SapmergeWarning, stacklevel=3)
        return tuple(shares)


@part
class ClipNorms:
    """Shorten an adapter that is more than `ratio` times as long as the median of all to that length.

    Norm clipping, as federated servers do it, with a bound that is taken from the adapters: fewer than half of them
    cannot raise it above `ratio` times the longest of the others. Of an even number the longer of the two in the middle
    counts, so two adapters are never clipped.

    Args:
        method: any method. Where it asks anchors, these see the shortened adapters too.
        ratio: at least 1. An adapter of weight 0 or without updates does not count, and is left as it is.

    Source: Sun et al., "Can you really backdoor federated learning?", https://arxiv.org/abs/1911.07963
    """

    method: Method
    ratio: float = 2.0
    scales: Mapping[int, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (self.ratio >= 1 and math.isfinite(self.ratio)):
            raise MethodError(f"ClipNorms' ratio is a multiple of the median norm, at least 1; got {self.ratio!r}")

    def prepare(self, layers: LayerStream) -> ClipNorms:
        first, squares, names = None, torch.zeros(0), set[str]()
        for layer in layers:
            found = torch.tensor([update.norm() ** 2 for update in layer], dtype=torch.float64)
            first, squares = (layer, found) if first is None else (first, squares + found)
            names.add(layer.name)
        scales = {} if first is None else self._scales(squares.sqrt(), first.weights)
        done = replace(self, scales=scales)
        anchors = None if first is None else first.anchors
        if anchors is not None and scales:
            anchors = anchors.scaled(scales, names)
        seen = Mapped(layers, lambda layer: replace(done._clipped(layer), anchors=anchors))
        return replace(done, method=prepare(self.method, seen))

    def __call__(self, layer: Layer) -> Update:
        if self.scales is None:
            return self.prepare(cast("LayerStream", [layer]))(layer)
        if self.scales:
            layer.record("clipped", {layer.adapters[k]: scale for k, scale in self.scales.items()})
        return self.method(self._clipped(layer))

    def _clipped(self, layer: Layer) -> Layer:
        scales = self.scales or {}
        return replace(layer, updates=tuple(u.scaled(scales[k]) if k in scales else u for k, u in enumerate(layer)))

    def _scales(self, norms: Tensor, weights: tuple[float, ...]) -> dict[int, float]:
        counted = {k: float(norm) for k, norm in enumerate(norms) if weights[k] != 0 and norm > 0}
        bound = self.ratio * median_high(counted.values()) if counted else math.inf
        return {k: bound / norm for k, norm in counted.items() if norm > bound}
