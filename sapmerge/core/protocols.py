"""What the primitives are, as protocols: what each kind takes and returns,
and what it may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from sapmerge.core.frames import Frames
from sapmerge.core.layer import Layer
from sapmerge.core.updates import Update

__all__ = [
    "AnchorPass",
    "Basis",
    "Coordinates",
    "GradientView",
    "LayerStream",
    "MaskBuilder",
    "Merger",
    "Method",
    "Observation",
    "Rescaler",
    "Scorer",
    "Stats",
    "Transform",
    "Units",
]


class LayerStream(Protocol):
    """The layers of a merge, in a fixed order; can be iterated as often as a pre-pass needs."""

    @property
    def anchors(self) -> AnchorPass | None:
        """Gradients and losses at the adapters whose updates the stream gives;
        None without anchors.
        """
        ...

    def __iter__(self) -> Iterator[Layer]: ...


class Gradients(Protocol):
    """Gradients on the anchors."""

    def observe(self, layers: LayerStream, units: Units) -> Observation:
        """Gradients in the coordinates of `units`; nothing runs before the first
        one is asked for.
        """
        ...

    def in_turn(
        self, layers: LayerStream, units: Units
    ) -> Iterator[tuple[Sequence[int], Observation]]:
        """Some of the adapters, and what `observe` says of them, until all have had their turn.

        For a part that looks at one adapter at a time: it holds less, and every adapter runs once.
        """
        ...


class Losses(Protocol):
    """Losses on the anchors."""

    @property
    def pairs(self) -> bool:
        """Whether the anchors are image-text pairs in batches of several,
        which a loss can compare with each other.
        """
        ...

    def losses(self, loss: Callable[..., Tensor] | None = None) -> Sequence[float]:
        """The mean loss on the anchors at base + adapter,
        for every adapter in the order of the layers.
        """
        ...

    def loss_of(
        self, updates: Mapping[str, Update], loss: Callable[..., Tensor] | None = None
    ) -> float:
        """The mean loss on the anchors at base + updates (layer -> update of the weight itself)."""
        ...

    def slopes(
        self,
        updates: Mapping[str, Update],
        directions: Mapping[str, Sequence[Update]],
        loss: Callable[..., Tensor] | None = None,
    ) -> tuple[float, Mapping[str, Tensor]]:
        """The mean loss at base + updates, and its derivatives <G, D> along directions:
        layer -> (K,), float64.
        """
        ...


class InputGrams(Protocol):
    """Gram matrices of the layers' inputs on the anchors."""

    def grams(self, layers: LayerStream, fold: Callable[[Layer, int, Tensor], None]) -> None:
        """E[x x^T] of the inputs of every layer at base + adapter, a mean over tokens,
        handed to `fold`.

        Args:
            layers: in the coordinates of their frames: V^T E[x x^T] V.
            fold: called with (layer, adapter, Gram matrix): for a layer with each adapter in turn,
                the first to the last. The matrix is float64, (n, n),
                or (n,) for its diagonal where it is diagonal (embeddings).
        """
        ...


class AnchorPass(Gradients, Losses, InputGrams, Protocol):
    """What the pre-pass of a part may ask of the anchors."""

    def scaled(self, factors: Mapping[str, Sequence[float]]) -> AnchorPass:
        """The same at base + multiplied adapters: layer -> one factor per adapter;
        other layers stay as they are.
        """
        ...

    def halves(self) -> tuple[AnchorPass, AnchorPass]:
        """Two halves of the anchors: one to decide on, one to check the decision."""
        ...


class Observation(Protocol):
    """Statistics of the gradient g over the anchors, in the coordinates of a unit."""

    def moment(
        self, layer: str, adapter: int, part: str, statistic: str, at: str
    ) -> tuple[Tensor, Tensor]:
        """The statistic over every other sample, and over the rest;
        their mean is that over all anchors.

        Args:
            layer: the layer's name.
            adapter: its index in the layer.
            part: of the unit.
            statistic: "mean" E[g], or per sample "absolute" E|g| and "square" E[g^2]; "batch
                square" is the mean over samples of the squares of the sums over batches.
            at: "adapter" for gradients at base + adapter, "base" for those at the base.
        """
        ...

    def activations(self, layer: str, adapter: int, part: str) -> tuple[Tensor, Tensor]:
        """E|x_j|^2 of the inputs that each coordinate multiplies, at base + adapter, over every
        other sample and over the rest: |x_j|^2 is summed over the tokens of a sample.
        Broadcasts to the values."""
        ...


class Stats(Protocol):
    """What a scorer may know about the tensor that it scores. Asking for what is absent is an error
    that says how to get it. All gradients have the shape of the values."""

    @property
    def adapter(self) -> str:
        """The adapter's label."""
        ...

    @property
    def layer(self) -> str:
        """The layer's name."""
        ...

    @property
    def part(self) -> str:
        """The part of the unit: "A" or "B" for Factors, else "entries", "directions", "layer"."""
        ...

    @property
    def gradient(self) -> Tensor:
        """E[g]: the gradient of the mean anchor loss, at base + adapter."""
        ...

    def moment(self, statistic: str, at: str = "adapter") -> Tensor:
        """ "mean" E[g], "absolute" E|g| or "square" E[g^2] over samples,
        at base + "adapter" or at the "base".
        """
        ...

    @property
    def activations(self) -> Tensor:
        """sqrt(E|x_j|^2), x_j the input that a coordinate multiplies; broadcasts to the values. For
        Entries and for A these are the inputs x of the layer, for B they are A x,
        for Directions v^T x."""
        ...

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers that depend on the seed, the adapter's content, the layer and the part,
        and nothing else.
        """
        ...


class GradientView(Protocol):
    """The gradient G = dL/dD of one layer, seen through products.
    The leading dimension counts samples.
    """

    def left(self, B: Tensor) -> Tensor:
        """B^T G: (samples, r, n)."""
        ...

    def right(self, A: Tensor) -> Tensor:
        """G A^T: (samples, m, r)."""
        ...

    def diagonal(self, U: Tensor, Vh: Tensor) -> Tensor:
        """u_i^T G v_i: (samples, k)."""
        ...

    def dense(self) -> Tensor:
        """G: (samples, m, n)."""
        ...


@dataclass(frozen=True)
class Coordinates:
    """An update, written in the coordinates of a unit.

    Args:
        values: part -> coordinates v.
        join: part -> new coordinates, to the update they describe.
        pull: G -> part -> gradients g in these coordinates, with a leading dimension of samples.
    """

    values: Mapping[str, Tensor]
    join: Callable[[Mapping[str, Tensor]], Update]
    pull: Callable[[GradientView], Mapping[str, Tensor]]


class Units(Protocol):
    """A unit: update -> its coordinates."""

    def __call__(self, update: Update) -> Coordinates: ...


Scorer: TypeAlias = Callable[[Tensor, Stats], Tensor]
"""(values, stats) -> scores of the same shape."""
MaskBuilder: TypeAlias = Callable[[Tensor], Tensor]
"""(scores) -> what to keep: bool, or a float multiplier."""
Rescaler: TypeAlias = Callable[[Update, Update], Update]
"""(pruned, original) -> rescaled."""
Transform: TypeAlias = Callable[[Layer], Layer]
Merger: TypeAlias = Callable[[Layer], Update]
Method: TypeAlias = Callable[[Layer], Update]
"""A method is a merger, whatever it is made of."""
Basis: TypeAlias = Callable[[Layer], Frames]
"""Layer -> the frames of its coordinates; a plain function is a basis too."""
