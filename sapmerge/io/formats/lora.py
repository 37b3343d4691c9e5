"""What all formats share: the factors of one module, and files of tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, AdapterSecurityError
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, shown
from sapmerge.io.header import open_weights
from sapmerge.io.pickles import open_pickle
from sapmerge.io.strict_json import parse

__all__ = ["Lora", "Parts", "Stored", "open_stored", "pairs_of", "read_json"]


@dataclass(frozen=True)
class Lora:
    """What one module is changed by: alpha / r * B A.

    Args:
        a: (r, n), the kernel (r, c, h, w) of a convolution, or (r, n) of an embedding's n rows.
        b: (m, r), (m, r, 1, 1) of a convolution.
        alpha: the scaling, times r.
        kind: "linear", "conv" or "embedding".
    """

    a: Tensor
    b: Tensor
    alpha: float
    kind: str = "linear"

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def unscaled(self) -> Lora:
        """The same update with alpha = r, for formats that have no scaling: B is multiplied, in
        its own dtype where that is exact, else in float32.
        """
        scaling = self.alpha / self.rank
        if scaling == 1.0:
            return self
        wide = self.b.double() * scaling
        narrow = wide.to(self.b.dtype)
        b = narrow if torch.equal(narrow.double(), wide) else wide.float()
        return Lora(self.a, b, float(self.rank), self.kind)


Parts: TypeAlias = Mapping[str, Mapping[str, Lora]]
"""Component of a pipeline ("unet", "text_encoder"; "" of a model alone) -> module -> factors."""


@dataclass(frozen=True)
class Stored:
    """A file of tensors, read whole.

    Args:
        where: how messages name it.
        tensors: name -> tensor.
        metadata: of a safetensors file.
    """

    where: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_stored(path: str, allow_pickle: bool = False) -> Stored:
    """Read a safetensors file, or with leave a `.pt` file of tensors alone.

    Raises:
        AdapterFormatError, LimitExceededError: it is none, or damaged.
        AdapterSecurityError: a pickle, without leave.
    """
    where = shown(path)
    if path.endswith(".safetensors"):
        with RegularFile(path, where) as file:
            weights = open_weights(file, os.path.abspath(path), DEFAULT_LIMITS)
            weights.scan(file)
            length = int.from_bytes(file.read(0, 8), "little")
            header = cast("dict[str, Any]", json.loads(file.read(8, length)))
        metadata = cast("dict[str, str]", header.get("__metadata__", {}))
        return Stored(where, {name: weights.read(name) for name in weights.entries}, metadata)
    if not allow_pickle:
        raise AdapterSecurityError(
            f"{where}: is a pickle, which can hold code. If you trust its author, read it with "
            "allow_pickle=True"
        )
    with RegularFile(path, where) as file:
        held, _ = open_pickle(file, DEFAULT_LIMITS)
    return Stored(where, {name: held.read(name) for name in held.entries}, {})


def read_json(path: str) -> dict[str, Any]:
    """A JSON file, strictly."""
    where = shown(path)
    with RegularFile(path, where) as file:
        raw = bytes(file.read(0, min(file.size, DEFAULT_LIMITS.config_bytes + 1)))
    return dict(parse(raw, where, DEFAULT_LIMITS))


def pairs_of(
    found: Mapping[str, Mapping[str, Tensor]], where: str
) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """Module -> A, B, and alpha if it is told, of tables {"a": ..., "b": ..., "alpha": ...}.

    Raises:
        AdapterFormatError: a factor without the other, or factors that do not fit each other.
    """
    pairs = dict[str, tuple[Tensor, Tensor, float | None]]()
    for module, parts in found.items():
        if "a" not in parts or "b" not in parts:
            lacking = "first" if "a" not in parts else "second"
            raise AdapterFormatError(f"{where}: {shown(module)} has no {lacking} factor")
        a, b = parts["a"], parts["b"]
        kernel = a.ndim == 4 and b.ndim == 4 and b.shape[2:] == (1, 1)
        if not (a.ndim == 2 == b.ndim or kernel) or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise AdapterFormatError(
                f"{where}: the factors of {shown(module)} are {tuple(a.shape)} and "
                f"{tuple(b.shape)}, which is no LoRA of a matrix or a convolution"
            )
        alpha = parts.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise AdapterFormatError(
                f"{where}: alpha of {shown(module)} has shape {tuple(alpha.shape)}"
            )
        pairs[module] = a, b, None if alpha is None else float(alpha)
    return pairs
