"""Towers that no adapter touches: their embeddings are computed once,
and stand in for their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sapmerge.anchors.hooks import removed
from sapmerge.losses import INPUTS, embedding

__all__ = ["embedded", "stand_in"]


def embedded(
    base: nn.Module, targets: Iterable[nn.Module], batches: Callable[[], Iterable[Any]]
) -> dict[str, list[Tensor]]:
    """Side -> the embeddings of every batch, for the sides in which no target takes part."""
    kept = {side: _embeddings(base, targets, batches, side) for side in INPUTS}
    return {side: embeddings for side, embeddings in kept.items() if embeddings is not None}


def stand_in(
    batch: Mapping[str, Any], number: int, found: Mapping[str, Sequence[Tensor]]
) -> Mapping[str, Any]:
    """A batch with the embeddings that were found for it,
    instead of the inputs that they were made of.
    """
    for side, embeddings in found.items():
        batch = {key: value for key, value in batch.items() if key not in INPUTS[side]}
        batch[f"{side}_embeds"] = embeddings[number]
    return batch


def _embeddings(
    base: nn.Module, targets: Iterable[nn.Module], batches: Callable[[], Iterable[Any]], side: str
) -> list[Tensor] | None:
    try:
        with torch.no_grad(), _stopping_at(targets):
            return [embedding(base, batch, side) for batch in batches()]
    except _Adapted:
        return None


class _Adapted(Exception):
    """An adapted layer is reached."""


@contextmanager
def _stopping_at(modules: Iterable[nn.Module]) -> Generator[None]:
    def stop(module: nn.Module, inputs: Any) -> None:
        raise _Adapted

    with removed(partial(module.register_forward_pre_hook, stop) for module in modules):
        yield
