"""Resuming: what a pass over the anchors found for an adapter, kept under a key of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapmerge.bases import Frames
from sapmerge.io.cache import Cache
from sapmerge.recipe import recipe
from sapmerge.version import __version__

__all__ = ["Resume"]

Found = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
"""layer -> part -> two halves of a statistic."""


class Resume:
    """The cache of one merge.

    A result is used again only if the adapter, the base model's weights, the anchors, the loss, the statistic, the
    units, the coordinate systems and the version of the library are the same, by content. A user's function counts by
    its name and its bytecode.

    Args:
        folder: of the cache.
        digests: of the adapters.
        base: the base model.
        anchors: digest of the batches.
        loss: of the anchors.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        digests: Sequence[str],
        base: nn.Module,
        anchors: str,
        loss: Callable[..., Any],
    ) -> None:
        self._cache, self._digests = Cache(folder), digests
        self._common = [__version__, torch.__version__, _weights(base), anchors, _identity(loss)]

    def key(
        self, adapter: int, statistic: str, units: Callable[..., Any], frames: Mapping[str, Sequence[Frames]]
    ) -> str:
        """Everything that the statistics of one adapter in these layers depend on, as text."""
        systems = {name: [_frame(frame) for frame in nested] for name, nested in sorted(frames.items())}
        return json.dumps([*self._common, self._digests[adapter], statistic, _identity(units), systems])

    def get(self, key: str) -> tuple[Found, dict[str, Any]] | None:
        """Statistics and notes of an earlier run."""
        kept = self._cache.get(key)
        if kept is None:
            return None
        tensors, notes = kept
        found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for number, (layer, part) in enumerate(notes["places"]):
            found.setdefault(layer, {})[part] = (tensors[f"{number}.0"], tensors[f"{number}.1"])
        return found, notes

    def put(self, key: str, found: Found, notes: Mapping[str, Any]) -> None:
        """Keep statistics and notes for a later run."""
        places = [(layer, part) for layer, parts in found.items() for part in parts]
        halves = [found[layer][part] for layer, part in places]
        tensors = {f"{number}.{half}": pair[half] for number, pair in enumerate(halves) for half in (0, 1)}
        self._cache.put(key, tensors, {**notes, "places": places})


def _identity(function: Callable[..., Any]) -> str:
    """A part by its recipe, a function by its name and bytecode (and that of the functions defined inside it)."""
    code = getattr(function, "__code__", None)
    if code is None:
        return recipe(function)
    parts, pending = list[str](), [code]
    while pending:
        current = pending.pop()
        parts.append(f"{current.co_code.hex()} {current.co_names}")
        for constant in current.co_consts:
            if hasattr(constant, "co_code"):
                pending.append(constant)
            else:
                parts.append(repr(constant))
    return f"{recipe(function)} {hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


def _weights(base: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        if "lora_" not in name:
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _frame(frame: Frames) -> list[str]:
    return [
        "" if part is None else hashlib.sha256(part.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for part in (frame.U, frame.V, frame.scale)
    ]
