"""`FisherMean`: every entry from the adapters whose loss depends on it most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import norm
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, Observation
from sapmerge.core.stream import Mapped, anchors_of, filled_with_zeros
from sapmerge.core.updates import Dense, Update
from sapmerge.errors import MethodError
from sapmerge.parts.units import Entries

__all__ = ["FisherMean"]

_STATISTICS = {"sample": "square", "batch": "batch square"}


@part
class FisherMean:
    """sum_k w_k F_k D_k / sum_k |w_k| F_k in every entry,
    F_k = E[g^2] at base + adapter k on the anchors.

    The same as merging the weights W0 + D_k, since W0 is common. An adapter without the layer
    counts with an update of zero, and with the F of the model that it makes.
    The pre-pass keeps the merged matrix of every layer.

    Args:
        floor: added to F, as a share of its mean over the layer and the adapters; where no F is
            known, the mean.
        square: "sample" squares the gradient of every anchor; "batch" that of every batch, summed
            (MergeLM).
        normalize: divide F_k by its norm over the whole adapter,
            so that no adapter outweighs another (MergeLM).

    Raises:
        MethodError: there are no anchors.
    """

    floor: float = 1e-6
    square: Literal["sample", "batch"] = "sample"
    normalize: bool = False
    merged: Mapping[str, Update] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.floor >= 0:
            raise MethodError(
                f"FisherMean's floor is a share of the mean of F, at least 0; got {self.floor!r}"
            )

    def prepare(self, layers: LayerStream) -> FisherMean:
        anchors = anchors_of(layers, "FisherMean")
        filled = Mapped(layers, filled_with_zeros, anchors)
        seen = anchors.observe(filled, Entries())
        sizes = self._sizes(filled, seen)
        return replace(
            self, merged={layer.name: self._merge(layer, seen, sizes) for layer in filled}
        )

    def __call__(self, layer: Layer) -> Update:
        if self.merged is None:
            raise unprepared(self)
        return self.merged[layer.name]

    def _sizes(self, layers: LayerStream, seen: Observation) -> list[float]:
        """The norm of every adapter's F over all layers; 1 where it is not wanted."""
        squares: dict[int, float] = {}
        for layer in layers:
            for k, F in self._fishers(layer, seen):
                squares[k] = squares.get(k, 0.0) + (norm(F) ** 2 if self.normalize else 1.0)
        return [
            squares.get(k, 0.0) ** 0.5 if self.normalize else 1.0
            for k in range(max(squares, default=-1) + 1)
        ]

    def _fishers(self, layer: Layer, seen: Observation) -> Iterator[tuple[int, Tensor]]:
        """(adapter, F) in float64, of the adapters that have a weight."""
        for k, weight in enumerate(layer.weights):
            if weight != 0:
                halves = seen.moment(layer.name, k, "entries", _STATISTICS[self.square], "adapter")
                yield k, (halves[0].double() + halves[1].double()) / 2

    def _merge(self, layer: Layer, seen: Observation, sizes: list[float]) -> Update:
        fishers = {k: F / sizes[k] if sizes[k] > 0 else F for k, F in self._fishers(layer, seen)}
        like = layer.updates[0]
        if not fishers or not any(bool(layer.updates[k].norm()) for k in fishers):
            return Dense(torch.zeros(layer.shape, dtype=like.dtype, device=like.device))
        mean = sum(float(F.mean()) for F in fishers.values()) / len(fishers)
        total = torch.zeros(layer.shape, dtype=torch.float64, device=like.device)
        mass, plain, count = torch.zeros_like(total), torch.zeros_like(total), 0.0
        for k, F in fishers.items():
            update, weight, share = (
                layer.updates[k].dense().double(),
                layer.weights[k],
                F + self.floor * mean,
            )
            total += weight * share * update
            mass += abs(weight) * share
            plain += weight * update
            count += abs(weight)
        merged = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), plain / count)
        return Dense(merged.to(like.dtype))
