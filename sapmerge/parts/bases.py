"""Bases: the coordinates in which a method is run by `In(basis, method)`.

A basis maps a Layer to `Frames`; the coordinates of an update D are U^T D V. Sparse rules (TIES,
pruning) depend on the basis they are run in; linear ones (mean, sum) do not. An adapter of weight 0
has no say in the coordinates, as it has none in the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapmerge.core.core_space import check_fraction, check_rank, cores_of, nonzero
from sapmerge.core.frames import Frames
from sapmerge.core.layer import Layer
from sapmerge.core.linalg import RTOL, norm, numerical_rank, qr, svd
from sapmerge.core.part import part
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import MethodError

__all__ = ["CoreSpace", "SharedBasis", "TuckerSpace"]


@part
class SharedBasis:
    """KnOTS: the left singular vectors U of [D_1 | ... | D_K] = U S [V_1 | ... | V_K].

    Coordinates are S V_k (p, n), as in the authors' code; with `scaled=False` they are V_k, and S
    is multiplied back afterwards, as in the text of the paper. Singular values below 1e-6 of the
    largest are dropped (the code cuts at an absolute 1e-5, which deletes small adapters).

    Source: Stoica et al., "Model merging with SVD to tie the KnOTS",
    https://arxiv.org/abs/2410.19735
    """

    scaled: bool = True

    def __call__(self, layer: Layer) -> Frames:
        blocks = [_left_block(layer.updates[k]) for k in _counted(layer)]
        if not blocks:
            return Frames()
        U, sigma, _ = svd(torch.cat(blocks, dim=1))
        keep = numerical_rank(sigma)
        if keep == 0:
            return Frames()
        dtype = layer.updates[0].dtype
        return Frames(
            U=U[:, :keep].to(dtype), scale=None if self.scaled else sigma[:keep].to(dtype)
        )


@part
class CoreSpace:
    """Core space: U from [B_1 | ... | B_K], V from [A_1; ...; A_K];
    coordinates are (R, R) with R the sum of the ranks.

    Args:
        balance: put every pair of factors in balanced form first. Sparse rules in the core depend
            on how a product is split into factors (A / 10, 10 B: 86 % apart), which no adapter's
            author chose on purpose. The published numbers were made with `balance=False`.

    Source: Panariello et al., "Accurate and efficient low-rank model merging in core space",
    https://arxiv.org/abs/2509.17786
    """

    balance: bool = True

    def __call__(self, layer: Layer) -> Frames:
        present = [layer.updates[k] for k in _counted(layer)]
        if not present:
            return Frames()
        pairs = [
            update if isinstance(update, LowRank) and not self.balance else update.balanced
            for update in present
        ]
        left = svd(torch.cat([pair.B for pair in pairs], dim=1))[0]
        right = svd(torch.cat([pair.A for pair in pairs]))[2]
        return Frames(U=left.to(present[0].dtype), V=right.T.to(present[0].dtype))


def _counted(layer: Layer) -> list[int]:
    """Whose updates the coordinates are made for; all of them where no weight counts."""
    there = [k for k, update in enumerate(layer) if not update.absent]
    return [k for k in there if layer.weights[k] != 0] or there


def _left_block(update: Update) -> Tensor:
    """(m, r) with the same left singular vectors and values as the update: B R^T for A^T = Q R."""
    if isinstance(update, LowRank):
        return update.B.double() @ qr(update.A.T)[1].T
    return update.dense().double()


@part
class TuckerSpace:
    """The r directions on either side that hold most of all adapters at once:
    the subspaces of Compress-then-Merge.

    U (m, r) and V (n, r) maximise sum_k ||U^T D_k V||^2 (partial Tucker decomposition of the
    stacked updates). They start at the singular vectors of [D_1 | ... | D_K] and of
    [D_1; ...; D_K]; then U is the first r left singular vectors of [D_1 V | ... | D_K V], and
    V those of [U^T D_1; ...; U^T D_K], again and again. `In(TuckerSpace(r), method)` has rank r
    at most.

    Args:
        rank: r; by default the largest rank of an update in the layer.
        beta: the stacked updates have norm beta ||D_k|| + (1 - beta) mean ||D||; 0 (the authors'
            default) counts every adapter alike. The coordinates are those of the updates
            themselves.
        tolerance: stop when a round changes the relative error by less. The authors' code stops at
            1e-6, when the third or fourth digit of the subspaces still moves; the default goes on
            until they have settled.
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
            raise MethodError(
                f"TuckerSpace takes rounds >= 3 and tolerance >= 0; got {self.rounds}, "
                f"{self.tolerance}"
            )

    def __call__(self, layer: Layer) -> Frames:
        core = cores_of(layer)
        present = [k for k in _counted(layer) if nonzero(core.cores[k], core.sizes[k])]
        if not present:
            return Frames()
        norms = [norm(core.cores[k]) for k in present]
        mean = sum(norms) / len(norms)
        scales = [self.beta + (1 - self.beta) * mean / size for size in norms]
        stack = torch.stack(
            [core.cores[k] * scale for k, scale in zip(present, scales, strict=True)]
        )
        rank = max(layer.updates[k].rank for k in present) if self.rank is None else self.rank
        left, right = self._settle(stack, rank)
        dtype = layer.updates[0].dtype
        left = left if core.U is None else core.U @ left
        right = right if core.V is None else core.V @ right
        return Frames(U=left.to(dtype), V=right.to(dtype))

    def _settle(self, stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The subspaces of a stack (K, p, q): alternating rounds from the singular vectors of its
        two unfoldings.
        """
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
