"""A layer in three numbers, and how alike two of them are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["signature", "tfi", "tos"]


def signature(sigma: Tensor, distance: float, scale: float | None = None) -> Tensor:
    """psi = (sum p s, -sum p log p, d), p = softmax(s / scale): a layer in three numbers.

    The three have different units: standardise each over layers before signatures are compared.

    Args:
        sigma: singular values, the largest first.
        distance: Gromov-Wasserstein, to the layer that it is compared with.
        scale: of the softmax, by default the largest singular value. At 1, as published, p is
            one-hot for large values and uniform for small ones.
    """
    s = sigma.double()
    logs = torch.log_softmax(s / (float(s[0]) if scale is None else scale), 0)
    p = logs.exp()
    return torch.stack([(p * s).sum(), -(p * logs).sum(), torch.tensor(distance).double()])


def tfi(psi: Tensor) -> float:
    """psi_1 (1 - psi_3) / psi_2: large where few directions are strong and a match is near."""
    return float(psi[0] * (1 - psi[2]) / (psi[1] + 1e-8))


def tos(one: Tensor, other: Tensor, distance: float, beta: float = 0.1) -> float:
    """cos(psi_A, psi_B) exp(-beta d): how alike two layers are."""
    return float(torch.cosine_similarity(one, other, dim=0)) * math.exp(-beta * distance)
