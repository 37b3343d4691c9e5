"""Bases: the coordinates in which a method is run by `In(basis, method)`.

A basis maps a Layer to `Frames`; the coordinates of an update D are U^T D V. Sparse rules (TIES, pruning) depend on
the basis they are run in; linear ones (mean, sum) do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sapmerge.layer import Dense, Layer, LowRank, Update
from sapmerge.linalg import numerical_rank, qr, svd
from sapmerge.lowrank import balanced
from sapmerge.recipe import part

__all__ = ["Basis", "CoreSpace", "Frames", "SharedBasis"]


@dataclass(frozen=True)
class Frames:
    """Orthonormal frames U (m, p) and V (n, q) of a coordinate system; None stands for the identity.

    Args:
        U: left frame.
        V: right frame.
        scale: (p,) if given, coordinates are diag(1 / scale) U^T D V.
    """

    U: Tensor | None = None
    V: Tensor | None = None
    scale: Tensor | None = None

    def inside(self, update: Update) -> Update:
        """The coordinates of an update. A low-rank update has low-rank coordinates; an absent one stays absent."""
        left = self.U if self.scale is None or self.U is None else self.U / self.scale
        if isinstance(update, LowRank):
            B = update.B if left is None else left.T @ update.B
            return LowRank(B, update.A if self.V is None else update.A @ self.V)
        matrix = update.dense() if left is None else left.T @ update.dense()
        return Dense(matrix if self.V is None else matrix @ self.V)

    def outside(self, coordinates: Update) -> Update:
        """The update that has these coordinates; low-rank, because the frames are."""
        left = self.U if self.scale is None or self.U is None else self.U * self.scale
        right = None if self.V is None else self.V.T
        if isinstance(coordinates, LowRank):
            B = coordinates.B if left is None else left @ coordinates.B
            return LowRank(B, coordinates.A if right is None else coordinates.A @ right)
        matrix = coordinates.dense()
        if left is not None and (right is None or left.shape[1] <= right.shape[0]):
            return LowRank(left, matrix if right is None else matrix @ right)
        if right is not None:
            return LowRank(matrix if left is None else left @ matrix, right)
        return coordinates


Basis: TypeAlias = Callable[[Layer], Frames]
"""Layer -> the frames of its coordinates; a plain function is a basis too."""


@part
class SharedBasis:
    """KnOTS: the left singular vectors U of [D_1 | ... | D_K] = U S [V_1 | ... | V_K].

    Coordinates are S V_k (p, n), as in the authors' code; with `scaled=False` they are V_k, and S is multiplied back
    afterwards, as in the text of the paper. Singular values below 1e-6 of the largest are dropped (the code cuts at an
    absolute 1e-5, which deletes small adapters).

    Source: Stoica et al., "Model merging with SVD to tie the KnOTS", https://arxiv.org/abs/2410.19735
    """

    scaled: bool = True

    def __call__(self, layer: Layer) -> Frames:
        blocks = [_left_block(update) for update in layer if update.rank > 0]
        if not blocks:
            return Frames()
        U, sigma, _ = svd(torch.cat(blocks, dim=1))
        keep = numerical_rank(sigma)
        if keep == 0:
            return Frames()
        dtype = layer.updates[0].dtype
        return Frames(U=U[:, :keep].to(dtype), scale=None if self.scaled else sigma[:keep].to(dtype))


@part
class CoreSpace:
    """Core space: U from [B_1 | ... | B_K], V from [A_1; ...; A_K]; coordinates are (R, R) with R the sum of the ranks.

    Args:
        balance: put every pair of factors in balanced form first. Sparse rules in the core depend on how a product is
            split into factors (A / 10, 10 B: 86 % apart), which no adapter's author chose on purpose. The published
            numbers were made with `balance=False`.

    Source: Panariello et al., "Accurate and efficient low-rank model merging in core space",
    https://arxiv.org/abs/2509.17786
    """

    balance: bool = True

    def __call__(self, layer: Layer) -> Frames:
        present = [update for update in layer if update.rank > 0]
        if not present:
            return Frames()
        pairs = [update if isinstance(update, LowRank) and not self.balance else balanced(update) for update in present]
        left = svd(torch.cat([pair.B for pair in pairs], dim=1))[0]
        right = svd(torch.cat([pair.A for pair in pairs]))[2]
        return Frames(U=left.to(present[0].dtype), V=right.T.to(present[0].dtype))


def _left_block(update: Update) -> Tensor:
    """(m, r) with the same left singular vectors and values as the update: B R^T for A^T = Q R."""
    if isinstance(update, LowRank):
        return update.B.double() @ qr(update.A.T)[1].T
    return update.dense().double()
