"""How the updates of one layer lie to each other: inner products, cosines, signs that conflict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.core.linalg import norm
from sapmerge.core.lowrank import add_by_columns, gram, nothing_but_rounding
from sapmerge.core.updates import Dense, LowRank, Update

__all__ = [
    "Crowd",
    "Geometry",
    "SAMPLED_ROWS",
    "geometry",
    "off_diagonal_mean",
    "share_opposed",
    "sign_counts",
]

SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Geometry:
    """How the updates of one layer lie to each other.

    Args:
        norms: (K,) Frobenius norms.
        inner: (K, K) inner products <D_i, D_j>.
        both: (K, K) number of entries where both are non-zero.
        opposed: (K, K) how many of those have opposite signs.
    """

    inner: Tensor
    both: Tensor
    opposed: Tensor

    @staticmethod
    def nothing(count: int) -> Geometry:
        """Of no layer at all, to add layers to."""
        return Geometry(*(torch.zeros(count, count, dtype=torch.float64) for _ in range(3)))

    def add(self, layer: Geometry, owners: Sequence[int]) -> None:
        """Count one layer of the adapters `owners` in, in place."""
        at = torch.tensor(owners)
        for total, part in (
            (self.inner, layer.inner),
            (self.both, layer.both),
            (self.opposed, layer.opposed),
        ):
            total[at[:, None], at[None, :]] += part

    @property
    def norms(self) -> Tensor:
        return self.inner.diagonal().clamp_min(0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """(K, K); 0 where an update is zero."""
        norms = self.norms
        scale = norms[:, None] * norms[None, :]
        cosines = self.inner / torch.where(scale > 0, scale, 1.0)
        return torch.where(scale > 0, cosines, 0.0).clamp(-1, 1)

    @property
    def sign_conflict(self) -> Tensor:
        """(K, K): the share of entries with opposite signs; 1/2 for unrelated updates."""
        return share_opposed(self.both, self.opposed)


def geometry(updates: Sequence[Update], rows: int | None = None) -> Geometry:
    """Of the updates of one layer: inner products by Gram matrices of the factors,
    and sign conflicts of all rows. What is zero but for rounding is zero.

    rows: count signs on that many evenly spaced rows only; None: on all of them.
    """
    inner = gram(updates)
    for k, update in enumerate(updates):
        if nothing_but_rounding(update):
            inner[k, :] = inner[:, k] = 0.0
    return Geometry(inner, *sign_counts(updates, rows))


def sign_counts(updates: Sequence[Update], rows: int | None = None) -> tuple[Tensor, Tensor]:
    """`Geometry.both` and `Geometry.opposed`, row block by row block: never an (m, n) matrix.

    rows: look at that many evenly spaced rows only; None: at all of them.
    """
    count, (m, n) = len(updates), updates[0].shape
    block = max(1, min(SAMPLED_ROWS, 4_000_000 // max(1, count * n)))
    looked_at = m if rows is None else min(m, rows, block)
    index = torch.tensor([row * m // looked_at for row in range(looked_at)])
    both, opposed = (
        torch.zeros(count, count, dtype=torch.float64),
        torch.zeros(count, count, dtype=torch.float64),
    )
    for start in range(0, looked_at, block):
        chunk = index[start : start + block].to(updates[0].device)
        signs = torch.stack([update.rows(chunk).flatten() for update in updates]).float().sign_()
        agreement = (signs @ signs.T).double().cpu()
        signs.abs_()
        shared = (signs @ signs.T).double().cpu()
        both += shared
        opposed += (shared - agreement) / 2
    return both, opposed


class Crowd:
    """How the updates of one layer lie to each other, where they are so many that their pairs are
    not looked at: no (K, K) matrix is formed, and no update is held.

    Args:
        shape: (m, n) of the layer.
        rows: on how many rows, evenly spaced, signs are counted.
    """

    def __init__(self, shape: tuple[int, int], rows: int = SAMPLED_ROWS) -> None:
        looked_at = min(shape[0], rows)
        self._index = torch.tensor([row * shape[0] // looked_at for row in range(looked_at)])
        self._count = self._units = 0
        self._total = torch.zeros(shape, dtype=torch.float64)
        self._positive = torch.zeros(looked_at, shape[1], dtype=torch.float64)
        self._negative = torch.zeros_like(self._positive)

    def add(self, updates: Sequence[Update]) -> None:
        """Look at some of them."""
        units = [(u, 1 / u.norm()) for u in updates if not nothing_but_rounding(u)]
        self._count, self._units = self._count + len(updates), self._units + len(units)
        low = [(update, scale) for update, scale in units if isinstance(update, LowRank)]
        add_by_columns(self._total, low)
        for update, scale in units:
            if isinstance(update, Dense):
                self._total.add_(update.matrix.cpu(), alpha=scale)
        for update in updates:
            some = update.rows(self._index.to(update.device)).cpu()
            self._positive += some > 0
            self._negative += some < 0

    def cosine(self) -> float:
        """The mean over all pairs, from the norm of the sum of the updates, each scaled to norm 1;
        a zero update has cosine 0.
        """
        cosine = (norm(self._total) ** 2 - self._units) / (self._count * (self._count - 1))
        return max(-1.0, min(1.0, cosine))

    def sign_conflict(self) -> float:
        """The share of opposite signs over all pairs, counted entry by entry: p positive and q
        negative ones are p q opposed pairs.
        """
        both = self._positive + self._negative
        pairs = float((both * (both - 1) / 2).sum())
        return float((self._positive * self._negative).sum()) / pairs if pairs else 0.0


def share_opposed(both: Tensor, opposed: Tensor) -> Tensor:
    """(K, K): of the entries where two updates are non-zero, the share with opposite signs."""
    return opposed / both.clamp_min(1)


def off_diagonal_mean(matrix: Tensor) -> float | None:
    """The mean over all pairs i != j; None for a single adapter."""
    count = len(matrix)
    return (
        None
        if count < 2
        else float((matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1)))
    )
