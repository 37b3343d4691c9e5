"""Subspaces made for all adapters at once: the cover space of DC-Merge and the Tucker subspaces of CtM.

Both are found on the cores of the updates (see `cores`), in float64; no (m, n) matrix is made for low-rank updates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sapmerge.bases import Frames
from sapmerge.compose import Mapped, prepare
from sapmerge.cores import (
    check_fraction,
    check_rank,
    components,
    cores_of,
    in_form_of,
    nonzero,
    polar,
    rank_of,
    size_of,
)
from sapmerge.errors import MethodError
from sapmerge.layer import Dense, Layer, LayerStream, LowRank, Method, Update, absent, zero_of
from sapmerge.linalg import RTOL, norm, svd
from sapmerge.masks import check_density, count_kept
from sapmerge.recipe import part

__all__ = ["InCoverSpace", "RoundOff", "SmoothSpectrum", "TopWithTies", "TuckerSpace"]


@part
class InCoverSpace:
    """Run a method in the cover space of DC-Merge and keep, of its result, what stays within one adapter's block.

    The frames are the polar factors of the stacked singular vectors, as in `Decorrelate`: each adapter owns a block of
    coordinates, in which its update is nearly diagonal. The method sees P^T D_k Q of the updates cut as there.

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
        return replace(self, method=prepare(self.method, Mapped(layers, lambda layer: self._inside(layer)[2])))

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
        owner = torch.cat([torch.full((len(piece.sigma),), piece.adapter) for piece in pieces]).to(left.device)
        frames = Frames(U=left if core.U is None else core.U @ left, V=right if core.V is None else core.V @ right)
        return frames, owner, replace(layer, updates=tuple(updates), frames=(*layer.frames, frames))


@part
class SmoothSpectrum:
    """Even out the singular values of every update and keep their sum: the energy smoothing of DC-Merge.

    Args:
        smoothing: "avg": all equal; "linear": falling in equal steps from rho to 1, rho = min(ratio, s_1 / s_r).
        ratio: the largest ratio of the first to the last singular value, for "linear"; at least 1.

    Source: see `sapmerge.dc_merge`.
    """

    smoothing: str = "avg"
    ratio: float = 5.0

    def __post_init__(self) -> None:
        if self.smoothing not in ("avg", "linear"):
            raise MethodError(f"smoothing is 'avg' or 'linear'; got {self.smoothing!r}")
        if not self.ratio >= 1:
            raise MethodError(f"ratio is at least 1; got {self.ratio!r}")

    def __call__(self, layer: Layer) -> Layer:
        return layer.with_updates([self._smooth(update) for update in layer])

    def _smooth(self, update: Update) -> Update:
        U, sigma, Vh = update.svd()
        keep = rank_of(sigma, size_of(update))
        if keep == 0:
            return zero_of(update)
        top = 1.0 if self.smoothing == "avg" else min(self.ratio, float(sigma[0] / sigma[keep - 1]))
        share = torch.linspace(top, 1.0, keep, dtype=sigma.dtype, device=sigma.device)
        return in_form_of(U[:, :keep] * (share * (sigma[:keep].sum() / share.sum())), Vh[:keep], update)


@part
class RoundOff:
    """Round all entries to multiples of 2^-34 of the largest entry of the layer, so that what is opposite cancels.

    Before a sign election in coordinates that were computed: the sum of opposites is else their rounding error, and the
    election follows its sign.
    """

    def __call__(self, layer: Layer) -> Layer:
        entries = {k: update.dense() for k, update in enumerate(layer) if update.rank}
        step = max((float(matrix.abs().max()) for matrix in entries.values()), default=0.0) * 2.0**-34
        if step == 0:
            return layer
        rounded = {k: Dense(torch.round(matrix / step) * step) for k, matrix in entries.items()}
        return layer.with_updates([rounded.get(k, update) for k, update in enumerate(layer)])


