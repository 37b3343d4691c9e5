"""`Tune`: the method, the density or the scale with the lowest loss on anchors that
it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace

from torch import Tensor

from sapmerge.core.layer import Layer, outermost
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import AnchorPass, LayerStream, Method
from sapmerge.core.stream import Mapped, anchors_of
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError

__all__ = ["Tune", "loss_curve"]


@part
class Tune:
    """Choose among methods, and among scales of their results,
    by the loss on a held-out half of the anchors.

    Every candidate is prepared on one half (every other batch, or sample of a single batch); the
    loss of base + merged adapter is measured on the other half at each scale. The winner is then
    prepared on all anchors. The report has, for every layer, "tuned" with the curve:
    candidate -> scale -> loss, and what was chosen.

    Args:
        candidates: name -> method, e.g. density -> method.
        scales: factors of the merged update.
        loss: (model, batch) -> scalar; None: the anchors' own.

    Equal losses go to the first candidate and the first scale. While a candidate is measured its
    merged update is held whole, which is the size of the model if it is dense.

    Raises:
        MethodError: no candidates, no scales, or no anchors.
    """

    candidates: Mapping[object, Method]
    scales: tuple[float, ...] = (1.0,)
    loss: Callable[..., Tensor] | None = None
    chosen: Method | None = field(default=None, repr=False)
    notes: Mapping[str, object] = field(default_factory=dict[str, object], repr=False)
    scale: float = field(default=1.0, repr=False)

    def __post_init__(self) -> None:
        if not self.candidates or not self.scales:
            raise MethodError(
                "Tune chooses among candidates and scales; at least one of each must be given"
            )
        if not all(math.isfinite(scale) for scale in self.scales):
            raise MethodError(f"scales are finite numbers; got {self.scales!r}")

    def prepare(self, layers: LayerStream) -> Tune:
        seen, held = anchors_of(layers, "Tune").halves()
        on_half = Mapped(layers, lambda layer: layer, seen)
        curve = {
            name: loss_curve(prepare(method, on_half), on_half, held, self.scales, self.loss)
            for name, method in self.candidates.items()
        }
        name, scale = min(
            ((n, s) for n in curve for s in self.scales),
            key=lambda choice: curve[choice[0]][choice[1]],
        )
        notes = {
            "chosen": str(name),
            "scale": scale,
            "loss": {str(name): losses for name, losses in curve.items()},
        }
        return replace(
            self, chosen=prepare(self.candidates[name], layers), scale=scale, notes=notes
        )

    def __call__(self, layer: Layer) -> Update:
        if self.chosen is None:
            raise unprepared(self)
        layer.record("tuned", self.notes)
        update = self.chosen(layer)
        return update if self.scale == 1.0 else update.scaled(self.scale)


def loss_curve(
    prepared: Method,
    layers: LayerStream,
    anchors: AnchorPass,
    scales: Sequence[float],
    loss: Callable[..., Tensor] | None,
) -> dict[float, float]:
    """Scale -> the loss at base + scale times the merged update, which is held whole."""
    merged = {layer.name: outermost(layer, prepared(layer)) for layer in layers}
    return {
        scale: anchors.loss_of(
            {name: update.scaled(scale) for name, update in merged.items()}, loss
        )
        for scale in scales
    }
