"""What a report says about the anchors."""

from __future__ import annotations

from typing import Any

from sapmerge.anchors.loading import batch_size
from sapmerge.anchors.losses import loss_name
from sapmerge.anchors.passes import Anchors
from sapmerge.errors import NonFiniteError

__all__ = ["notes_of"]


def notes_of(anchors: Anchors) -> dict[str, Any]:
    """How many there are, the loss, and its mean at the base and at base + each adapter as it was read.

    The loss of an adapter that the model overflows with (and that a method may have shortened) is None.
    """
    losses = {label: _loss(anchors, k) for k, (label, _) in enumerate(anchors.adapters)}
    notes: dict[str, Any] = {
        "anchors": sum(batch_size(batch) for batch in anchors.batches),
        "loss": loss_name(anchors.loss),
        "anchor loss": {"base model": anchors.loss_at(None), **losses},
    }
    return notes | ({"layers without gradient": sorted(anchors.unused)} if anchors.unused else {})


def _loss(anchors: Anchors, adapter: int) -> float | None:
    try:
        return anchors.loss_at(adapter)
    except NonFiniteError:
        return None
