"""What an adapter does to the base that is no update of a matrix: biases and rows of embeddings.

moves      lora_bias: the bias of the layer moves by scaling * lora_B.bias.
replaces   bias="all" or "lora_only": a bias of the base was trained, and is stored whole.
rows       trainable_token_indices: some rows of an embedding were trained, and are stored whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sapmerge.errors import AdapterConfigError, AdapterFormatError
from sapmerge.io.files import Weights, shown

__all__ = ["Vector", "replaced_biases", "token_rows"]


@dataclass(frozen=True)
class Vector:
    """One tensor of an adapter that moves or replaces values of the base.

    Args:
        name: of the base's tensor, e.g. "model.norm.bias".
        spelled: the same as the file spells it.
        tensor: its name in the file.
        how: "moves", "replaces" or "rows".
        shape, dtype: of the tensor.
        scaling: what it is multiplied by, where it moves the base.
        rows: which rows of the base it replaces.
    """

    name: str
    spelled: str
    tensor: str
    how: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scaling: float = 1.0
    rows: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """What `inspect` calls it."""
        return {"moves": "lora_bias", "replaces": "biases", "rows": "token rows"}[self.how]

    @property
    def key(self) -> str:
        """Unique in one adapter."""
        return f"{self.how} {self.name}"

    def mark(self) -> tuple[object, ...]:
        """What the digest has to cover besides values and shape."""
        return self.how, self.scaling.hex(), self.rows


def replaced_biases(weights: Weights, biases: Mapping[str, str]) -> Iterator[Vector]:
    """The biases of the base that a file replaces.

    Args:
        biases: module -> tensor name.
    """
    for module, tensor in biases.items():
        entry = weights.entries[tensor]
        if len(entry.shape) != 1:
            raise AdapterFormatError(
                f"{weights.where}: tensor {shown(tensor)} is no bias: shape {entry.shape}"
            )
        name = f"{module}.bias"
        yield Vector(name, name, tensor, "replaces", entry.shape, entry.dtype)


def token_rows(
    weights: Weights,
    tokens: Mapping[str, str],
    wanted: Mapping[str, Sequence[int]] | None,
    where: str,
) -> Iterator[Vector]:
    """The rows of embeddings that a file replaces.

    Args:
        tokens: module -> tensor name.
        wanted: `trainable_token_indices`: the end of a module's name, or "" for the input embedding
            -> rows.
        where: how messages name the config.

    Raises:
        AdapterConfigError, AdapterFormatError: rows and tensors do not belong together.
    """
    rest = dict(tokens)
    for end, rows in (wanted or {}).items():
        hits = [module for module in rest if not end or f".{module}".endswith(f".{end}")]
        if len(hits) != 1:
            raise AdapterConfigError(
                f"{where}: trainable_token_indices names {shown(end or 'the input embedding')}, "
                "the file has rows of "
                f"{shown(sorted(tokens))}; config and weights do not belong together"
            )
        tensor = rest.pop(hits[0])
        entry = weights.entries[tensor]
        if len(entry.shape) != 2 or entry.shape[0] != len(rows):
            raise AdapterFormatError(
                f"{weights.where}: tensor {shown(tensor)} has shape {entry.shape}; "
                f"trainable_token_indices names {len(rows)} rows"
            )
        name = f"{hits[0]}.weight"
        yield Vector(name, name, tensor, "rows", entry.shape, entry.dtype, rows=tuple(rows))
    if rest:
        raise AdapterConfigError(
            f"{where}: the file has rows of {shown(sorted(rest))}, which trainable_token_indices "
            "does not name"
        )
