"""The matrix decompositions that sapmerge uses, on plain tensors: float64 inside, typed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

__all__ = [
    "RTOL",
    "factor_grams",
    "factor_inner",
    "factor_svd",
    "finite",
    "norm",
    "numerical_rank",
    "qr",
    "split_evenly",
    "svd",
    "top_svd",
    "wide",
]

RTOL = 1e-6
"""Singular values below RTOL times the largest one are noise of float32 factors:
no direction to build on.
"""

RESIDUAL = 1e-6
"""When the cut of a dense matrix to its largest singular triplets is good enough: the share of
their energy that may be left as residual. On results of TIES (1024 x 1024 and 4096 x 1024, 4 and 16
adapters, rank 16) the energy kept is then within 3e-7 of the optimum. 1e-10 is within 6e-9, and
takes 1.6 times as long.
"""

_BLOCK = 1 << 18  # entries of which a float64 copy fits into a cache


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64: U (m, k), sigma (k) descending, Vh (k, n)."""
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        torch.linalg.svd(matrix.double(), full_matrices=False),  # pyright: ignore[reportUnknownMemberType]
    )


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR in float64: Q (m, k), R (k, n)."""
    wide = matrix.double()
    factored = _cholesky_qr(wide.T @ wide) if wide.shape[1] <= wide.shape[0] else None
    if factored is not None:
        return wide @ factored[0], factored[1]
    return cast("tuple[Tensor, Tensor]", torch.linalg.qr(wide))  # pyright: ignore[reportUnknownMemberType]


def _cholesky_qr(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """From X^T X the upper triangular T and R with X = (X T) R and orthonormal columns in X T:
    half the time of a QR.

    None where that would not be accurate. With the columns of X scaled to norm 1, X T is
    orthonormal within some 1e-16
    ||R^-1||^2, and a norm (Frobenius's) above 1e3 is refused: below 1e-8 even for 200,000 rows.

    Source: the first pass of Yamamoto et al., "Roundoff error analysis of the CholeskyQR2
    algorithm", ETNA 44 (2015)
    """
    norms = gram.diagonal().sqrt()
    if not bool((norms > 1e-140).all()):  # zero, NaN, or squares that underflow
        return None
    correlations = gram / norms / norms[:, None]
    factored = torch.linalg.cholesky_ex(correlations)  # pyright: ignore
    lower, failed = cast("tuple[Tensor, Tensor]", factored)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = cast("Tensor", torch.linalg.solve_triangular(lower, eye, upper=False))  # pyright: ignore[reportUnknownMemberType]
    if int(failed) or not norm(inverse) < 1e3:  # or NaN
        return None
    return inverse.T / norms[:, None], lower.T * norms


def norm(values: Tensor, p: int = 2) -> float:
    """The p-norm of all entries, accumulated in float64;
    in blocks, so that no float64 copy of a matrix is made.
    """
    flat = values.flatten()
    starts = range(0, max(flat.numel(), 1), _BLOCK)
    return float(
        _norm(torch.stack([_norm(flat[start : start + _BLOCK], p) for start in starts]), p)
    )


def _norm(values: Tensor, p: int) -> Tensor:
    return cast(
        "Tensor",
        torch.linalg.vector_norm(values, ord=p, dtype=torch.float64),  # pyright: ignore[reportUnknownMemberType]
    )


def finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite: a finite sum tells, and where the sum overflows,
    the extrema do.
    """
    values = values.detach()
    if values.numel() == 0 or math.isfinite(float(values.sum())):
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def factor_grams(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B^T B and A A^T, in float64."""
    left, right = B.double(), A.double()
    return left.T @ left, right @ right.T


def factor_svd(
    B: Tensor, A: Tensor, grams: tuple[Tensor, Tensor], rank: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B @ A from two QR decompositions and one small SVD: no (m, n) matrix.

    Args:
        B: (m, r), r <= m.
        A: (r, n), r <= n.
        grams: `factor_grams(B, A)`.
        rank: how many singular vectors are wanted; all of them by default.

    Returns:
        U (m, j), sigma (r), Vh (j, n) with j = min(r, rank), in float64.
    """
    left, Rb = _lazy_qr(B.double(), grams[0])
    right, Ra = _lazy_qr(A.T.double(), grams[1])
    U, sigma, Vh = svd(Rb @ Ra.T)
    return left(U[:, :rank]), sigma, right(Vh[:rank].T).T


def _lazy_qr(matrix: Tensor, gram: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A QR decomposition whose Q is not formed: X -> Q X, and R.
    Half the time where X has few columns.
    """
    factored = _cholesky_qr(gram)
    if factored is not None:
        return (lambda coordinates: matrix @ (factored[0] @ coordinates)), factored[1]
    reflectors, tau = torch.geqrf(matrix)
    size = matrix.shape[1]

    def apply(coordinates: Tensor) -> Tensor:
        below = coordinates.new_zeros(matrix.shape[0] - size, coordinates.shape[1])
        return torch.ormqr(reflectors, tau, torch.cat([coordinates, below]))

    return apply, reflectors[:size].triu()


def split_evenly(U: Tensor, sigma: Tensor, Vh: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """B = U sqrt(sigma) and A = sqrt(sigma) V^T of the first `keep` triplets:
    factors of equal weight.
    """
    root = sigma[:keep].sqrt()
    return U[:, :keep] * root, root[:, None] * Vh[:keep]


def top_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of a dense matrix,
    by block Krylov iteration with a check of its error.

    The iteration stops when the residual ||M v - sigma u|| of the triplets together has less than
    `RESIDUAL` of their energy. A spectrum too flat for that is decomposed in full.

    Args:
        matrix: (m, n).
        rank: how many.

    Returns:
        U (m, k), sigma (k), Vh (k, n), in float64, k = min(rank, m, n).

    Source: Musco and Musco, "Randomized block Krylov methods", https://arxiv.org/abs/1504.05477
    """
    small = min(matrix.shape)
    block = rank + 8
    if small <= 8 * block:
        U, sigma, Vh = svd(matrix)
        return U[:, :rank], sigma[:rank], Vh[:rank]
    peak = max(abs(float(extreme)) for extreme in torch.aminmax(matrix))
    if peak > 1e15:  # squares would overflow
        left, sigma, right = top_svd(matrix / peak, rank)
        return left, sigma * peak, right
    start = torch.randn(matrix.shape[1], block, generator=torch.Generator().manual_seed(0)).to(
        matrix
    )
    basis = _orthonormal(matrix @ start)
    images = (basis.T @ matrix).T
    while basis.shape[1] + block <= small // 3:
        step = matrix @ images[:, -block:]
        size = norm(step)
        step = step - basis @ (basis.T @ step)
        if norm(step) <= 1e-5 * size:  # the basis has all of the matrix: what is left is rounding
            break
        step, outside = qr(step)
        if basis.shape[1] % (2 * block) == 0:
            best = _best_within(matrix, basis, images, rank, outside)
            if best is not None:
                return best
        step = step.to(matrix.dtype)
        step = _orthonormal(step - basis @ (basis.T @ step))  # twice is enough
        basis, images = torch.cat([basis, step], 1), torch.cat([images, (step.T @ matrix).T], 1)
    return _best_within(matrix, basis, images, rank) or _gram_svd(matrix, rank)


def _best_within(
    matrix: Tensor, basis: Tensor, images: Tensor, rank: int, outside: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The largest triplets with U inside a basis, from images = M^T basis;
    None if they are not those of the matrix.

    `outside` is what M M^T takes of the last block out of the basis:
    it tells at little cost that they cannot be.
    """
    seen = images.double()
    squares, vectors = _eigh(seen.T @ seen)
    top = vectors[:, -rank:]
    if outside is not None:
        leaving = (outside @ top[-outside.shape[1] :]).square().sum(0)
        if float(leaving.sum()) > 10 * RESIDUAL * float(squares[-rank:].square().sum()):
            return None
    left, sigma, Vh = svd((seen @ top).T)
    U = basis.double() @ (top @ left)
    # Its rounding is far below the bound.
    residual = (matrix @ Vh.T.to(matrix.dtype)).double() - U * sigma
    close = float(residual.square().sum()) <= RESIDUAL * float(sigma.square().sum())
    return (U, sigma, Vh) if close else None


def _orthonormal(matrix: Tensor) -> Tensor:
    return qr(matrix)[0].to(matrix.dtype)


def _gram_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest triplets from the smaller Gram matrix:
    four times as fast as an SVD, exact down to 1e-8 sigma_1.
    """
    if matrix.shape[0] < matrix.shape[1]:
        right, sigma, left = _gram_svd(matrix.T, rank)
        return left.T, sigma, right.T
    wide = matrix.double()
    V = _eigh(wide.T @ wide)[1][:, -rank:].flip(1)
    image = wide @ V
    sigma = image.square().sum(0).sqrt()
    return image / torch.where(sigma > 0, sigma, 1.0), sigma, V.T


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", torch.linalg.eigh(symmetric))  # pyright: ignore[reportUnknownMemberType]


def factor_inner(Bx: Tensor, Ax: Tensor, By: Tensor, Ay: Tensor) -> float:
    """<Bx Ax, By Ay> in float64: by Gram matrices of the factors,
    or by the products where those are smaller.
    """
    wide_a, wide_b = Ax.double(), Bx.double()
    other_a = wide_a if Ay is Ax else Ay.double()
    other_b = wide_b if By is Bx else By.double()
    if Ax.shape[0] * Ay.shape[0] > Bx.shape[0] * Ax.shape[1]:
        return float(torch.dot((wide_b @ wide_a).flatten(), (other_b @ other_a).flatten()))
    return float(torch.dot((wide_a @ other_a.T).flatten(), (wide_b.T @ other_b).flatten()))


def numerical_rank(sigma: Tensor, rtol: float = RTOL) -> int:
    """How many of the descending singular values exceed rtol times the largest;
    0 for a zero matrix.
    """
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    return int((sigma > rtol * sigma[0]).sum())


def wide(tensor: Tensor) -> Tensor:
    """float32, or float64 where it is that already:
    half-precision gradients are never summed as they are.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
