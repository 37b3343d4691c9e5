"""Resuming: what a pass over the anchors found for an adapter,
kept under a key of everything it depends on.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sapmerge.anchors.digest import digest, digest_of_model
from sapmerge.core.frames import Frames
from sapmerge.core.updates import LowRank, Update
from sapmerge.io.cache import Cache
from sapmerge.version import __version__

__all__ = ["LOSSES", "Resume", "kept_losses"]

LOSSES = "losses"
"""Where losses are, in the folder of a cache."""

Found = Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]
"""layer -> part -> two halves of a statistic."""


class Resume:
    """The cache of one merge.

    A result is used again only if the adapter, the update that is scored, the base model, the
    anchors, the loss, the statistic, the units, the coordinate systems and the version of the
    library are the same, by content (`identity`).

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
        self._losses = Cache(os.path.join(folder, LOSSES))
        self._common = [
            __version__,
            torch.__version__,
            digest_of_model(base),
            anchors,
            digest(loss),
        ]

    def scaled(self, factors: Mapping[str, Sequence[float]], changed: Collection[int]) -> Resume:
        """The cache of a merge of the same adapters, some of them multiplied:
        layer -> one factor per adapter.
        """
        other = copy.copy(self)
        other._digests = [
            f"{known} {digest(sorted((name, row[k]) for name, row in factors.items()))}"
            if k in changed
            else known
            for k, known in enumerate(self._digests)
        ]
        return other

    def key(
        self, adapter: int, statistic: str, units: Callable[..., Any], contents: Mapping[str, str]
    ) -> str:
        """Everything that the statistics of one adapter in these layers depend on, as text.

        Args:
            contents: layer -> its `content`.
        """
        return json.dumps(
            [
                *self._common,
                self._digests[adapter],
                statistic,
                digest(units),
                sorted(contents.items()),
            ]
        )

    def loss_keys(
        self, updates: Mapping[str, Update], losses: Sequence[Callable[..., Any]]
    ) -> list[str]:
        """Everything that each loss at base + updates depends on, as text."""
        contents = sorted(
            (name, self.content(update, ()))
            for name, update in updates.items()
            if not update.absent
        )
        common = self._common[:-1]
        return [json.dumps([*common, "loss", digest(loss), contents]) for loss in losses]

    def loss(self, key: str) -> float | None:
        """A loss of an earlier run."""
        kept = self._losses.get(key)
        return None if kept is None else float(kept[1]["loss"])

    def put_loss(self, key: str, loss: float) -> None:
        """Keep a loss for a later run."""
        self._losses.put(key, {}, {"loss": loss})

    def content(self, update: Update, frames: Sequence[Frames]) -> str:
        """What an update that is scored is, and the frames that it is seen in."""
        factors = [update.B, update.A] if isinstance(update, LowRank) else [update.matrix]
        return digest([factors, [(frame.U, frame.V, frame.scale) for frame in frames]])

    def get(self, key: str) -> tuple[Found, dict[str, Any]] | None:
        """Statistics and notes of an earlier run."""
        kept = self._cache.get(key)
        if kept is None:
            return None
        tensors, notes = kept
        statistics: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for number, (layer, part) in enumerate(notes["places"]):
            statistics.setdefault(layer, {})[part] = (
                tensors[f"{number}.0"],
                tensors[f"{number}.1"],
            )
        return statistics, notes

    def put(self, key: str, found: Found, notes: Mapping[str, Any]) -> None:
        """Keep statistics and notes for a later run."""
        places = [(layer, part) for layer, parts in found.items() for part in parts]
        halves = [found[layer][part] for layer, part in places]
        tensors = {f"{number}.0": one for number, (one, _) in enumerate(halves)}
        # it may be the same one
        tensors |= {f"{number}.1": other.clone() for number, (_, other) in enumerate(halves)}
        self._cache.put(key, tensors, {**notes, "places": places})


def kept_losses(
    resume: Resume | None, updates: Mapping[str, Update], losses: Sequence[Callable[..., Any]]
) -> tuple[Sequence[str], list[float | None]]:
    """The keys of losses at base + updates in the cache, if there is one, and what it has of
    them.
    """
    if resume is None:
        return (), [None] * len(losses)
    keys = resume.loss_keys(updates, losses)
    return keys, [resume.loss(key) for key in keys]
