"""One look at every value: digest, norm, and what is not finite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "Entry", "Facts", "groups", "measure", "measure_group"]

CHUNK = 1 << 22
# looked at as the float32 that they are read as
_NARROWED = (
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class Entry(NamedTuple):
    """One tensor as its file describes it; `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Facts(NamedTuple):
    """What one pass over the values of a tensor finds:
    sha256, Frobenius norm, number of NaN and Inf.
    """

    digest: str
    norm: float
    bad: int


def measure(chunks: Iterator[tuple[memoryview, Tensor]]) -> Facts:
    """One pass over a tensor: digest, norm and number of values that are not finite in float32."""
    digest, square, bad = hashlib.sha256(), 0.0, 0
    for data, stored in chunks:
        digest.update(data)
        values = stored.float() if stored.dtype in _NARROWED else stored
        part = float(values.double().square().sum())
        if not math.isfinite(part):
            bad += int((~torch.isfinite(values)).sum())
        square += part
    return Facts(digest.hexdigest(), math.sqrt(square), bad)


def groups(entries: dict[str, Entry]) -> Iterator[list[tuple[str, Entry]]]:
    """The tensors in file order; small neighbours of one dtype together,
    because each call into torch costs.
    """
    group: list[tuple[str, Entry]] = []
    size = 0
    for item in sorted(entries.items(), key=lambda item: item[1].start):
        entry = item[1]
        if group and (entry.dtype != group[0][1].dtype or size + entry.size > CHUNK // 16):
            yield group
            group, size = [], 0
        group.append(item)
        size += entry.size
    if group:
        yield group


def measure_group(
    group: list[tuple[str, Entry]], data: memoryview, first: Entry
) -> Iterator[tuple[str, Facts]]:
    """`measure` for tensors that lie side by side."""
    stored = torch.frombuffer(data, dtype=first.dtype)
    values = stored.float() if stored.dtype in _NARROWED else stored
    bounds = [
        (entry.start - first.start, entry.start - first.start + entry.size) for _, entry in group
    ]
    starts = [begin // first.dtype.itemsize for begin, _ in bounds]
    squares = np.add.reduceat(values.double().square().numpy(), starts)
    for (name, _), (begin, end), square in zip(group, bounds, squares.tolist(), strict=True):
        part = data[begin:end]
        if math.isfinite(square):
            yield name, Facts(hashlib.sha256(part).hexdigest(), math.sqrt(square), 0)
        else:
            yield name, measure(iter([(part, torch.frombuffer(part, dtype=first.dtype))]))
