"""Adapters that are not like the others: far longer ones are scaled down,
and outliers are left out.

Both look at whole adapters. `WeighByAgreement` and `WeighByAnchors` (`weighting`) weigh all
of them instead.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from statistics import median_high

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import gram
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import Mapped, Scaled, anchors_of, scaled
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError, SapmergeWarning
from sapmerge.losses import comparing
from sapmerge.parts.mergers.linear import reweighed, shared_out

__all__ = ["CapShare", "ClipNorms", "ExcludeOutliers"]


@part
class ExcludeOutliers:
    """Leave out an adapter that the others speak against: one that is opposed to them, or that
    shares next to nothing with them and has a higher anchor loss. The others stay equal.

    The agreement of an adapter is the median of its cosines with the others,

        a_k = median_{j != k} <D_k, D_j> / (|D_k| |D_j|)

    With b > 0, the median of everybody's agreement, and L_k, the anchor loss at base + adapter, it
    gets the weight 0

    - if a_k < 0, or
    - if a_k < ratio * b, and L_k is more than `margin` above the median of all losses,

    each by more than `significance` standard errors over the layers.

    Adapters of one base are nearly orthogonal, and what they have learned in common makes their
    cosines a little positive. One that was trained on wrong labels or on another task shares next
    to nothing with the others, and one with a flipped sign is opposed to them. An honest adapter of
    an odd domain shares little, too; there the anchors have to decide. Medians are not moved by bad
    adapters that resemble each other, while they are fewer than half; where half of the adapters
    or more would go, nobody does.

    The other weights are as given, those of one sign scaled to keep their sum. Copies of one
    adapter are asked once. Adapters of weight 0 are not asked, those without updates get the weight
    0, and where fewer than three are asked nobody is left out.

    Args:
        method: any method.
        loss: (model, batch) -> scalar. None: `centered_alignment` for image-text pairs, the
            anchors' own for others.
        ratio: of the usual agreement; in [0, 1).
        margin: in units of the loss; not negative.
        significance: in standard errors over the layers; not negative.
        copies: from this cosine on, two adapters are copies of each other; in (0, 1).

    Raises:
        MethodError: there are no anchors.

    Warns:
        SapmergeWarning: names the adapters that are left out.

    Source: this library. How often it errs among equal adapters, and what it finds: docs/search.md.
    """

    method: Method
    loss: Callable[..., Tensor] | None = None
    ratio: float = 0.4
    margin: float = 0.02
    significance: float = 2.0
    copies: float = 0.9
    shares: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (
            0 <= self.ratio < 1
            and 0 < self.copies < 1
            and self.margin >= 0
            and self.significance >= 0
        ):
            raise MethodError(
                "ExcludeOutliers' ratio is in [0, 1), its copies in (0, 1), its margin and "
                "significance not negative; "
                f"got {self.ratio!r}, {self.copies!r}, {self.margin!r} and {self.significance!r}"
            )

    def prepare(self, layers: LayerStream) -> ExcludeOutliers:
        anchors = anchors_of(layers, "ExcludeOutliers")
        one, products = None, list[Tensor]()
        for layer in layers:
            one = layer
            products.append(gram(layer.updates))
        shares = ()
        if one is not None:
            losses = anchors.losses(self.loss or comparing(anchors))
            shares = self._shares(torch.stack(products), losses, one)
        done = replace(self, shares=shares)
        return replace(done, method=prepare(self.method, Mapped(layers, done._weighed, anchors)))

    def __call__(self, layer: Layer) -> Update:
        if self.shares is None:
            raise unprepared(self)
        excluded = [
            label for label, share in zip(layer.adapters, self.shares, strict=True) if share == 0
        ]
        if excluded:
            layer.record("excluded", excluded)
        return self.method(self._weighed(layer))

    def _weighed(self, layer: Layer) -> Layer:
        return reweighed(layer, shared_out(layer.weights, self.shares or ()))

    def _shares(self, products: Tensor, losses: Sequence[float], layer: Layer) -> tuple[float, ...]:
        """0 for an outlier or an adapter without updates, 1 for others;
        `products` are the layers' Gram matrices.
        """
        norms = products.sum(0).diagonal().sqrt()
        asked = [k for k in range(len(layer)) if layer.weights[k] != 0 and norms[k] > 0]
        # whose sum over the layers is the cosine of whole adapters
        cosines = products / torch.outer(norms, norms).clamp_min(1e-300)
        groups = _copies(cosines.sum(0), asked, self.copies)
        share = torch.zeros(len(groups), len(layer), dtype=cosines.dtype)
        for row, group in enumerate(groups):
            share[row, group] = 1 / len(group)
        between = share @ cosines @ share.T  # means over copies
        lowest = torch.tensor([min(losses[k] for k in group) for group in groups])
        bad = self._outliers(between, lowest) if len(groups) > 2 else []
        left_out = sorted(k for group in bad for k in groups[group])
        if left_out:
            names = ", ".join(repr(layer.adapters[k]) for k in left_out)
            message = (
                f"{names}: left out, opposed to the others or unlike them and worse on the "
                "anchors (ExcludeOutliers)"
            )
            warnings.warn(message, SapmergeWarning, stacklevel=3)
        return tuple(float(k not in left_out and norms[k] > 0) for k in range(len(layer)))

    def _outliers(self, cosines: Tensor, losses: Tensor) -> list[int]:
        """Who is left out: none, if that were half or more. (L, K, K) cosines, (K,) losses."""
        layers = torch.stack([_agreement(layer) for layer in cosines])
        whole = _agreement(cosines.sum(0))
        usual, bound = _median(whole), _median(losses) + self.margin
        opposed = (whole < 0) & self._clear(-layers)
        apart = (whole < self.ratio * usual) & self._clear(_median(layers)[:, None] - layers)
        bad = (usual > 0) & (opposed | (apart & (losses > bound)))
        return [k for k in range(len(bad)) if bad[k]] if 2 * bad.sum() < len(bad) else []

    def _clear(self, values: Tensor) -> Tensor:
        """Whether sums over the layers, (L, K), are that many standard errors above 0."""
        if len(values) == 1:
            return torch.zeros(values.shape[1], dtype=torch.bool)
        return values.sum(0) > self.significance * values.std(0) * len(values) ** 0.5


def _agreement(cosines: Tensor) -> Tensor:
    """Each one's median cosine with the others: (K, K) -> (K,)."""
    count = len(cosines)
    return _median(cosines[~torch.eye(count, dtype=torch.bool)].view(count, count - 1))


