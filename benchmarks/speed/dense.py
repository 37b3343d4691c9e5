"""Merging written straight down: every update as a float32 matrix, torch's SVD.
Memory is counted as for ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from speed.child import Clock, read_updates, write_factors

__all__ = ["METHODS", "run", "ties_sum"]

Factors = tuple[Tensor, Tensor]


def run(job: dict[str, Any], clock: Clock) -> None:
    """Read, merge, write. With samples, all layers are read and written,
    and the merge of a few is scaled.
    """
    method, merged = METHODS[job["method"]], dict[str, Factors]()
    with clock.part("load"):
        updates = read_updates(job["adapters"])
    times = {module: sample["times"] for module, sample in job["samples"].items()} or dict.fromkeys(
        updates, 1.0
    )
    for module, count in times.items():
        with clock.part("merge", count):
            merged[module] = method([b @ a for b, a in updates[module]], job["rank"])
    with clock.part("save"):
        # Where only samples were merged, an input stands for the other layers.
        write_factors(job["out"], {name: pairs[0] for name, pairs in updates.items()} | merged)


def mean(matrices: Sequence[Tensor], rank: int) -> Factors:
    return _cut(torch.stack(list(matrices)).mean(0), rank)


def ties(matrices: Sequence[Tensor], rank: int) -> Factors:
    return _cut(ties_sum(matrices), rank)


def tsv(matrices: Sequence[Tensor], rank: int) -> Factors:
    """Task singular vectors: the SVD of every update,
    and the polar factors of the stacked vectors.
    """
    pieces = [_svd(matrix) for matrix in matrices]
    keep = [
        min(min(matrices[0].shape) // len(matrices), int((s > 1e-5 * s[0]).sum()))
        for _, s, _ in pieces
    ]
    left = _polar(torch.cat([U[:, :k] for (U, _, _), k in zip(pieces, keep, strict=True)], 1))
    right = _polar(torch.cat([Vh[:k] for (_, _, Vh), k in zip(pieces, keep, strict=True)]))
    return left * torch.cat([s[:k] for (_, s, _), k in zip(pieces, keep, strict=True)]), right


def iso_c(matrices: Sequence[Tensor], rank: int) -> Factors:
    """The sum with all singular values equal; its vectors are the factors,
    so it is not decomposed again.
    """
    U, s, Vh = _svd(torch.stack(list(matrices)).sum(0))
    keep = int((s > 1e-5 * s[0]).sum())
    return U[:, :keep] * s[:keep].mean(), Vh[:keep]


def knots(matrices: Sequence[Tensor], rank: int) -> Factors:
    """TIES on S V_k of the SVD of all updates side by side;
    U and the merged coordinates are the factors.
    """
    U, s, Vh = _svd(torch.cat(list(matrices), 1))
    keep = int((s > 1e-5 * s[0]).sum())
    return U[:, :keep], ties_sum((s[:keep, None] * Vh[:keep]).chunk(len(matrices), 1))


def ties_sum(matrices: Sequence[Tensor], density: float = 0.2) -> Tensor:
    """TIES on matrices of any float dtype: trim, elect, mean of those that agree."""
    trimmed: list[Tensor] = []
    for matrix in matrices:
        top = torch.topk(matrix.abs().flatten(), int(density * matrix.numel())).indices
        mask = torch.zeros(matrix.numel(), dtype=matrix.dtype)
        mask[top] = 1
        trimmed.append(matrix * mask.view_as(matrix))
    stack = torch.stack(trimmed)
    agree = stack.sign() == stack.sum(0).sign()
    agree &= stack != 0
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False)


def _cut(matrix: Tensor, rank: int) -> Factors:
    U, s, Vh = _svd(matrix)
    return U[:, :rank] * s[:rank], Vh[:rank]


def _polar(matrix: Tensor) -> Tensor:
    U, _, Vh = _svd(matrix)
    return U @ Vh


METHODS: dict[str, Callable[[Sequence[Tensor], int], Factors]] = {
    "mean": mean,
    "ties": ties,
    "tsv": tsv,
    "iso_c": iso_c,
    "knots": knots,
}
