"""All updates of a layer in common orthonormal frames:
D_k = U M_k V^T, with small cores M_k in float64.

From QR decompositions of the stacked factors, so exact and without an (m, n) matrix; a core has the
sum of the ranks on a side. Rules made of singular values commute with orthogonal changes of basis
and are run on the cores (`spectral`, `subspaces`).
What they share is here, the rank cut above all: a direction of the null space is arbitrary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import RTOL, norm, qr, svd
from sapmerge.core.lowrank import size_of
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import MethodError

__all__ = [
    "Cores",
    "Piece",
    "check_fraction",
    "check_rank",
    "components",
    "cores_of",
    "in_form_of",
    "nonzero",
    "polar",
    "rank_of",
]

POLAR_RTOL = 1e-5
"""Stacked singular vectors that are closer than this are the same direction. Wider than RTOL: a
direction of relative size s carries the noise of float32 factors divided by s."""

TIED = 1e-5
"""Singular values this close, relatively, are equal:
float32 factors do not tell their vectors apart.
"""

CANCELLED = 1e-13
"""A singular value this small beside the rank-one terms that it is a sum of is their
rounding error.
"""


@dataclass(frozen=True)
class Cores:
    """All updates in common orthonormal frames: D_k = U M_k V^T;
    no frames where one of them is dense.
    """

    U: Tensor | None
    V: Tensor | None
    cores: Sequence[Tensor]
    sizes: Sequence[float]
    updates: Sequence[Update]

    def outside(self, left: Tensor, right: Tensor, adapter: int | None = None) -> Update:
        """U left right V^T, in the form and dtype of an adapter's update (default: dense if
        any of them is).
        """
        if adapter is None:
            adapter = next(
                (k for k, update in enumerate(self.updates) if isinstance(update, Dense)), 0
            )
        left = left if self.U is None else self.U @ left
        return in_form_of(
            left, right if self.V is None else right @ self.V.T, self.updates[adapter]
        )


@dataclass(frozen=True)
class Piece:
    """The leading components of one adapter, in the core: U (p, k), sigma (k), Vh (k, q)."""

    adapter: int
    U: Tensor
    sigma: Tensor
    Vh: Tensor


def cores_of(layer: Layer) -> Cores:
    """The cores of all updates of a layer, without the weights;
    of dense ones, if any is dense, the matrices.
    """
    sizes = [size_of(update) for update in layer]
    low = [update for update in layer if isinstance(update, LowRank)]
    if len(low) < len(layer):
        return Cores(
            None, None, [update.dense().double() for update in layer], sizes, layer.updates
        )
    ranks = [update.rank for update in low]
    Qb, Rb = qr(torch.cat([update.B for update in low], dim=1))
    Qa, Ra = qr(torch.cat([update.A for update in low]).T)
    ends = list(accumulate(ranks))
    spans = [slice(end - rank, end) for rank, end in zip(ranks, ends, strict=True)]
    return Cores(Qb, Qa, [Rb[:, span] @ Ra[:, span].T for span in spans], sizes, layer.updates)


def components(core: Cores, layer: Layer, rank: int | None) -> list[Piece]:
    """What every adapter that counts may bring: `rank` of its components, or its
    share of min(m, n).

    Components whose singular values equal the last of these within TIED come too:
    to choose among them is arbitrary.
    """
    pieces: list[Piece] = []
    for k, M in enumerate(core.cores):
        if layer.weights[k] != 0 and core.sizes[k] > 0:
            U, sigma, Vh = svd(M)
            keep = rank_of(sigma, core.sizes[k])
            if keep:
                pieces.append(Piece(k, U[:, :keep], sigma[:keep], Vh[:keep]))
    limit = max(1, min(layer.shape) // max(len(pieces), 1)) if rank is None else rank
    kept: list[Piece] = []
    for piece in pieces:
        cut = piece.sigma[min(limit, len(piece.sigma)) - 1]
        keep = int((piece.sigma >= cut * (1 - TIED)).sum())
        kept.append(Piece(piece.adapter, piece.U[:, :keep], piece.sigma[:keep], piece.Vh[:keep]))
    return kept


def polar(matrix: Tensor, strength: float = 1.0) -> Tensor:
    """The nearest matrix with orthonormal columns;
    on the span of the columns where they are dependent.

    A strength below 1 goes only that far: X (X^T X)^(-strength / 2).
    """
    U, sigma, Vh = svd(matrix)
    keep = int((sigma > POLAR_RTOL * sigma[0]).sum())
    return (U[:, :keep] * sigma[:keep] ** (1 - strength)) @ Vh[:keep]


def rank_of(sigma: Tensor, size: float) -> int:
    """The numerical rank; 0 where nothing but rounding is left of a sum of that size."""
    if sigma.numel() == 0:
        return 0
    return int((sigma > max(RTOL * float(sigma[0]), CANCELLED * size)).sum())


def nonzero(matrix: Tensor, size: float) -> bool:
    """Whether more than rounding is left of a sum of that size."""
    return norm(matrix) > CANCELLED * size


def in_form_of(left: Tensor, right: Tensor, like: Update) -> Update:
    """left @ right, dense if `like` is, in its dtype."""
    if isinstance(like, Dense):
        return Dense((left @ right).to(like.dtype))
    return LowRank(left.to(like.dtype), right.to(like.dtype))


def check_rank(owner: str, rank: int | None) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(f"{owner}'s rank is an int of at least 1, or None; got {rank!r}")


def check_fraction(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(f"{name} is in [0, 1]; got {value!r}")
