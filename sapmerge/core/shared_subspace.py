"""The subspace that most adapters share, and how much of each adapter lies in it.

Blocks are updates of norm 1, seen through one side:
F (m, r) with F F^T = X X^T, X = D / ||D|| (left) or its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.core.linalg import norm, qr, svd
from sapmerge.core.updates import Update

__all__ = ["Shared", "block", "convex", "leave_one_out", "plateau"]

Blocks = Mapping[str, Mapping[int, Tensor]]
"""Layer -> adapter -> block; an adapter that lacks the layer, or is zero there, has none."""

_ITERATIONS, _NEAREST, _SETTLED = 60, 1e-9, 1e-12


@dataclass(frozen=True, eq=False)
class Shared:
    """What was found.

    Args:
        bases: layer -> U (m, r), orthonormal.
        score: adapter -> z of the leave-one-out test, or the share of its norm outside (convex
            form).
        energy: layer -> the mean share of the blocks' energy in the subspace.
    """

    bases: Mapping[str, Tensor]
    score: Mapping[int, float]
    energy: Mapping[str, float]


def block(update: Update, left: bool) -> Tensor | None:
    """The block of an update; None for a zero one."""
    U, sigma, Vh = update.svd()
    size = norm(sigma)
    if size == 0:
        return None
    return ((U if left else Vh.T) * (sigma / size)).double().cpu()


def leave_one_out(blocks: Blocks, rank: int) -> Shared:
    """Robust subspaces by iteratively reweighted least squares,
    then every adapter against the subspace of the others.

    min_U sum_k ||X_k - U U^T X_k||, one distance per adapter over all of its layers. z_k compares
    the energy of X_k in the subspace that the others span, with their final weights, to that of
    random updates: mean sum_l r / m_l, variance sum_l 2 r (m_l - r) / (m_l^2 (m_l + 2) q_l),
    q_l the mean effective rank of the blocks.
    """
    adapters = sorted({k for own in blocks.values() for k in own})
    weights = dict.fromkeys(adapters, 1.0)
    bases: dict[str, Tensor] = {}
    for _ in range(_ITERATIONS):
        squares, counts = dict.fromkeys(adapters, 0.0), dict.fromkeys(adapters, 0)
        for name, own in blocks.items():
            U = bases[name] = _top(own, weights, rank)
            for k, F in own.items():
                squares[k] += norm(F - U @ (U.T @ F)) ** 2
                counts[k] += 1
        new = {k: 1 / max(math.sqrt(squares[k] / counts[k]), _NEAREST) for k in adapters}
        settled = all(abs(new[k] - weights[k]) <= _SETTLED * new[k] for k in adapters)
        weights = new
        if settled:
            break
    score = {k: _z(k, blocks, weights, rank) for k in adapters}
    return Shared(bases, score, _energies(blocks, bases))


def _top(own: Mapping[int, Tensor], weights: Mapping[int, float], rank: int) -> Tensor:
    """The `rank` largest eigenvectors of sum_k w_k F_k F_k^T, from the factors side by side where
    they have fewer columns than rows: no (m, m) matrix is formed then.
    """
    G = torch.cat([F * math.sqrt(weights[k]) for k, F in own.items()], 1)
    if rank <= G.shape[1] < len(G):
        return svd(G)[0][:, :rank]
    return torch.linalg.eigh(G @ G.T).eigenvectors[:, -rank:]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _z(k: int, blocks: Blocks, weights: Mapping[int, float], rank: int) -> float:
    inside = mean = variance = 0.0
    for own in blocks.values():
        if k not in own or len(own) < 2:
            continue
        m, r = own[k].shape[0], min(rank, own[k].shape[0])
        U = _top({other: F for other, F in own.items() if other != k}, weights, r)
        inside += norm(U.T @ own[k]) ** 2
        effective = sum(norm(F) ** 4 / norm(F.T @ F) ** 2 for F in own.values()) / len(own)
        mean += r / m
        variance += 2 * r * (m - r) / (m * m * (m + 2) * effective)
    return (inside - mean) / math.sqrt(variance) if variance > 0 else 0.0


def _energies(blocks: Blocks, bases: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: sum(norm(bases[name].T @ F) ** 2 for F in own.values()) / len(own)
        for name, own in blocks.items()
        if own
    }


def bounds(blocks: Blocks) -> tuple[float, float]:
    """Prices below which everything is outside of the subspace, and above which nothing can be."""
    layers = len(blocks)
    largest = max(float(svd(torch.cat(list(own.values()), 1))[1][0]) for own in blocks.values())
    ranks: dict[int, int] = {}
    for own in blocks.values():
        for k, F in own.items():
            ranks[k] = ranks.get(k, 0) + F.shape[1]
    return math.sqrt(layers) / largest, math.sqrt(max(ranks.values()))


def convex(blocks: Blocks, price: float, iterations: int = 2000, tolerance: float = 1e-9) -> Shared:
    """Low rank + whole blocks, by ADMM: min sum_l ||L_l||_* + price sum_k sqrt(sum_l
    ||S_lk||^2), X = L + S.

    Score: sqrt(sum_l ||S_lk||^2 / sum_l ||X_lk||^2), the share of an adapter that is its own.
    """
    frames: dict[str, Tensor] = {}
    places: dict[str, dict[int, slice]] = {}
    X: dict[str, Tensor] = {}
    for name, own in blocks.items():
        stacked, start = torch.cat(list(own.values()), 1), 0
        Q = (
            qr(stacked)[0]
            if stacked.shape[1] < stacked.shape[0]
            else torch.eye(len(stacked), dtype=torch.float64)
        )
        frames[name], X[name], places[name] = Q, Q.T @ stacked, {}
        for k, F in own.items():
            places[name][k] = slice(start, start + F.shape[1])
            start += F.shape[1]
    size = math.sqrt(sum(norm(x) ** 2 for x in X.values()))
    S: dict[str, Tensor] = {name: torch.zeros_like(x) for name, x in X.items()}
    dual: dict[str, Tensor] = dict(S)
    L = dict(S)
    step = 1.0
    for _ in range(iterations):
        before = dict(S)
        for name, x in X.items():
            U, sigma, Vh = svd(x - S[name] + dual[name])
            L[name] = (U * (sigma - 1 / step).clamp_min(0)) @ Vh
        rest = {name: x - L[name] + dual[name] for name, x in X.items()}
        norms = _norms(rest, places)
        for name, own in places.items():
            S[name] = torch.zeros_like(rest[name])
            for k, where in own.items():
                if norms[k] > 0:
                    S[name][:, where] = rest[name][:, where] * max(0.0, 1 - price / step / norms[k])
        gap = {name: x - L[name] - S[name] for name, x in X.items()}
        dual = {name: dual[name] + gap[name] for name in X}
        primal = math.sqrt(sum(norm(g) ** 2 for g in gap.values()))
        moved = step * math.sqrt(sum(norm(S[name] - before[name]) ** 2 for name in X))
        if max(primal, moved) <= tolerance * size:
            break
        factor = 2.0 if primal > 10 * moved else 0.5 if moved > 10 * primal else 1.0
        step, dual = step * factor, {name: dual[name] / factor for name in X}
    own_norms, all_norms = _norms(S, places), _norms(X, places)
    bases: dict[str, Tensor] = {}
    for name in X:
        left, sigma, _ = svd(L[name])
        bases[name] = (
            frames[name] @ left[:, : int((sigma > 1e-6 * max(float(sigma[0]), 1e-300)).sum())]
        )
    score = {k: own_norms[k] / all_norms[k] for k in sorted(all_norms)}
    return Shared(bases, score, _energies(blocks, bases))


def _norms(
    parts: Mapping[str, Tensor], places: Mapping[str, Mapping[int, slice]]
) -> dict[int, float]:
    """Of every adapter, over its layers."""
    squares: dict[int, float] = {}
    for name, own in places.items():
        for k, where in own.items():
            squares[k] = squares.get(k, 0.0) + norm(parts[name][:, where]) ** 2
    return {k: math.sqrt(square) for k, square in squares.items()}


def plateau(blocks: Blocks, count: int = 12, share: float = 0.5) -> Shared:
    """The convex form at the middle of the longest run of prices that flag the same adapters
    (some, not all).
    """
    low, high = bounds(blocks)
    solutions = [
        convex(blocks, low * (high / low) ** ((i + 0.5) / count), tolerance=1e-6)
        for i in range(count)
    ]
    flagged: Sequence[frozenset[int]] = [
        frozenset(k for k, s in one.score.items() if s > share) for one in solutions
    ]
    best = (0, count - 1)
    for start in range(count):
        end = start
        while end + 1 < count and flagged[end + 1] == flagged[start]:
            end += 1
        some = 0 < len(flagged[start]) < len(solutions[0].score)
        if some and end - start + 1 > best[0]:
            best = (end - start + 1, (start + end) // 2)
    return solutions[best[1]]
