"""Subspaces made for all adapters at once: the cover space of DC-Merge and the Tucker
subspaces of CtM.

Both are found on the cores of the updates (see `cores`), in float64;
no (m, n) matrix is made for low-rank updates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sapmerge.core.core_space import check_rank, components, cores_of, polar
from sapmerge.core.frames import Frames
from sapmerge.core.layer import Layer
from sapmerge.core.part import part, prepare
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import Mapped
from sapmerge.core.updates import Dense, LowRank, Update, absent, zero_of

__all__ = ["InCoverSpace"]


@part
class InCoverSpace:
    """Run a method in the cover space of DC-Merge and keep, of its result,
    what stays within one adapter's block.

    The frames are the polar factors of the stacked singular vectors, as in `Decorrelate`: each
    adapter owns a block of coordinates, in which its update is nearly diagonal.
    The method sees P^T D_k Q of the updates cut as there.

    Args:
        method: any method.
        rank: components per adapter; floor(min(m, n) / K), at least 1, by default.

    Returns:
        An update of rank at most the number of all components.

    Source: see `sapmerge.dc_merge`.
    """

    method: Method
    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank("InCoverSpace", self.rank)

    def prepare(self, layers: LayerStream) -> InCoverSpace:
        inside = Mapped(layers, lambda layer: self._inside(layer)[2], layers.anchors)
        return replace(self, method=prepare(self.method, inside))

    def __call__(self, layer: Layer) -> Update:
        frames, owner, inside = self._inside(layer)
        if frames.U is None:
            return zero_of(layer.updates[0])
        merged = self.method(inside).dense()
        outer = frames.outside(Dense(merged * (owner[:, None] == owner[None, :])))
        return outer.to(dtype=layer.updates[0].dtype)

    def _inside(self, layer: Layer) -> tuple[Frames, Tensor, Layer]:
        core = cores_of(layer)
        pieces = components(core, layer, self.rank)
        if not pieces:
            return Frames(), torch.zeros(0), layer
        left = polar(torch.cat([piece.U for piece in pieces], dim=1))
        right = polar(torch.cat([piece.Vh for piece in pieces]).T)
        size = left.shape[1]
        updates: list[Update] = [absent((size, size), left) for _ in layer]
        for piece in pieces:
            updates[piece.adapter] = LowRank(left.T @ (piece.U * piece.sigma), piece.Vh @ right)
        owner = torch.cat([torch.full((len(piece.sigma),), piece.adapter) for piece in pieces]).to(
            left.device
        )
        frames = Frames(
            U=left if core.U is None else core.U @ left,
            V=right if core.V is None else core.V @ right,
        )
        return frames, owner, layer.inside(frames, updates)
