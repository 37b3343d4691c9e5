"""Exact algebra on updates: low rank stays low rank, and no (m, n) matrix is formed for it.

Costs O((m + n) R^2 + R^3) for factors of rank R; small matrices are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import factor_inner, finite, norm, numerical_rank, split_evenly, top_svd
from sapmerge.core.updates import Dense, LowRank, Update

__all__ = [
    "concatenate",
    "gram",
    "inner",
    "nothing_but_rounding",
    "rounded_share",
    "size_of",
    "add_by_columns",
    "add_up",
    "truncate",
    "whole_gram",
]

_ROUNDING = 1e-7
"""A norm this small beside the factors is their rounding error:
it comes from a difference of squares in float64.
"""

_ROWS = 512  # of a matrix with the sum of all ranks on a side


def inner(x: Update, y: Update) -> float:
    """The Frobenius inner product <x, y>, in float64."""
    if isinstance(x, LowRank) and isinstance(y, LowRank):
        return factor_inner(x.B, x.A, y.B, y.A)
    if isinstance(x, LowRank):
        return float(((x.B.double().T @ y.dense().double()) * x.A.double()).sum())
    if isinstance(y, LowRank):
        return inner(y, x)
    return float((x.dense().double() * y.dense().double()).sum())


def gram(updates: Sequence[Update]) -> Tensor:
    """The K x K matrix of inner products <D_i, D_j>, float64, on the CPU."""
    if all(isinstance(update, LowRank) for update in updates):
        return _factor_gram([update for update in updates if isinstance(update, LowRank)])
    count = len(updates)
    out = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            out[i, j] = out[j, i] = inner(updates[i], updates[j])
    return out


def whole_gram(layers: Iterable[Layer]) -> tuple[Tensor, Layer | None]:
    """The inner products of whole adapters, summed over their layers;
    and one of the layers, None if there is none.
    """
    total, last = torch.zeros(0, dtype=torch.float64), None
    for layer in layers:
        products = gram(layer.updates)
        total, last = products if last is None else total + products, layer
    return total, last


def nothing_but_rounding(update: Update) -> bool:
    """Whether an update is zero, or what rounding leaves of factors that cancel out."""
    return update.norm() <= _ROUNDING * size_of(update)


def add_by_columns(total: Tensor, low: Sequence[tuple[LowRank, float]]) -> None:
    """Add sum of scale * update to a float64 matrix, in place, by so many updates at a time that a
    product of their factors is worth a call.
    """
    some, columns = list[tuple[LowRank, float]](), 0
    for number, (update, scale) in enumerate(low, 1):
        some.append((update, scale))
        columns += update.rank
        if columns >= _ROWS or number == len(low):
            B = torch.cat([each.B.double() * factor for each, factor in some], 1)
            total.addmm_(B, torch.cat([each.A for each, _ in some]).double())
            some, columns = [], 0


def _factor_gram(updates: Sequence[LowRank]) -> Tensor:
    """All inner products at once: block sums of (A A^T) * (B^T B) over the stacked factors,
    some rows at a time.
    """
    A = torch.cat([update.A for update in updates]).double()
    B = torch.cat([update.B for update in updates], dim=1).double()
    owner = torch.repeat_interleave(
        torch.arange(len(updates)), torch.tensor([update.rank for update in updates])
    )
    select = torch.zeros(len(updates), len(owner), dtype=torch.float64)
    select[owner, torch.arange(len(owner))] = 1.0
    out = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for start in range(0, len(owner), _ROWS):
        rows = slice(start, start + _ROWS)
        products = ((A[rows] @ A[start:].T) * (B[:, rows].T @ B[:, start:])).cpu()
        products[:, :_ROWS] /= 2  # the block on the diagonal is its own mirror image
        out.index_add_(0, owner[rows], products @ select[:, start:].T)
    return out + out.T


def concatenate(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """sum_k weights[k] * updates[k], exactly, as one low-rank update of rank sum_k r_k."""
    A = torch.cat([update.A for update in updates])
    B = A.new_empty(updates[0].shape[0], len(A))
    start = 0
    for update, weight in zip(updates, weights, strict=True):  # one by one: no second copy of all
        torch.mul(update.B, weight, out=B[:, start : start + update.rank])
        start += update.rank
    return LowRank(B, A)


def truncate(update: Update, rank: int | float | str | None, default: int) -> tuple[LowRank, float]:
    """The best low-rank approximation of `update` and the share of its energy (sum
    of squares) kept.

    Args:
        update: what to store.
        rank: None: a low-rank update stays as it is (its factors are only recompressed, without
            loss, when they have more columns than min(m, n)) and a dense one is cut to `default`;
            an int caps the rank; a float in (0, 1) is the share of energy to keep; "exact" keeps
            the numerical rank.
        default: the rank of a dense update when `rank` is None.

    Returns:
        The update, and the share of energy kept, in [0, 1].
    """
    if isinstance(update, LowRank):
        fits = update.rank <= min(update.shape)
        if (rank is None and fits) or (
            isinstance(rank, int) and update.rank <= min(rank, *update.shape)
        ):
            return update, 1.0
    wanted = default if rank is None else rank
    cap = rank if isinstance(rank, int) else None
    matrix = None  # where the largest singular values are all that is needed
    if isinstance(update, Dense):
        matrix = update.matrix if isinstance(wanted, int) else None
    elif cap is not None and update.rank >= min(update.shape):
        matrix = update.product
    U, sigma, Vh = update.svd(cap) if matrix is None else top_svd(matrix, int(wanted))
    full = numerical_rank(sigma)
    energy = sigma.square()
    total = float(energy.sum()) if matrix is None else update.norm() ** 2
    if total == 0.0:
        return LowRank(U[:, :0].to(update.dtype), Vh[:0].to(update.dtype)), 1.0
    if isinstance(rank, float):
        enough = torch.cumsum(energy, 0) >= rank * total * (1 - 1e-12)
        keep = min(int(torch.argmax(enough.to(torch.int8))) + 1, full)
    elif isinstance(rank, int):
        keep = min(rank, full)
    elif rank is None and isinstance(update, Dense):
        keep = min(default, full)
    else:
        keep = full
    B, A = split_evenly(U, sigma, Vh, keep)
    return LowRank(B.to(update.dtype), A.to(update.dtype)), min(
        1.0, float(energy[:keep].sum()) / total
    )


def rounded_share(update: LowRank, dtype: torch.dtype) -> float:
    """The share of an update's energy that is left when its factors are rounded to a
    dtype, in [0, 1].

    1 - ||D - D'||^2 / ||D||^2. float16 loses what is below 6e-8;
    what it cannot hold at all is not judged here (1).
    """
    size = update.norm()
    if dtype == update.dtype or size == 0.0:
        return 1.0
    B, A = update.B.to(dtype).to(update.dtype), update.A.to(dtype).to(update.dtype)
    if not (finite(B) and finite(A)):
        return 1.0
    difference = LowRank(torch.cat([update.B, -B], 1), torch.cat([update.A, A]))
    return max(0.0, 1.0 - (difference.norm() / size) ** 2)


def size_of(update: Update) -> float:
    """An upper bound of the largest singular value that knows nothing of cancellation:
    sum_i ||b_i|| ||a_i||.
    """
    if isinstance(update, Dense):
        return norm(update.matrix)
    return float(
        (update.B.double().square().sum(0) * update.A.double().square().sum(1)).sqrt().sum()
    )


def weighted_sum(layer: Layer, weights: tuple[float, ...]) -> Update:
    """sum_k weights[k] D_k."""
    return add_up(zip(layer, weights, strict=True), layer.updates[0])


def add_up(terms: Iterable[tuple[Update, float]], nothing: Update) -> Update:
    """The sum of weight * update. Low-rank updates are concatenated, exactly; those that share A
    (FFA-LoRA) keep its rank. No dense one is kept, so they may be made on the way.

    Args:
        terms: (update, weight).
        nothing: the sum of updates that are all absent.
    """
    low, total = list[tuple[LowRank, float]](), None
    for update, weight in terms:
        if isinstance(update, Dense):
            total = torch.zeros_like(update.matrix) if total is None else total
            total.add_(update.matrix, alpha=weight)
        elif not update.absent:
            low.append((update, weight))
    low = _shared(low)
    factors = concatenate([u for u, _ in low], [w for _, w in low]) if low else None
    if total is None:
        return nothing if factors is None else factors
    return Dense(total if factors is None else total.add_(factors.dense()))


def _shared(terms: list[tuple[LowRank, float]]) -> list[tuple[LowRank, float]]:
    """The terms of a sum, those with one and the same A as one: sum w (B A) = (sum w B) A."""
    groups: list[list[tuple[LowRank, float]]] = []
    alike: dict[tuple[object, float], list[list[tuple[LowRank, float]]]] = {}
    for update, weight in terms:
        # equal matrices have equal first rows: thousands are not compared in pairs
        found = alike.setdefault((update.A.shape, float(update.A[:1].double().sum())), [])
        group = next((other for other in found if _same(other[0][0].A, update.A)), None)
        if group is None:
            groups.append([(update, weight)])
            found.append(groups[-1])
        else:
            group.append((update, weight))
    return [
        group[0]
        if len(group) == 1
        else (LowRank(torch.stack([w * u.B for u, w in group]).sum(0), group[0][0].A), 1.0)
        for group in groups
    ]


def _same(first: Tensor, second: Tensor) -> bool:
    """Equal; the first row tells most that are not."""
    return (
        first.shape == second.shape
        and torch.equal(first[:1], second[:1])
        and torch.equal(first, second)
    )
