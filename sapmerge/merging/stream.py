"""The layers of a set of adapters: a re-iterable stream that reads a layer when it is asked for."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from sapmerge.anchors.anchors import Anchors
from sapmerge.core.geometry import Geometry
from sapmerge.core.layer import Layer, Member
from sapmerge.core.torch_state import pinned, threads_outside
from sapmerge.core.updates import Update, absent
from sapmerge.errors import warn
from sapmerge.io.adapter import Adapter
from sapmerge.io.modules import Module
from sapmerge.losses import Loss
from sapmerge.merging.inputs import in_content_order

__all__ = ["AdapterLayers", "in_order", "with_progress"]

T = TypeVar("T")
R = TypeVar("R")

_MOST, _IN_FLIGHT = 4, 1 << 30  # layers, and bytes of their updates as matrices
# bytes of factors that are held between the pre-passes of a merge and the merge itself
_HELD = 1 << 29


class _Held:
    """The updates that pre-passes have read, as far as they fit: each is read and verified once,
    and what it has computed of itself (norm, Gram matrices, balanced factors) serves every pass."""

    def __init__(self, room: int) -> None:
        self.filling, self._room = False, room
        self.pairs = dict[str, Geometry]()  # layer -> how its updates lie to each other
        self._updates: dict[tuple[int, str], Update] = {}

    def fits(self, size: int) -> bool:
        """Whether there is room for so many bytes."""
        return size <= self._room

    def get(self, key: tuple[int, str], read: Callable[[], Update]) -> Update:
        update = self._updates.get(key)
        if update is None:
            update = read()
            if self.filling and update.nbytes <= self._room:
                self._room -= update.nbytes
                self._updates[key] = update
        return update


@dataclass(frozen=True)
class AdapterLayers:
    """The layers of a set of adapters, read from them when asked for;
    adapters sorted by content.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    modules: Mapping[str, Module]
    device: torch.device
    anchors: Anchors | None = None
    held: _Held = field(default_factory=lambda: _Held(_HELD), repr=False)

    @staticmethod
    def of(
        adapters: Sequence[Adapter], weights: Sequence[float], device: torch.device
    ) -> AdapterLayers:
        """Sort by content, so that no bit of the result depends on the order in which
        adapters were given.
        """
        order = sorted(
            range(len(adapters)), key=lambda k: in_content_order(adapters[k], weights[k])
        )
        modules = {name: module for adapter in adapters for name, module in adapter.modules.items()}
        return AdapterLayers(
            tuple(adapters[k] for k in order),
            tuple(weights[k] for k in order),
            dict(sorted(modules.items())),
            device,
        )

    def with_anchors(
        self,
        loader: Any,
        model: Any,
        loss: Loss | None,
        cache: str | os.PathLike[str] | None = None,
    ) -> AdapterLayers:
        """The same layers, with gradients on the anchors at hand."""

        beside = [adapter.label for adapter in self.adapters if adapter.vectors]
        if beside:
            warn(
                f"the anchors see {beside} without their biases and rows of embeddings: losses "
                "and gradients are those of the base plus the updates of its matrices"
            )
        readers = [
            (adapter.label, partial(self._updates, k)) for k, adapter in enumerate(self.adapters)
        ]
        anchors = Anchors(model, loader, self.modules, readers, loss)
        if cache is not None:
            anchors.resume_in(cache, [adapter.digest for adapter in self.adapters])
        return replace(self, anchors=anchors)

    def __iter__(self) -> Iterator[Layer]:
        for name in self.modules:
            yield self.layer(name)

    def layer(self, name: str, record: Callable[[str, object], None] | None = None) -> Layer:
        """One layer; an adapter that lacks it has an absent update."""
        layer = Layer(name, self.members(name, slice(None)))
        return layer if record is None else layer.noting(record)

    def members(self, name: str, some: slice) -> list[Member]:
        """What some of the adapters have of a layer."""
        return [
            Member(self._update(k, name), adapter.label, self.weights[k], adapter.digest)
            for k, adapter in list(enumerate(self.adapters))[some]
        ]

    def can_be_held(self) -> bool:
        """Whether all updates fit into what `holding` keeps, so that nothing is read twice."""
        size = sum(4 * m.rank * sum(m.shape) for a in self.adapters for m in a.modules.values())
        return self.held.fits(size)

    @contextmanager
    def holding(self) -> Generator[None]:
        """What is read in the block is held for later, within a budget:
        for the pre-passes of a method.
        """
        before, self.held.filling = self.held.filling, True
        try:
            yield
        finally:
            self.held.filling = before

    @property
    def pairs(self) -> dict[str, Geometry]:
        """How the updates of a layer lie to each other, to be looked at once while they are held:
        by layer.
        """
        return self.held.pairs if self.held.filling else {}

    def _updates(self, k: int) -> Mapping[str, Update]:
        return {name: self._update(k, name) for name in self.adapters[k].modules}

    def _update(self, k: int, name: str) -> Update:
        adapter = self.adapters[k]
        if name in adapter.modules:
            return self.held.get((k, name), lambda: adapter.update(name).to(self.device))
        return absent(self.modules[name].shape, torch.empty(0, device=self.device))

    def layers_at_once(self) -> int:
        """How many layers may be worked on together: one per thread,
        if all updates fit in 1 GiB as matrices.

        One at a time with anchors, whose model can run in one thread only, and on a device,
        which is busy with one.
        """
        if self.anchors is not None or self.device.type != "cpu":
            return 1
        largest = max(math.prod(module.shape) for module in self.modules.values())
        return max(
            1, min(threads_outside(), _MOST, _IN_FLIGHT // (4 * largest * len(self.adapters)))
        )


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """function(item) of every item, in their order;
    `workers` at a time, each on one thread of torch.

    Small layers keep one thread busy, not several. What is computed does not depend on the number
    of workers, and the first item that fails raises its error when its turn comes.
    """
    if workers < 2:
        yield from map(function, items)
        return

    waiting = deque[Future[R]]()
    pool = ThreadPoolExecutor(workers, "sapmerge")
    try:
        for item in items:
            waiting.append(pool.submit(pinned(function), item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def with_progress(items: Iterable[T], total: int, show: bool) -> Iterator[T]:
    """The items, one per layer, with a progress bar on stderr."""
    if not show:
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, desc="merging", total=total, unit="layer", leave=False)
