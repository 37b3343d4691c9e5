"""How long the merged update should be: what its energy says, and what the anchors say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import cast

from torch import Tensor

from sapmerge.anchors.losses import comparing
from sapmerge.anchors.tuning import loss_curve
from sapmerge.compose import MatchEnergy, anchors_of
from sapmerge.errors import MethodError
from sapmerge.layer import Layer, LayerStream, Method, Update
from sapmerge.recipe import part

__all__ = ["ScaleByAnchors"]

_SCALES = tuple(2 ** (step / 2) for step in range(-3, 3))
"""The multiples that are tried, from 0.35 to 2: one step is a factor of sqrt(2)."""


@part
class ScaleByAnchors:
    """Scale the merged adapter to a length between the one that energy gives and the one that the anchors give.

    The direction of a merge says little about how far to go along it. `MatchEnergy` goes as far as the adapters did;
    that is too far where they went too far themselves, and not far enough where they stopped early. With s the length
    in units of `MatchEnergy`'s, the anchors choose

        s* = argmin L(base + s D) - price log s:

    on from s*, every per cent of length costs more than `price` per cent of loss. The update is scaled by s*^trust.

    Args:
        method: any method.
        loss: (model, batch) -> scalar. None: `centered_alignment` for image-text pairs, which no collapse and no common
            shift can lower, and the anchors' own loss for others.
        price: of one e-fold of length, in units of the loss.
        trust: 0 is `MatchEnergy`, 1 the anchors alone; 0.5 is the geometric mean of the two lengths.

    The report has, for every layer, "length" (s*^trust) and the losses that it was chosen by. Six forward passes over
    the anchors; while they run the merged update is held whole, which is the size of the model if it is dense.

    Raises:
        MethodError: there are no anchors.
    """

    method: Method
    loss: Callable[..., Tensor] | None = None
    price: float = 0.03
    trust: float = 0.5
    energy_factor: float = field(default=1.0, repr=False)
    length: float | None = field(default=None, repr=False)
    losses: Mapping[float, float] = field(default_factory=dict[float, float], repr=False)

    def __post_init__(self) -> None:
        if not (self.price >= 0 and 0 <= self.trust <= 1):
            raise MethodError(f"a price is not negative and a trust in [0, 1]; got {self.price!r} and {self.trust!r}")

    def prepare(self, layers: LayerStream) -> ScaleByAnchors:
        anchors = anchors_of(next(iter(layers), None), "ScaleByAnchors")
        matched = MatchEnergy(self.method).prepare(layers)
        curve = loss_curve(matched, layers, anchors, _SCALES, self.loss or comparing(anchors))
        length = _lowest(curve, self.price) ** self.trust
        return replace(self, method=matched.method, energy_factor=matched.factor, length=length, losses=curve)

    def __call__(self, layer: Layer) -> Update:
        if self.length is None:
            return self.prepare(cast("LayerStream", [layer]))(layer)
        layer.record("energy_factor", self.energy_factor)
        layer.record("length", self.length)
        layer.record("losses_by_length", self.losses)
        return self.method(layer).scaled(self.energy_factor * self.length)


def _lowest(curve: Mapping[float, float], price: float) -> float:
    """The s with the least L(s) - price log s: the lowest point of the parabola in log s through the best three."""
    values = [loss - price * math.log(s) for s, loss in curve.items()]
    best = min(range(len(values)), key=values.__getitem__)
    if 0 < best < len(values) - 1:
        left, here, right = values[best - 1 : best + 2]
        bend = left - 2 * here + right
        if bend > 0:
            return _SCALES[best] * 2 ** ((left - right) / (4 * bend))
    return _SCALES[best]
