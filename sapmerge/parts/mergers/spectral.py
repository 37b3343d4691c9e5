"""Merging by singular vectors: Decorrelate (TSV), Isotropic (Iso-C),
IsotropicCommonSpecific (Iso-CTS), CART.

On low-rank updates they run on the cores (see `cores`):
exact, in float64, and no (m, n) matrix is made.

A low-rank sum has a null space. Its singular vectors are arbitrary (the authors' codes, which use
them, give answers 40 to 120 % apart in float32 and float64), so they are dropped: singular values
below `linalg.RTOL` of the largest do not count.
An adapter that is zero, absent or of weight zero does not count among the K that share
min(m, n) directions.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.core_space import (
    check_fraction,
    check_rank,
    components,
    cores_of,
    in_form_of,
    nonzero,
    polar,
    rank_of,
)
from sapmerge.core.layer import Layer
from sapmerge.core.linalg import RTOL, norm, svd
from sapmerge.core.lowrank import size_of
from sapmerge.core.part import part, prepare
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.updates import Update, zero_of
from sapmerge.errors import LimitExceededError, MethodError
from sapmerge.parts.mergers.linear import Sum, total_weight

__all__ = ["CART", "Decorrelate", "Isotropic", "IsotropicCommonSpecific"]


@part
class Isotropic:
    """Give every direction of a method's result the mean singular value:
    X = U S V^T becomes mean(S) U V^T.

    Alone it is Iso-C, the sum made isotropic; around another method it is the "+ isotropize" of the
    core-space code. Only the directions of X are kept, so the result has the rank of X.

    Args:
        method: any method.
        over: what the mean runs over. "rank": the rank(X) directions that X has; the sum of the
            singular values stays what it is. "full": all min(m, n), zeros included, as the authors'
            code, which also gives the mean to min(m, n) - rank(X) arbitrary directions of the null
            space. full = rank(X) / min(m, n) * rank, so a scale tuned for one is not one for the
            other; they agree where X has full rank.

    Example:
        >>> import torch, sapmerge as sm
        >>> layer = sm.Layer("l", (sm.Dense(torch.diag(torch.tensor([3.0, 1.0]))),))
        >>> bool(torch.allclose(sm.Isotropic()(layer).dense(), 2 * torch.eye(2)))
        True

    Source: Marczak et al., "No task left behind", https://arxiv.org/abs/2502.04959
    """

    method: Method = Sum()
    over: Literal["rank", "full"] = "rank"

    def prepare(self, layers: LayerStream) -> Isotropic:
        return replace(self, method=prepare(self.method, layers))

    def __call__(self, layer: Layer) -> Update:
        merged = self.method(layer)
        U, sigma, Vh = merged.svd()
        keep = rank_of(sigma, size_of(merged))
        count = min(merged.shape) if self.over == "full" else max(keep, 1)
        return in_form_of(U[:, :keep] * (sigma[:keep].sum() / count), Vh[:keep], merged)


CROWD = 64
"""So many adapters may share a small layer's directions; more are a federation, which is refused
where they cannot.
"""


@part
class Decorrelate:
    """Make the singular vectors of all adapters orthogonal to each other, at the least change:
    the heart of TSV-M.

    D_k ~ U_k S_k V_k^T, cut to its first floor(min(m, n) / K) components and to its rank. With
    [P_1 | ... | P_K] the polar factor of [U_1 | ... | U_K], and Q_k likewise of the V_k, D_k
    becomes P_k S_k Q_k^T. `Sum` then makes TSV-M.

    Directions that several adapters share exactly are shared out (a polar factor is not unique
    there; the part outside the span is dropped), so K copies of an adapter become D / K each.
    Components whose singular values equal the last one kept (within 1e-5) are kept with it.

    Args:
        rank: components per adapter instead of floor(min(m, n) / K), which is at least 1: more than
            64 adapters and more than min(m, n) are refused.
        strength: how far to go, in [0, 1]: with X = [U_1 | ... | U_K] the P_k are blocks of X (X^T
            X)^(-strength / 2). 0 leaves the vectors as they are; halfway K copies of an adapter
            become D / sqrt(K) each. Below 1 nothing has to be orthogonal,
            so all components fit and are kept, unless there is a `rank`.

    Returns:
        A layer of low-rank updates (dense where they were) with at most that many components each.

    Source: Gargiulo et al., "Task Singular Vectors", https://arxiv.org/abs/2412.00081
    """

    rank: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_rank("Decorrelate", self.rank)
        check_fraction("Decorrelate's strength", self.strength)

    def check_count(self, name: str, shape: tuple[int, int], count: int) -> None:
        """Whether a layer has a direction for each of so many adapters.

        Raises:
            LimitExceededError: it has not.
        """
        room = min(shape)
        if count > max(room, CROWD) and self.rank is None and self.strength == 1:
            raise LimitExceededError(
                f"Decorrelate: layer {name!r} {shape} has {room} orthogonal directions, fewer than "
                f"one for each of {count} adapters; merge groups of at most {room // 2}, or use a "
                "method that is a sum (mean, iso_c)"
            )

    def __call__(self, layer: Layer) -> Layer:
        self.check_count(layer.name, layer.shape, sum(layer.present))
        core = cores_of(layer)
        updates: list[Update] = [zero_of(update) for update in layer]
        rank = min(layer.shape) if self.rank is None and self.strength < 1 else self.rank
        pieces = components(core, layer, rank)
        if pieces:
            left = polar(torch.cat([piece.U for piece in pieces], dim=1), self.strength)
            right = polar(torch.cat([piece.Vh for piece in pieces]).T, self.strength).T
            start = 0
            for piece in pieces:
                columns = slice(start, start + len(piece.sigma))
                updates[piece.adapter] = core.outside(
                    left[:, columns] * piece.sigma, right[columns], piece.adapter
                )
                start = columns.stop
        return layer.with_updates(updates)


@part
class IsotropicCommonSpecific:
    """Iso-CTS: an isotropic result on the common directions of the sum and a few specific ones
    of every adapter.

    X = sum_k w_k D_k has r directions. The last ones make room for t = round((r - int(f r)) / K)
    per adapter: U_c are the first r - t K left singular vectors of X, and each adapter adds the
    first t components of D_k - U_c U_c^T D_k. With U, V,
    S all of these together the result is mean(S) polar(U) polar(V)^T, of rank at most r.

    Args:
        common_fraction: f, in [0, 1]; 1 is `Isotropic()`.
        over: r, and what the mean runs over. "rank": the numerical rank of X; "full": min(m, n), as
            the authors' code, of which the directions that X and the adapters do not have are
            dropped. See `Isotropic`.

    Source: Marczak et al., "No task left behind", https://arxiv.org/abs/2502.04959. As in the code,
    only the left side is projected; where the code would ask for more directions than there are,
    t is floor(r / K).
    """

    common_fraction: float = 0.8
    over: Literal["rank", "full"] = "rank"

    def __post_init__(self) -> None:
        check_fraction("common_fraction", self.common_fraction)

    def __call__(self, layer: Layer) -> Update:
        core = cores_of(layer)
        active = [
            k
            for k, M in enumerate(core.cores)
            if layer.weights[k] != 0 and nonzero(M, core.sizes[k])
        ]
        weighted = {k: core.cores[k] * layer.weights[k] for k in active}
        if not active:
            return zero_of(layer.updates[0])
        U, sigma, Vh = svd(torch.stack(list(weighted.values())).sum(0))
        rank = rank_of(sigma, sum(abs(layer.weights[k]) * core.sizes[k] for k in active))
        total = min(layer.shape) if self.over == "full" else rank
        room = round((total - int(total * self.common_fraction)) / len(active))
        specific = min(room, total // len(active))
        common = min(total - specific * len(active), rank)
        lefts, sigmas, rights = list[Tensor](), list[Tensor](), list[Tensor]()
        for k in active:
            U_k, sigma_k, Vh_k = svd(weighted[k] - U[:, :common] @ (U[:, :common].T @ weighted[k]))
            own = min(specific, int((sigma_k > RTOL * norm(weighted[k])).sum()))
            lefts.append(U_k[:, :own])
            sigmas.append(sigma_k[:own])
            rights.append(Vh_k[:own])
        stacked = torch.cat([*sigmas, sigma[:common]])
        if len(stacked) == 0:
            return zero_of(layer.updates[0])
        left = polar(torch.cat([*lefts, U[:, :common]], dim=1))
        right = polar(torch.cat([*rights, Vh[:common]]).T).T
        count = total if self.over == "full" else len(stacked)
        return core.outside(left * (stacked.sum() / count), right)


@part
class CART:
    """The mean, plus the main components of what every adapter adds to it:
    D0 + scale sum_k low_rank(D_k - D0).

    D0 = sum w D / sum w, and low_rank keeps the first ceil(rank_fraction min(m, n)) components; in
    a core space min(m, n) is the side of the core. With weights the sum runs over K w_k / sum w. A
    zero adapter counts, as in `Mean`. The result has the rank of all updates together.

    Args:
        rank_fraction: in [0, 1].
        scale: of the sum; any number.

    Raises:
        MethodError: the weights sum to zero.

    Source: Choi et al., "Revisiting weight averaging for model merging",
    https://arxiv.org/abs/2412.12153
    """

    rank_fraction: float = 0.04
    scale: float = 0.1

    def __post_init__(self) -> None:
        check_fraction("rank_fraction", self.rank_fraction)
        if not math.isfinite(self.scale):
            raise MethodError(f"CART's scale is a number; got {self.scale!r}")

    def __call__(self, layer: Layer) -> Update:
        members = [k for k, weight in enumerate(layer.weights) if weight != 0]
        total = total_weight(layer, " to add to")
        core = cores_of(layer)
        if not core.sizes or not any(core.sizes):
            return zero_of(layer.updates[0])
        centre = torch.stack([core.cores[k] * (layer.weights[k] / total) for k in members]).sum(0)
        keep = math.ceil(self.rank_fraction * min(layer.shape) - 1e-9)
        merged = centre
        for k in members:
            U, sigma, Vh = svd(core.cores[k] - centre)
            share = self.scale * len(members) * layer.weights[k] / total
            merged = merged + share * (U[:, :keep] * sigma[:keep]) @ Vh[:keep]
        eye = torch.eye(min(merged.shape), dtype=merged.dtype, device=merged.device)
        return core.outside(
            *((eye, merged) if merged.shape[0] <= merged.shape[1] else (merged, eye))
        )
