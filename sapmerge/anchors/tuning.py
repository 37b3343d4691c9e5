"""`Tune`: the method, the density or the scale with the lowest loss on anchors that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field, replace

from torch import Tensor

from sapmerge.compose import Mapped, prepare
from sapmerge.errors import MethodError
from sapmerge.layer import AnchorPass, Layer, LayerStream, Method, Update
from sapmerge.recipe import part

__all__ = ["Tune", "outermost"]


@part
class Tune:
    """Choose among methods, and among scales of their results, by the loss on a held-out half of the anchors.

    Every candidate is prepared on one half (every other batch, or sample of a single batch); the loss of base + merged
    adapter is measured on the other half at each scale. The winner is then prepared on all anchors. The report has, for
    every layer, "tuned" with the curve: candidate -> scale -> loss, and what was chosen.

    Args:
        candidates: name -> method, e.g. density -> method.
        scales: factors of the merged update.
        loss: (model, batch) -> scalar; None: the anchors' own.

    Equal losses go to the first candidate and the first scale. While a candidate is measured its merged update is held
    whole, which is the size of the model if it is dense.

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
            raise MethodError("Tune chooses among candidates and scales; at least one of each must be given")
        if not all(math.isfinite(scale) for scale in self.scales):
            raise MethodError(f"scales are finite numbers; got {self.scales!r}")

    def prepare(self, layers: LayerStream) -> Tune:
        first = next(iter(layers), None)
        if first is None:
            return self
        if first.anchors is None:
            raise MethodError("Tune needs anchors and a model: merge(adapters, anchor_loader, model, ...)")
        seen, held = first.anchors.halves()
        on_half = Mapped(layers, lambda layer: replace(layer, anchors=seen))
        curve = {name: self._losses(method, on_half, held) for name, method in self.candidates.items()}
        name, scale = min(((n, s) for n in curve for s in self.scales), key=lambda choice: curve[choice[0]][choice[1]])
        notes = {"chosen": str(name), "scale": scale, "loss": {str(name): losses for name, losses in curve.items()}}
        return replace(self, chosen=prepare(self.candidates[name], layers), scale=scale, notes=notes)

    def __call__(self, layer: Layer) -> Update:
        if self.chosen is None:
            return self.prepare([layer])(layer)
        layer.record("tuned", self.notes)
        update = self.chosen(layer)
        return update if self.scale == 1.0 else update.scaled(self.scale)

    def _losses(self, method: Method, layers: LayerStream, held: AnchorPass) -> dict[float, float]:
        prepared = prepare(method, layers)
        merged = {layer.name: outermost(layer, prepared(layer)) for layer in layers}
        return {
            scale: held.loss_of({name: update.scaled(scale) for name, update in merged.items()}, self.loss)
            for scale in self.scales
        }


def outermost(layer: Layer, update: Update) -> Update:
    """The update of the weight itself, from its coordinates in the frames of a layer."""
    for frames in reversed(layer.frames):
        update = frames.outside(update)
    return update
