"""Compress-then-Merge: an adapter of rank r by construction."""

from __future__ import annotations

from sapmerge.core.protocols import Method
from sapmerge.methods.pruning import ties
from sapmerge.parts.bases import TuckerSpace
from sapmerge.parts.wrappers import In

__all__ = ["ctm"]


def ctm(rank: int | None = None, inner: Method | None = None, beta: float = 0.0) -> Method:
    """CtM: project all updates on the r directions that they share best,
    and merge the r x r coordinates.

    D = U merged(U^T D_1 V, ..., U^T D_K V) V^T with the subspaces of `TuckerSpace`.

    Args:
        rank: r, the rank of the result at most; by default the largest rank of an update in the
            layer.
        inner: how the coordinates are merged, `ties()` by default (the paper's best is DARE-TIES).
        beta: see `TuckerSpace`; 0 lets every adapter shape the subspaces alike, whatever its norm.

    With K = 1 nothing is lost; with more adapters than fit into r directions, what lies outside is
    lost, and is not given back. Adapters that are zero or absent do not shape the subspaces.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.ctm())

    Source: "Compress then merge" (ICML 2026), https://github.com/ZhengbaoHe/compress-then-merge.
    The code stops its iteration early, at a change of 1e-6 of the error; ours goes on until the
    subspaces have settled (0.4 % apart on small random adapters).
    """
    return In(TuckerSpace(rank, beta), ties() if inner is None else inner)
