"""The matrix decompositions that sapmerge uses, on plain tensors: float64 inside, typed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

__all__ = ["RTOL", "factor_inner", "factor_svd", "norm", "numerical_rank", "qr", "svd"]

RTOL = 1e-6
"""Singular values below RTOL times the largest one are noise of float32 factors: no direction to build on."""


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64: U (m, k), sigma (k) descending, Vh (k, n)."""
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        torch.linalg.svd(matrix.double(), full_matrices=False),  # pyright: ignore[reportUnknownMemberType]
    )


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR in float64: Q (m, k), R (k, n)."""
    return cast("tuple[Tensor, Tensor]", torch.linalg.qr(matrix.double()))  # pyright: ignore[reportUnknownMemberType]


def norm(values: Tensor, p: int = 2) -> float:
    """The p-norm of all entries, accumulated in float64."""
    return float(
        cast(
            "Tensor",
            torch.linalg.vector_norm(values, ord=p, dtype=torch.float64),  # pyright: ignore[reportUnknownMemberType]
        )
    )


def factor_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B @ A from two QR decompositions and one small SVD: no (m, n) matrix.

    Args:
        B: (m, r).
        A: (r, n).

    Returns:
        U (m, k), sigma (k), Vh (k, n) with k = min(m, r, n), in float64.
    """
    Qb, Rb = qr(B)
    Qa, Ra = qr(A.T)
    U, sigma, Vh = svd(Rb @ Ra.T)
    return Qb @ U, sigma, Vh @ Qa.T


def factor_inner(Bx: Tensor, Ax: Tensor, By: Tensor, Ay: Tensor) -> float:
    """<Bx Ax, By Ay> from the Gram matrices of the factors, in float64."""
    return float(((Ax.double() @ Ay.double().T) * (Bx.double().T @ By.double())).sum())


def numerical_rank(sigma: Tensor, rtol: float = RTOL) -> int:
    """How many of the descending singular values exceed rtol times the largest; 0 for a zero matrix."""
    if sigma.numel() == 0 or float(sigma[0]) == 0.0:
        return 0
    return int((sigma > rtol * sigma[0]).sum())
