"""Weights of whole adapters: by the anchors' loss at base + adapter,
and by their agreement with each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import field, replace

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import whole_gram
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import Mapped, anchors_of
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError, SapmergeWarning
from sapmerge.losses import comparing
from sapmerge.parts.mergers.linear import reweighed, shared_out

__all__ = ["WeighByAgreement", "WeighByAnchors"]


@part
class WeighByAnchors:
    """Weigh every adapter by the anchor loss at base + adapter:
    saliency on the level of whole adapters.

    The weights are the given ones times softmax(-excess / temperature), those of one sign scaled to
    keep their sum; the excess is that over the lowest loss plus `margin`, at least 0. Among good
    adapters they are nearly equal; an adapter that was trained on wrong labels loses its weight.
    One of weight 0 has none.

    Args:
        method: any method.
        loss: (model, batch) -> scalar. None: `centered_alignment` for image-text pairs, because a
            loss that does not compare pairs cannot tell good from bad, and the anchors' own loss
            for others.
        temperature: of the softmax, in units of the loss.
        margin: losses this close to the lowest one count as equal to it, in units of the loss.

    Raises:
        MethodError: there are no anchors.
    """

    method: Method
    loss: Callable[..., Tensor] | None = None
    temperature: float = 0.2
    margin: float = 0.0
    shares: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MethodError(f"the temperature must be positive; got {self.temperature!r}")
        if not self.margin >= 0:
            raise MethodError(
                f"the margin is a difference of losses, at least 0; got {self.margin!r}"
            )

    def prepare(self, layers: LayerStream) -> WeighByAnchors:
        anchors = anchors_of(layers, "WeighByAnchors")
        losses = torch.tensor(anchors.losses(self.loss or comparing(anchors)), dtype=torch.float64)
        weights = next((layer.weights for layer in layers), (1.0,) * len(losses))
        counted, shares = torch.tensor(weights) != 0, torch.zeros_like(losses)
        if counted.any():
            excess = (losses[counted] - losses[counted].min() - self.margin).clamp_min(0)
            shares[counted] = torch.softmax(-excess / self.temperature, 0)
        weighed = replace(self, shares=tuple(map(float, shares)))
        return replace(
            weighed, method=prepare(self.method, Mapped(layers, weighed._weighed, anchors))
        )

    def __call__(self, layer: Layer) -> Update:
        if self.shares is None:
            raise unprepared(self)
        layer.record("anchor_weights", dict(zip(layer.adapters, self.shares, strict=True)))
        return self.method(self._weighed(layer))

    def _weighed(self, layer: Layer) -> Layer:
        return reweighed(layer, shared_out(layer.weights, self.shares or ()))


_FEW = 0.1
"""Of an equal share: who has less than this is named in a warning."""


@part
class WeighByAgreement:
    """Weigh every adapter by how much it agrees with the others:
    by the mean cosine of its update with theirs.

        weight_k ~ sum_{j != k} max(0, cos(D_k, D_j) + prior)

    Adapters of one base are nearly orthogonal; what they have learned in common makes their cosines
    positive. One that was trained on wrong labels shares little with the others, and one with a
    flipped sign is opposed to them. Copies of one adapter are asked once, and share its say.
    Two adapters weigh the same, whatever they are.

    The given weights are multiplied; those of one sign keep their sum. Agreement is that of the
    updates without weights (who merges with a negative weight means it), over all layers together,
    inside `In` in its coordinates. Adapters of weight 0 or without updates are not asked.

    Args:
        method: any method.
        prior: added to every cosine, in [0, 1): adapters that have nothing to do with each other
            weigh the same.
        copies: from this cosine on, two adapters are copies of each other; in (0, 1).

    Warns:
        SapmergeWarning: names adapters with less than a tenth of an equal share.

    Source: the agreement of predictors tells their quality without any label: Parisi et al.,
    "Ranking and combining multiple predictors without labeled data",
    https://arxiv.org/abs/1303.3257; here one step of the power iteration for their leading
    eigenvector, so that of two camps the larger one does not silence the other.
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
        return replace(
            done, method=prepare(self.method, Mapped(layers, done._weighed, layers.anchors))
        )

    def __call__(self, layer: Layer) -> Update:
        if self.shares is None:
            raise unprepared(self)
        total = sum(self.shares) or 1.0
        layer.record(
            "agreement",
            {label: s / total for label, s in zip(layer.adapters, self.shares, strict=True)},
        )
        return self.method(self._weighed(layer))

    def _weighed(self, layer: Layer) -> Layer:
        return reweighed(layer, shared_out(layer.weights, self.shares or ()))

    def _shares(self, products: Tensor, layer: Layer) -> tuple[float, ...]:
        """One factor per adapter, of mean 1 over those that are asked;
        1 for all of them if none agrees with any.
        """
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
        shares = [
            float(share) for share in agreement * asked.sum() / agreement.sum().clamp_min(1e-300)
        ]
        few = [
            repr(layer.adapters[k]) for k, share in enumerate(shares) if asked[k] and share < _FEW
        ]
        if few:
            message = (
                f"{', '.join(few)}: agree with hardly any other adapter, and have next to no weight"
            )
            warnings.warn(f"{message} (WeighByAgreement)", SapmergeWarning, stacklevel=3)
        return tuple(shares)