def _median(values: Tensor) -> Tensor:
    """Over the last axis; of an even number the mean of the two in the middle."""
    ranked, count = values.sort(-1).values, values.shape[-1]
    return (ranked[..., (count - 1) // 2] + ranked[..., count // 2]) / 2


def _copies(cosines: Tensor, asked: Sequence[int], bound: float) -> list[list[int]]:
    """Adapters in groups of copies: who is like anybody of a group belongs to it."""
    groups = {k: [k] for k in asked}
    for pair in (cosines >= bound).triu(1).nonzero():
        one, other = int(pair[0]), int(pair[1])
        if one in groups and other in groups and groups[one] is not groups[other]:
            groups[one] += groups[other]
            for k in groups[other]:
                groups[k] = groups[one]
    return [sorted(group) for k, group in groups.items() if k == min(group)]


@part
class ClipNorms:
    """Shorten an adapter that is more than `ratio` times as long as the median of all
    to that length.

    Norm clipping, as federated servers do it, with a bound that is taken from the adapters: fewer
    than half of them cannot raise it above `ratio` times the longest of the others. Of an even
    number the longer of the two in the middle counts, so two adapters are never clipped.

    Args:
        method: any method. Where it asks anchors, these see the shortened adapters too.
        ratio: at least 1. An adapter of weight 0 or without updates does not count,
            and is left as it is.

    Source: Sun et al., "Can you really backdoor federated learning?",
    https://arxiv.org/abs/1911.07963
    """

    method: Method
    ratio: float = 2.0
    scales: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (self.ratio >= 1 and math.isfinite(self.ratio)):
            raise MethodError(
                f"ClipNorms' ratio is a multiple of the median norm, at least 1; got {self.ratio!r}"
            )

    def prepare(self, layers: LayerStream) -> ClipNorms:
        squares, weights = torch.zeros((), dtype=torch.float64), tuple[float, ...]()
        for layer in layers:
            energies = [update.norm() ** 2 for update in layer]
            squares = squares + torch.tensor(energies, dtype=torch.float64)
            weights = layer.weights
        norms = squares.sqrt().expand(len(weights))
        done = replace(self, scales=self._scales(norms, weights))
        clipped = Scaled(layers, lambda _: done.scales or ())
        return replace(done, method=prepare(self.method, clipped if done._clips() else layers))

    def __call__(self, layer: Layer) -> Update:
        if self.scales is None:
            raise unprepared(self)
        if self._clips():
            scales = zip(layer.adapters, self.scales, strict=True)
            layer.record("clipped", {label: scale for label, scale in scales if scale < 1})
        return self.method(scaled(layer, self.scales))

    def _clips(self) -> bool:
        return any(scale < 1 for scale in self.scales or ())

    def _scales(self, norms: Tensor, weights: tuple[float, ...]) -> tuple[float, ...]:
        """One factor per adapter, 1 for those that are not longer than the bound."""
        counted = {k: float(norm) for k, norm in enumerate(norms) if weights[k] != 0 and norm > 0}
        bound = self.ratio * median_high(counted.values()) if counted else math.inf
        return tuple(
            min(1.0, bound / counted[k]) if k in counted else 1.0 for k in range(len(weights))
        )


@part
class CapShare:
    """Bound one adapter's influence: in no layer does it bring more than `share` of the energy
    sum_k ||w_k D_k||^2.

    Adapters above it are scaled down to the cap; the others are not touched. Where fewer than 1 /
    share adapters have an update, the cap is an equal share. This bounds how much one adapter can
    move the result, not in which direction: it is no defence against a backdoor.

    Args:
        method: any method.
        share: in (0, 1).
    """

    method: Method
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise MethodError(
                f"CapShare's share is a fraction of the energy, in (0, 1); got {self.share!r}"
            )

    def prepare(self, layers: LayerStream) -> CapShare:
        return replace(self, method=prepare(self.method, Scaled(layers, self._scales)))

    def __call__(self, layer: Layer) -> Update:
        scales = self._scales(layer)
        layer.record(
            "capped", {label: s for label, s in zip(layer.adapters, scales, strict=True) if s < 1}
        )
        return self.method(scaled(layer, scales))

    def _scales(self, layer: Layer) -> list[float]:
        """One factor per adapter, 1 for those within their share."""
        norms = [abs(member.weight) * member.update.norm() for member in layer.members]
        limit = _cap([norm**2 for norm in norms], self.share) ** 0.5
        return [min(1.0, limit / norm) if norm > 0 else 1.0 for norm in norms]


def _cap(energies: Sequence[float], share: float) -> float:
    """The energy c for which the largest of min(e, c) is `share` of their sum;
    the largest energy if none has more.
    """
    ranked = sorted((energy for energy in energies if energy > 0), reverse=True)
    if not ranked:
        return 0.0
    share = max(share, 1 / len(ranked))
    if ranked[0] <= share * sum(ranked):
        return ranked[0]
    for count in range(1, len(ranked)):  # cut the `count` largest to one level
        if count * share < 1:
            cap = share * sum(ranked[count:]) / (1 - count * share)
            if cap >= ranked[count]:
                return cap
    return ranked[-1]