@part
class TopWithTies:
    """Keep the `density` share of highest scores, and every score that equals the lowest of them within 1e-5.

    `TopFraction` picks among equal scores by position. In coordinates that a method has made equal (a smoothed spectrum
    has equal singular values) such a pick would be decided by rounding.

    Args:
        density: the fraction kept, in (0, 1]; at least one score.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.numel() == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        cut = torch.topk(scores.flatten(), count_kept(self.density, scores.numel())).values[-1]
        return scores >= cut - 1e-5 * cut.abs()


@part
class TuckerSpace:
    """The r directions on either side that hold most of all adapters at once: the subspaces of Compress-then-Merge.

    U (m, r) and V (n, r) maximise sum_k ||U^T D_k V||^2 (partial Tucker decomposition of the stacked updates): from the
    singular vectors of [D_1 | ... | D_K] and of [D_1; ...; D_K], U is the first r left singular vectors of [D_1 V | ...
    | D_K V], then V of [U^T D_1; ...; U^T D_K], again and again. `In(TuckerSpace(r), method)` has rank r at most.

    Args:
        rank: r; by default the largest rank of an update in the layer.
        beta: the stacked updates have norm beta ||D_k|| + (1 - beta) mean ||D||; 0 (the authors' default) counts every
            adapter alike. The coordinates are those of the updates themselves.
        tolerance: stop when a round changes the relative error by less. The authors' code stops at 1e-6, when the third
            or fourth digit of the subspaces still moves; the default goes on until they have settled.
        rounds: at most so many, at least three.

    Source: see `sapmerge.contrib.ctm`.
    """

    rank: int | None = None
    beta: float = 0.0
    tolerance: float = 1e-12
    rounds: int = 1000

    def __post_init__(self) -> None:
        check_rank("TuckerSpace", self.rank)
        check_fraction("beta", self.beta)
        if self.rounds < 3 or not self.tolerance >= 0:
            raise MethodError(f"TuckerSpace takes rounds >= 3 and tolerance >= 0; got {self.rounds}, {self.tolerance}")

    def __call__(self, layer: Layer) -> Frames:
        core = cores_of(layer)
        present = [k for k, M in enumerate(core.cores) if nonzero(M, core.sizes[k])]
        if not present:
            return Frames()
        norms = [norm(core.cores[k]) for k in present]
        mean = sum(norms) / len(norms)
        scales = [self.beta + (1 - self.beta) * mean / size for size in norms]
        stack = torch.stack([core.cores[k] * scale for k, scale in zip(present, scales, strict=True)])
        rank = max(layer.updates[k].rank for k in present) if self.rank is None else self.rank
        left, right = self._settle(stack, rank)
        dtype = layer.updates[0].dtype
        left = left if core.U is None else core.U @ left
        right = right if core.V is None else core.V @ right
        return Frames(U=left.to(dtype), V=right.to(dtype))

    def _settle(self, stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The subspaces of a stack (K, p, q): alternating rounds from the singular vectors of its two unfoldings."""
        left, right = _leading(stack, rank), _leading(stack.mT, rank)
        total, energies = norm(stack) ** 2, list[float]()
        for _ in range(self.rounds):
            left = _leading(stack @ right, rank)
            right = _leading((left.T @ stack).mT, rank)
            energies.append(min(norm(left.T @ stack @ right) ** 2 / total, 1.0))
            if len(energies) > 2:
                before, now = energies[-2:]
                change = abs((1 - before) ** 0.5 - (1 - now) ** 0.5)
                if change < self.tolerance or abs(now - before) < ROUNDING:
                    break
        return left, right


ROUNDING = 1e-15
"""A change of a share of energy that is rounding error only."""


def _leading(stack: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of [X_1 | ... | X_K], for a stack (K, p, q)."""
    U, sigma, _ = svd(stack.transpose(0, 1).flatten(1))
    return U[:, : min(rank, max(1, int((sigma > RTOL * sigma[0]).sum())))]
