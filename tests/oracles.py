"""Reference formulas, dense and in float64, written from the papers. Nothing here calls sapmerge.

A model is a list over layers of a list over adapters:
`model[l][k]` is D_k of layer l, an (m, n) matrix.
"""

from __future__ import annotations

import math

import numpy as np

Matrix = np.ndarray


def count(density: float, total: int) -> int:
    return min(total, max(1, math.floor(density * total + 1e-9)))


def trim(matrix: Matrix, density: float) -> Matrix:
    """The `density` share of entries of largest magnitude; equal ones in index order."""
    flat = matrix.ravel()
    kept = np.argsort(-np.abs(flat), kind="stable")[: count(density, flat.size)]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(matrix.shape)


def trim_all(matrices: list[Matrix], density: float) -> list[Matrix]:
    """One threshold for all matrices of an adapter; equal magnitudes at the cut are all kept."""
    every = np.sort(np.abs(np.concatenate([m.ravel() for m in matrices])))[::-1]
    cut = every[count(density, every.size) - 1]
    return [np.where(np.abs(m) >= cut, m, 0.0) for m in matrices]


def elect(stack: Matrix, weights: list[float], method: str = "total") -> Matrix:
    """The sign of each entry; where the sum is zero, the majority of the other signs."""
    weighted = stack * np.asarray(weights)[:, None, None]
    sign = np.sign((weighted if method == "total" else np.sign(weighted)).sum(0))
    return np.where(sign == 0, np.sign(sign.sum()), sign)


def disjoint_mean(matrices: list[Matrix], weights: list[float], method: str = "total") -> Matrix:
    """sum w D / sum |w| over the adapters whose w D has the elected sign."""
    stack, w = np.stack(matrices), np.asarray(weights)[:, None, None]
    agree = (np.sign(w * stack) == elect(stack, weights, method)) & (stack != 0)
    number = (np.abs(w) * agree).sum(0)
    return np.where(number > 0, (w * stack * agree).sum(0) / np.where(number > 0, number, 1.0), 0.0)


def ties(
    model: list[list[Matrix]],
    density: float,
    weights: list[float] | None = None,
    scope: str = "layer",
    method: str = "total",
) -> list[Matrix]:
    """TIES: trim, elect, disjoint mean. arXiv 2306.01708, section 4."""
    adapters = list(zip(*model))
    weights = weights or [1.0] * len(adapters)
    if scope == "adapter":
        trimmed = [trim_all(list(adapter), density) for adapter in adapters]
    else:
        trimmed = [[trim(matrix, density) for matrix in adapter] for adapter in adapters]
    return [disjoint_mean(list(layer), weights, method) for layer in zip(*trimmed)]


def knots(model: list[list[Matrix]], density: float, scaled: bool = True) -> list[Matrix]:
    """KnOTS-TIES: [D_1 | ... | D_K] = U S [V_1 | ... | V_K];
    TIES on S V_k (or on V_k), then U (or U S) times it.
    """
    frames, inside = [], []
    for layer in model:
        U, S, Vt = np.linalg.svd(np.concatenate(layer, axis=1), full_matrices=False)
        keep = 1e-6 * S[0] < S
        U, S, Vt = U[:, keep], S[keep], Vt[keep]
        parts = np.split(Vt, len(layer), axis=1)
        inside.append([S[:, None] * V if scaled else V for V in parts])
        frames.append(U if scaled else U * S)
    return [U @ core for U, core in zip(frames, ties(inside, density, scope="adapter"))]


def core_ties(
    factors: list[list[tuple[Matrix, Matrix]]], density: float, balance: bool = False
) -> list[Matrix]:
    """Core-TIES: U_B from [B_1 | ...], V_A from [A_1; ...], TIES on U_B^T B_k A_k V_A^T,
    one threshold per layer.

    `factors[l][k]` is (B, A). With `balance`, B = U sqrt(S) and A = sqrt(S) V^T of
    each product first.
    """
    out = []
    for layer in factors:
        pairs = [_balance(B @ A, B.shape[1]) if balance else (B, A) for B, A in layer]
        U = np.linalg.svd(np.concatenate([B for B, _ in pairs], axis=1), full_matrices=False)[0]
        V = np.linalg.svd(np.concatenate([A for _, A in pairs]), full_matrices=False)[2]
        out.append(U @ ties([[U.T @ B @ A @ V.T for B, A in pairs]], density)[0] @ V)
    return out


def _balance(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(S[:rank])
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def weighted_sum(layer: list[Matrix], weights: list[float]) -> Matrix:
    return sum((w * D for w, D in zip(weights, layer)), np.zeros_like(layer[0]))


def best_rank(matrix: Matrix, rank: int) -> Matrix:
    """The nearest matrix of rank `rank` (Eckart-Young)."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def energy_kept(matrix: Matrix, rank: int) -> float:
    S = np.linalg.svd(matrix, compute_uv=False)
    return float((S[:rank] ** 2).sum() / (S**2).sum())


def norm(matrices: list[Matrix]) -> float:
    """The norm of a whole adapter: over all its layers."""
    return math.sqrt(sum(float((m**2).sum()) for m in matrices))
