"""Copies of the base's embeddings that PEFT stores beside an adapted embedding:
never used, but they must agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sapmerge.errors import IncompatibleAdaptersError, ModelMismatchError
from sapmerge.io.adapter import Adapter
from sapmerge.io.modules import BaseWeights

__all__ = ["check_copies"]


def check_copies(adapters: Sequence[Adapter], base: BaseWeights | None) -> None:
    """Whether all adapters carry the same copies, and the model, if there is one,
    has the same weights.

    Raises:
        IncompatibleAdaptersError: two adapters have different ones: their bases are not the same.
        ModelMismatchError: the model has other weights.
    """
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, digests in adapter.copies().items():
            other = first.setdefault(name, adapter)
            if other.copies()[name] != digests and not _equal(
                other.copied(name), adapter.copied(name)
            ):
                raise IncompatibleAdaptersError(
                    f"{other.label!r} and {adapter.label!r} carry different copies of the base's "
                    f"weight of {name!r}: they were trained on different bases (a vocabulary that "
                    "was lengthened differently?)"
                )
    for name, adapter in first.items():
        if base is not None and not _equal(base.tensor(f"{name}.weight"), adapter.copied(name)):
            raise ModelMismatchError(
                f"{adapter.label!r} carries a copy of the base's weight of {name!r} that is not "
                "the model's: it was trained on another base, or the embedding was trained, too"
            )


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal up to a rounding to bfloat16."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-2, atol=1e-6)
