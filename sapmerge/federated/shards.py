"""Scoring on several machines: what belongs to one adapter runs anywhere,
and the cache is where it meets.

score(..., shard=(0, 4)) ... score(..., shard=(3, 4))      each runs its own adapters, in any order,
on any machine
score(...)                                                 what needs all of them: losses of merged
models
merge(..., cache=DIR, cache_only=True)                     runs no model
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapmerge.anchors.shard import Shard, ShardDone
from sapmerge.core.layer import Layer
from sapmerge.core.part import prepare
from sapmerge.core.protocols import LayerStream, Method, Units
from sapmerge.core.stream import Stream
from sapmerge.core.torch_state import pinned
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import MethodError, NonFiniteError, SapmergeWarning
from sapmerge.io.machine import at_terminal
from sapmerge.losses import Loss
from sapmerge.merging.inputs import (
    Adapters,
    check_device,
    check_mergeable,
    load_adapters,
    resolve_weights,
)
from sapmerge.merging.stream import AdapterLayers
from sapmerge.methods.anchored import sap

__all__ = ["Stage", "plan", "score"]


@pinned
def score(
    adapters: Adapters,
    anchors: Any,
    model: Any,
    method: Method | None = None,
    *,
    cache: str | os.PathLike[str],
    shard: tuple[int, int] = (0, 1),
    loss: Loss | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> bool:
    """Fill the cache of a merge with the passes of some of its adapters.

    Every shard is given *all* adapters: norms and inner products, which need no model, decide what
    is scored (clipping multiplies an adapter). Adapters are dealt out in the order of their
    contents. A pass that is in the cache already is not run again,
    so a shard that died is simply started once more.

    Args:
        adapters, anchors, model, loss, weights, device: those of the merge.
        method: that of the merge; `sap()` by default.
        cache: a folder that all shards write to, or whose files are brought together afterwards.
        shard: (i, n): this one's number from 0 on, and how many there are.
            (0, 1) runs whatever is missing.
        progress: False: no bars. None: one for each pass if stderr is a terminal.

    Returns:
        Whether everything that the merge needs is in the cache now.

    Raises:
        MethodError: no such shard.
        SapmergeError: whatever the merge would refuse.
    """
    number, count = shard
    if not 0 <= number < count:
        raise MethodError(f"shard is (i, n) with 0 <= i < n; got {shard!r}")
    opened = load_adapters(adapters, model)
    numbers = resolve_weights(weights, opened)
    check_mergeable(opened)
    stream = AdapterLayers.of(opened, numbers, check_device(device)).with_anchors(
        anchors, model, loss, cache
    )
    seen: Any = stream.anchors
    seen.shard = mine = Shard(number, count)
    seen.passes.shown = at_terminal() if progress is None else progress
    with warnings.catch_warnings():
        if count > 1:
            # of placeholders: the merge says what is so
            warnings.simplefilter("ignore", SapmergeWarning)
        with suppress(ShardDone):
            prepared = prepare(sap() if method is None else method, stream)
            for layer in stream:  # what a method asks only when it merges
                prepared(layer)
        for k in (None, *range(len(opened))):
            if k is None or mine.count == 1 or k % count == number:
                try:
                    seen.loss_at(k)
                except NonFiniteError:  # a method may have shortened it
                    continue
    return not mine.skipped


@dataclass(frozen=True)
class Stage:
    """What a method asks of the anchors, in the order in which it asks.

    Args:
        what: "losses of single adapters", "gradients of single adapters", "inputs at single
            adapters", "losses of merged models", or "gradients of merged models".
        shards: whether every adapter's part is a task of its own, keyed by its content.
        cached: whether the cache keeps it.
    """

    what: str
    shards: bool
    cached: bool = True


def plan(method: Method | None = None) -> list[Stage]:
    """The stages of a method: found by preparing it on two small made-up adapters,
    with anchors that only take notes.

    Stages that shard run anywhere (`score`), all that follow the first that does not run on one
    machine. A method without stages reads no anchors.

    Example:
        >>> import sapmerge as sm
        >>> [stage.what for stage in sm.federated.plan(sm.sap_original())]
        ['gradients of single adapters']
    """
    generator = torch.Generator().manual_seed(0)

    def made() -> LowRank:
        return LowRank(
            torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator)
        )

    layers = [Layer(f"model.layers.{n}.q_proj", (made(), made())) for n in range(2)]
    notes = _Notes(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SapmergeWarning)
        prepared = prepare(sap() if method is None else method, Stream(tuple(layers), notes))
        for layer in layers:
            prepared(layer)
    return list(dict.fromkeys(notes.stages))


@dataclass
class _Notes:
    """Anchors that answer with zeros, and note what they are asked for."""

    layers: Sequence[Layer]
    stages: list[Stage] = field(default_factory=list[Stage])
    whole: bool = True
    pairs: bool = False

    def _note(self, what: str, shards: bool, cached: bool = True) -> None:
        self.stages.append(Stage(what, shards, cached and self.whole))

    def observe(self, layers: LayerStream, units: Units) -> _Zeros:
        return _Zeros(self, layers, units)

    def in_turn(self, layers: LayerStream, units: Units) -> Iterator[tuple[Sequence[int], _Zeros]]:
        for k in range(2):
            yield [k], _Zeros(self, layers, units)

    def losses(self, loss: Callable[..., Tensor] | None = None) -> Sequence[float]:
        self._note("losses of single adapters", True)
        return [0.0, 0.0]

    def loss_of(
        self, updates: Mapping[str, Update], loss: Callable[..., Tensor] | None = None
    ) -> float:
        if updates:  # the base's own loss is one pass
            self._note("losses of merged models", False)
        return 1.0

    def slopes(
        self,
        updates: Mapping[str, Update],
        directions: Mapping[str, Sequence[Update]],
        loss: Callable[..., Tensor] | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        self._note("gradients of merged models", False, cached=False)
        return 1.0, {
            name: torch.zeros(len(along), dtype=torch.float64) for name, along in directions.items()
        }

    def grams(self, layers: LayerStream, fold: Callable[[Layer, int, Tensor], None]) -> None:
        self._note("inputs at single adapters", False, cached=False)
        for layer in layers:
            for k in range(len(layer)):
                fold(layer, k, torch.eye(layer.shape[1], dtype=torch.float64))

    def scaled(self, factors: Mapping[str, Sequence[float]]) -> _Notes:
        return self

    def halves(self) -> tuple[_Notes, _Notes]:
        half = _Notes(self.layers, self.stages, whole=False)  # a cache is of all anchors
        return half, half


@dataclass
class _Zeros:
    """Statistics of no gradient."""

    notes: _Notes
    layers: LayerStream
    units: Units

    def moment(
        self, layer: str, adapter: int, part: str, statistic: str, at: str
    ) -> tuple[Tensor, Tensor]:
        self.notes.stages.append(
            Stage(
                "gradients of single adapters" if at == "adapter" else "gradients at the base",
                at == "adapter",
                at == "adapter" and self.notes.whole,
            )
        )
        return self._zeros(layer, adapter, part)

    def activations(self, layer: str, adapter: int, part: str) -> tuple[Tensor, Tensor]:
        self.notes.stages.append(Stage("inputs at single adapters", False, False))
        return self._zeros(layer, adapter, part)

    def _zeros(self, layer: str, adapter: int, part: str) -> tuple[Tensor, Tensor]:
        update = next(found for found in self.layers if found.name == layer).updates[adapter]
        zeros = torch.zeros_like(self.units(update).values[part])
        return zeros, zeros
