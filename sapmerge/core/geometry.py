"""How the updates of one layer lie to each other: inner products, cosines, signs that conflict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.core.linalg import norm
from sapmerge.core.lowrank import gram, nothing_but_rounding, summed_by_columns
from sapmerge.core.updates import Dense, LowRank, Update

__all__ = [
    "Geometry",
    "SAMPLED_ROWS",
    "geometry",
    "off_diagonal_mean",
    "of_many",
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


def of_many(updates: Sequence[Update], rows: int = SAMPLED_ROWS) -> tuple[float, float]:
    """The mean cosine of all pairs, and the share of opposite signs over all pairs, of updates so
    many that their pairs are not looked at: no (K, K) matrix is formed.

    The cosine from the norm of the sum of the updates, each scaled to norm 1; a zero update has
    cosine 0. Signs are counted on evenly spaced rows, entry by entry: p positive and q negative
    ones are p q opposed pairs.
    """
    count, (m, n) = len(updates), updates[0].shape
    units = [(u, 1 / u.norm()) for u in updates if not nothing_but_rounding(u)]
    low = [(update, scale) for update, scale in units if isinstance(update, LowRank)]
    total = summed_by_columns(low, (m, n)) if low else torch.zeros(m, n, dtype=torch.float64)
    for update, scale in units:
        if isinstance(update, Dense):
            total.add_(update.matrix, alpha=scale)
    cosine = (norm(total) ** 2 - len(units)) / (count * (count - 1))
    looked_at = min(m, rows)
    index = torch.tensor([row * m // looked_at for row in range(looked_at)], device=total.device)
    positive = torch.zeros(looked_at, n, dtype=torch.float64, device=total.device)
    negative = torch.zeros_like(positive)
    for update in updates:
        some = update.rows(index)
        positive += some > 0
        negative += some < 0
    both = positive + negative
    pairs = float((both * (both - 1) / 2).sum())
    opposed = float((positive * negative).sum())
    return max(-1.0, min(1.0, cosine)), opposed / pairs if pairs else 0.0


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
