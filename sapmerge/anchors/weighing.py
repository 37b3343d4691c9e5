"""Saliency on the level of whole adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, replace
from typing import cast

import torch
from torch import Tensor

from sapmerge.anchors.losses import comparing
from sapmerge.compose import Mapped, anchors_of, prepare
from sapmerge.errors import MethodError
from sapmerge.layer import Layer, LayerStream, Method, Update
from sapmerge.mergers import shared_out
from sapmerge.recipe import part

__all__ = ["WeighByAnchors"]


@part
class WeighByAnchors:
    """Weigh every adapter by the anchor loss at base + adapter: saliency on the level of whole adapters.

    The weights are the given ones times softmax(-excess / temperature), those of one sign scaled to keep their sum; the
    excess is that over the lowest loss plus `margin`, at least 0. Among good adapters they are nearly equal; an adapter
    that was trained on wrong labels loses its voice. One of weight 0 has none.

    Args:
        method: any method.
        loss: (model, batch) -> scalar. None: `centered_alignment` for image-text pairs, because a loss that does not
            compare pairs cannot tell good from bad, and the anchors' own loss for others.
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
            raise MethodError(f"the margin is a difference of losses, at least 0; got {self.margin!r}")

    def prepare(self, layers: LayerStream) -> WeighByAnchors:
        first = next(iter(layers), None)
        anchors = anchors_of(first, "WeighByAnchors")
        losses = torch.tensor(anchors.losses(self.loss or comparing(anchors)), dtype=torch.float64)
        heard, shares = torch.tensor(cast("Layer", first).weights) != 0, torch.zeros_like(losses)
        if heard.any():
            excess = (losses[heard] - losses[heard].min() - self.margin).clamp_min(0)
            shares[heard] = torch.softmax(-excess / self.temperature, 0)
        weighed = replace(self, shares=tuple(map(float, shares)))
        return replace(weighed, method=prepare(self.method, Mapped(layers, weighed._weighed)))

    def __call__(self, layer: Layer) -> Update:
        if self.shares is None:
            return self.prepare(cast("LayerStream", [layer]))(layer)
        layer.record("anchor_weights", dict(zip(layer.adapters, self.shares, strict=True)))
        return self.method(self._weighed(layer))

    def _weighed(self, layer: Layer) -> Layer:
        return replace(layer, weights=shared_out(layer.weights, self.shares or ()))
