"""Coordinate systems: orthonormal frames in which updates are written."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sapmerge.core.updates import Dense, LowRank, Update

__all__ = ["Frames"]


@dataclass(frozen=True)
class Frames:
    """Orthonormal frames U (m, p) and V (n, q) of a coordinate system;
    None stands for the identity.

    Args:
        U: left frame.
        V: right frame.
        scale: (p,) if given, coordinates are diag(1 / scale) U^T D V.
    """

    U: Tensor | None = None
    V: Tensor | None = None
    scale: Tensor | None = None

    def inside(self, update: Update) -> Update:
        """The coordinates of an update. A low-rank update has low-rank coordinates;
        an absent one stays absent.
        """
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
