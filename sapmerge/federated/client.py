"""What a client can do before it uploads: prune on the public anchors,
and write numbers that add up exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sapmerge.core.scalars import whole
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.losses import Loss
from sapmerge.merging.inputs import AdapterLike
from sapmerge.merging.merge import Merged, merge
from sapmerge.methods.anchored import sap_original

__all__ = ["fixed_point", "from_fixed_point", "prune_for_upload"]


def prune_for_upload(
    model: Any, adapter: AdapterLike, anchors: Any, density: float = 0.5, loss: Loss | None = None
) -> Merged:
    """One adapter, pruned as the server's `sap_original` would: its result has `save_pretrained`.

    The mean of such uploads is `sap_original` on the server, to the rounding of a sum; single
    factors are the same, bit for bit. Weights by anchors, agreement, medians,
    CLAIR and Pilot need single uploads and cannot follow a secure sum.

    Args:
        model: the base model.
        adapter: as for `merge`, one of them.
        anchors: the public anchors, the same for all clients.
        density: fraction of the LoRA parameters kept; the others are zeros.
        loss: (model, batch) -> scalar.
    """
    return merge(
        [adapter],
        anchors,
        model,
        method=sap_original(density),
        loss=loss,
        modules_to_save=None,
        progress=False,
    )


def fixed_point(update: Update, bits: int = 24) -> Tensor:
    """round(2^bits D) as int64, (m, n): sums of such matrices have the same bits in any order.

    Args:
        update: of one layer.
        bits: after the point; the error of an entry is at most 2^-(bits + 1).

    Raises:
        NonFiniteError: an entry is not finite.
        MethodError: entries so large that a sum of 2^20 of them could overflow.
    """
    places = whole(bits, 1, 40)
    if places is None:
        raise MethodError(f"bits are a whole number from 1 to 40; got {bits!r}")
    wide = update.dense().double()
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError("an entry of the update is NaN or infinite")
    if float(wide.abs().max()) * 2.0**places >= 2.0**42:
        raise MethodError(
            f"an entry of {float(wide.abs().max()):.3g} leaves no room for sums at {places} bits"
        )
    return (wide * 2.0**places).round().to(torch.int64)


def from_fixed_point(total: Tensor, bits: int = 24) -> Tensor:
    """The matrix that a sum of `fixed_point` stands for, float64."""
    return total.double() / 2.0**bits
