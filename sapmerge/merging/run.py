"""A merge that is ready to run: its data, and the merged layers one after the other.
What a sink is made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import rounded_share, truncate
from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.core.torch_state import pinned
from sapmerge.core.updates import LowRank, Update, as_update
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.io.adapter import Adapter
from sapmerge.io.modules import Module
from sapmerge.losses import loss_name
from sapmerge.merging.heads import Heads
from sapmerge.merging.inputs import Base
from sapmerge.merging.pieces import in_pieces, summed
from sapmerge.merging.report import LayerReport, describe
from sapmerge.merging.spelling import Own
from sapmerge.merging.stream import AdapterLayers, in_order, with_progress
from sapmerge.merging.vectors import Vectors

__all__ = ["Run"]


@dataclass(frozen=True, eq=False)
class Run:
    """What a merge is made from, after every check and every pre-pass.

    Args:
        adapters: in the user's order.
        weights: one per adapter.
        base: the base model that the output is for.
        heads: what happens to modules saved whole.
        vectors: what happens to biases and rows of embeddings.
        method: as it was given, for the recipe.
        scale: multiplies the merged update.
        rank: of the output, see `merge`.
        stream: the layers, adapters sorted by content.
        prepared: the method, after its pre-pass.
        own_names: what the model calls its modules; None without one.
        progress: whether to show a bar.
        shapes: of the weights of the base, by its own names, where it is at hand.
        said: what was warned of before, see `meaning`.
        wanted: the dtype of the output; None: that of the inputs.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    base: Base
    heads: Heads
    vectors: Vectors
    method: Method
    scale: float
    rank: int | float | str | None
    stream: AdapterLayers
    prepared: Method
    own_names: Own | None
    progress: bool = False
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, "tuple[int, int]"])
    said: frozenset[str] = frozenset()
    wanted: torch.dtype | None = None
    kept: dict[str, LowRank] = field(default_factory=dict[str, LowRank])
    """With anchors: the update of every layer as a sink has stored it,
    for the loss of the merged model.
    """

    def updates(self) -> Iterator[tuple[str, Update]]:
        """(module, merged update) for every layer, exact:
        scale applied, nothing truncated or rounded.
        """
        for name in with_progress(self.stream.modules, len(self.stream.modules), self.progress):
            yield name, self.merged(name)[1]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The whole call, as it is written into the output's metadata."""
        return {
            "method": recipe(self.method),
            "weights": {
                a.label: weight for a, weight in zip(self.adapters, self.weights, strict=True)
            },
            "scale": self.scale,
            "rank": self.rank,
            "base_model": self.base.name,
            "modules_to_save": self.heads.policy,
            "loss": None if self.stream.anchors is None else loss_name(self.stream.anchors.loss),
        }

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the output: the one that is wanted, that of the inputs, or the narrowest
        that holds all of them.
        """
        if self.wanted is not None:
            return self.wanted
        dtypes = [module.dtype for adapter in self.adapters for module in adapter.modules.values()]
        out = dtypes[0]
        for dtype in dtypes[1:]:
            out = torch.promote_types(out, dtype)
        return out

    def stored(self, lossless: bool = False) -> Iterator[tuple[Module, Update, LayerReport]]:
        """For every layer its module, the update as a sink stores it, and its report.

        Args:
            lossless: give the update as it is; otherwise factors of the rank that was asked for.
        """
        default = max(
            (module.rank for adapter in self.adapters for module in adapter.modules.values()),
            default=1,
        )

        @pinned
        def finished(name: str) -> tuple[str, Update, LayerReport]:
            merger = None
            if isinstance(self.rank, int) and not lossless:
                merger = in_pieces(self.stream, self.prepared, name)
            if merger is None:
                layer, update, notes = self.merged(name)
                row = describe(layer, update, notes, self.stream.pairs)
                del layer  # many clients' factors, which the decomposition has no use for
            else:
                update, row = summed(self.stream, merger, name, self.scale)
                self._check_finite(name, update)
            kept, energy = update, 1.0
            if not lossless:
                kept, energy = truncate(update, self.rank, default)
                kept = kept if merger is None else kept.to(dtype=torch.float32)
                energy *= rounded_share(kept, self.dtype)
            return name, kept, replace(row, rank=kept.rank, energy_kept=energy)

        layers = in_order(finished, self.stream.modules, self.stream.layers_at_once())
        for name, kept, row in with_progress(layers, len(self.stream.modules), self.progress):
            if self.stream.anchors is not None and isinstance(kept, LowRank):
                self.kept[name] = LowRank(kept.B, kept.A)  # without what it has computed
            yield self.stream.modules[name], kept, row

    @pinned
    def merged(self, name: str) -> tuple[Layer, Update, dict[str, Any]]:
        """A layer, its merged update, and what the parts of the method recorded."""
        notes: dict[str, Any] = {}
        layer = self.stream.layer(name, notes.__setitem__)
        update = as_update(self.prepared(layer), self.method, name)
        if self.scale != 1.0:
            update = update.scaled(self.scale)
        if update.shape != layer.shape:
            raise MethodError(
                f"{self.method!r} made an update {update.shape} for layer {name!r} {layer.shape}"
            )
        self._check_finite(name, update)
        return layer, update, notes

    def _check_finite(self, name: str, update: Update) -> None:
        if not math.isfinite(update.norm()):
            raise NonFiniteError(
                f"the merged update of layer {name!r} is NaN or infinite: {self.method!r}"
            )
