"""The layers of a set of adapters: a re-iterable stream that reads a layer when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sapmerge.adapter import Adapter, Module
from sapmerge.anchors import Anchors
from sapmerge.anchors.losses import Loss
from sapmerge.layer import Layer, LowRank, Update, absent

__all__ = ["AdapterLayers", "with_progress"]


@dataclass(frozen=True)
class AdapterLayers:
    """The layers of a set of adapters, read from them when asked for; adapters sorted by content."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    modules: Mapping[str, Module]
    device: torch.device
    anchors: Anchors | None = None

    @staticmethod
    def of(adapters: Sequence[Adapter], weights: Sequence[float], device: torch.device) -> AdapterLayers:
        """Sort by content, so that no bit of the result depends on the order in which adapters were given."""
        order = sorted(range(len(adapters)), key=lambda k: (adapters[k].digest, weights[k]))
        modules = {name: module for adapter in adapters for name, module in adapter.modules.items()}
        return AdapterLayers(
            tuple(adapters[k] for k in order), tuple(weights[k] for k in order), dict(sorted(modules.items())), device
        )

    def with_anchors(
        self, loader: Any, model: Any, loss: Loss | None, cache: str | os.PathLike[str] | None = None
    ) -> AdapterLayers:
        """The same layers, with gradients on the anchors at hand."""

        def reader(adapter: Adapter) -> Callable[[], Mapping[str, Update]]:
            return lambda: {name: adapter.update(name) for name in adapter.modules}

        readers = [(adapter.label, reader(adapter)) for adapter in self.adapters]
        anchors = Anchors(model, loader, self.modules, readers, loss)
        if cache is not None:
            anchors.resume_in(cache, [adapter.digest for adapter in self.adapters])
        return replace(self, anchors=anchors)

    def __iter__(self) -> Iterator[Layer]:
        for name in self.modules:
            yield self.layer(name)

    def layer(self, name: str, record: Callable[[str, object], None] | None = None) -> Layer:
        """One layer, with an update of rank 0 for every adapter that lacks it."""
        updates = [
            adapter.update(name).to(self.device) if name in adapter.modules else self._absent(name)
            for adapter in self.adapters
        ]
        layer = Layer(
            name=name,
            updates=tuple(updates),
            adapters=tuple(adapter.label for adapter in self.adapters),
            weights=self.weights,
            digests=tuple(adapter.digest for adapter in self.adapters),
            anchors=self.anchors,
        )
        return layer if record is None else replace(layer, record=record)

    def _absent(self, name: str) -> LowRank:
        return absent(self.modules[name].shape, torch.empty(0, device=self.device))


def with_progress(names: Mapping[str, Module], show: bool) -> Iterator[str]:
    """The names of the layers, with a progress bar on stderr."""
    if not show:
        yield from names
        return
    from tqdm import tqdm

    yield from tqdm(names, desc="merging", unit="layer", leave=False)
