"""Streams of layers: what a pre-pass iterates over, as often as it needs.

Anchors belong to the stream, not to a layer: they speak of the adapters whose updates the stream
gives. Whoever changes updates on the way hands on a stream without anchors, or,
where the change is a factor, one whose anchors see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch

from sapmerge.core.layer import Layer
from sapmerge.core.protocols import AnchorPass, LayerStream
from sapmerge.core.updates import LowRank
from sapmerge.errors import MethodError

__all__ = ["Mapped", "Scaled", "Stream", "anchors_of", "filled_with_zeros", "scaled", "stream_of"]


@dataclass(frozen=True)
class Stream:
    """Layers at hand, and the anchors that see their adapters, if any."""

    layers: Sequence[Layer]
    anchors: AnchorPass | None = None

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)


@dataclass(frozen=True)
class Mapped:
    """Layers seen through a function; can be iterated again and again.

    Args:
        layers: the stream.
        function: Layer -> Layer; None leaves the layer out.
        anchors: those of `layers`, if the function leaves the updates as they are: if it changes
            weights or coordinates, or leaves layers out. By default none,
            because they would speak of other updates.
    """

    layers: LayerStream
    function: Callable[[Layer], Layer | None]
    anchors: AnchorPass | None = None

    def __iter__(self) -> Iterator[Layer]:
        for layer in self.layers:
            mapped = self.function(layer)
            if mapped is not None:
                yield mapped


@dataclass(frozen=True)
class Scaled:
    """Layers whose updates are multiplied by factors, and anchors that see the multiplied updates.

    Args:
        layers: the stream.
        factors: layer -> one factor per adapter.
    """

    layers: LayerStream
    factors: Callable[[Layer], Sequence[float]]

    @cached_property
    def anchors(self) -> AnchorPass | None:
        """The anchors at base + the multiplied adapters; only they need a pass for all factors."""
        anchors = self.layers.anchors
        if anchors is None:
            return None
        return anchors.scaled({layer.name: self.factors(layer) for layer in self.layers})

    def __iter__(self) -> Iterator[Layer]:
        for layer in self.layers:
            yield scaled(layer, self.factors(layer))


def scaled(layer: Layer, factors: Sequence[float]) -> Layer:
    """The layer with its updates multiplied by one factor per adapter."""
    if all(factor == 1 for factor in factors):
        return layer
    return layer.with_updates(
        [u if f == 1 else u.scaled(f) for u, f in zip(layer, factors, strict=True)]
    )


def filled_with_zeros(layer: Layer) -> Layer:
    """Updates of zero, of rank 1, for the adapters that lack the layer:
    gradients are taken there too.
    """
    like = layer.updates[0]
    nothing = torch.zeros(1, dtype=like.dtype, device=like.device)
    zero = LowRank(nothing.expand(layer.shape[0], 1), nothing.expand(1, layer.shape[1]))
    return layer.with_updates([zero if update.absent else update for update in layer])


def stream_of(layers: LayerStream | Iterable[Layer]) -> LayerStream:
    """A stream as it is; layers without anchors as a stream."""
    return cast("LayerStream", layers) if hasattr(layers, "anchors") else Stream(tuple(layers))


def anchors_of(layers: LayerStream, owner: str, advice: str = "") -> AnchorPass:
    """The anchors of a stream.

    Raises:
        MethodError: there are none; `owner` begins the message, `advice` ends it.
    """
    if layers.anchors is None:
        raise MethodError(
            f"{owner} needs anchors and a model: merge(adapters, anchor_loader, model, ...); in a "
            "Chain only the first "
            f"step sees them, because the updates are others after it{advice}"
        )
    return layers.anchors
