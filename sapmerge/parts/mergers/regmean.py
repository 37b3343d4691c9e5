"""`RegMean`: the update whose outputs are nearest to those of the adapters,
each on the inputs that it sees itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import cast

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream
from sapmerge.core.stream import anchors_of
from sapmerge.core.updates import Dense, LowRank, Update, zero_of
from sapmerge.errors import MethodError

__all__ = ["NormalEquations", "RegMean", "each_gram"]

RTOL = 1e-12
"""Of a sum of Gram matrices: eigenvalues below this share of the largest are noise (singular
values below 1e-6).
"""

Grams = Mapping[str, Mapping[str, Tensor]]
"""label of the adapter -> layer -> (n, n), or (n,) for a diagonal one."""


@part
class RegMean:
    """(sum_k w_k D_k G_k) (sum_k |w_k| G_k)^+: the least sum_k |w_k| E|(X - D_k) x_k|^2,
    x_k the inputs at adapter k.

    G_k = E[x x^T] on the anchors, off-diagonals times `reduction`. With W0 common to all, the same
    as on the weights. Of rank at most the sum of the ranks; the pre-pass keeps factors of that
    rank. An adapter without the layer counts with an update of zero.
    The sign of a weight goes with the update.

    Args:
        reduction: of off-diagonals, in [0, 1]; below 1, a layer with fewer tokens than inputs is
            well posed too.
        unseen: in directions that no anchor excites the result is `unseen` times the mean of the
            updates: 0 for the pseudo-inverse, 1 for the mean, or between. With an embedding these
            are the tokens that no anchor has.
        grams: label -> layer -> (n, n), measured elsewhere, e.g. by each client on its own data;
            then there is no need of anchors. Scale them alike: sums over rows weigh a client by its
            number of rows, means do not. Not part of the recipe.

    Raises:
        MethodError: there are neither anchors nor Gram matrices;
            a Gram matrix is missing or of another shape.
    """

    reduction: float = 0.9
    unseen: float = 0.0
    grams: Grams | None = field(default=None, repr=False)
    merged: Mapping[str, Update] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_reduction(self.reduction)
        if not 0 <= self.unseen <= 1:
            raise MethodError(f"unseen is a share of the mean, in [0, 1]; got {self.unseen!r}")

    def prepare(self, layers: LayerStream) -> RegMean:
        merged: dict[str, Update] = {}
        open_: dict[str, NormalEquations] = {}

        def fold(layer: Layer, k: int, gram: Tensor) -> None:
            problem = open_.setdefault(layer.name, NormalEquations(self.reduction))
            problem.add(layer, k, gram)
            if k == len(layer) - 1:
                merged[layer.name] = open_.pop(layer.name).solved(layer, self.unseen)

        each_gram("RegMean", layers, self.grams, fold)
        return replace(self, merged=merged)

    def __call__(self, layer: Layer) -> Update:
        if self.merged is None:
            raise unprepared(self)
        return self.merged[layer.name]


class NormalEquations:
    """The sums sum_k w_k D_k G_k, kept as B_k and A_k G_k, and `total` = sum_k |w_k| G_k,
    of one layer; float64.
    """

    def __init__(self, reduction: float) -> None:
        self._reduction = reduction
        self.total: Tensor | None = None
        self.low: list[tuple[Tensor, Tensor, Tensor]] = []
        self.dense: list[tuple[Tensor, Tensor]] = []
        self.mass = 0.0

    def add(self, layer: Layer, k: int, gram: Tensor) -> None:
        """Take adapter k into the sums."""
        update, weight, gram = (
            layer.updates[k],
            layer.weights[k],
            reduced(gram.double(), self._reduction),
        )
        if weight == 0:
            return
        self.mass += abs(weight)
        self.total = _plus(self.total, gram * abs(weight))
        if isinstance(update, Dense):
            self.dense.append(
                (times(update.matrix.double(), gram) * weight, update.matrix.double() * weight)
            )
        elif not update.absent:
            A = update.A.double()
            self.low.append((update.B.double() * weight, times(A, gram), A))

    def solved(self, layer: Layer, unseen: float) -> Update:
        """X = (sum w D G) S^+ + unseen mean(D) (I - S S^+)."""
        like = layer.updates[0]
        if self.total is None or not (self.low or self.dense):
            return zero_of(like)
        solve, left_out = inverse(self.total)
        total: Tensor | None = None
        for product, matrix in self.dense:
            total = _plus(total, solve(product) + left_out(matrix) * (unseen / self.mass))
        if not self.low:
            return Dense(cast("Tensor", total).to(like.dtype))
        B = torch.cat([B for B, _, _ in self.low], 1)
        rest = left_out(torch.cat([A for _, _, A in self.low])) * (unseen / self.mass)
        A = solve(torch.cat([product for _, product, _ in self.low])) + rest
        if total is not None:
            return Dense((total + B @ A).to(like.dtype))
        return LowRank(B.to(like.dtype), A.to(like.dtype))


def each_gram(
    who: str, layers: LayerStream, grams: Grams | None, fold: Callable[[Layer, int, Tensor], None]
) -> None:
    """Hand every Gram matrix to `fold`, the given ones or those of the anchors,
    adapter after adapter in each layer.
    """
    if grams is None:
        anchors_of(
            layers, who, ", and so are the inputs of the layers; or grams={label: {layer: matrix}}"
        ).grams(layers, fold)
        return
    for layer in layers:
        for k, label in enumerate(layer.adapters):
            fold(layer, k, _given(who, grams, label, layer))


def _given(who: str, grams: Grams, label: str, layer: Layer) -> Tensor:
    gram = grams.get(label, {}).get(layer.name)
    if gram is None:
        raise MethodError(
            f"{who}: no Gram matrix is given for layer {layer.name!r} of adapter {label!r}"
        )
    n = next((frames.V.shape[0] for frames in layer.frames if frames.V is not None), layer.shape[1])
    if tuple(gram.shape) not in ((n, n), (n,)) or not bool(torch.isfinite(gram).all()):
        raise MethodError(
            f"{who}: the Gram matrix of layer {layer.name!r} of adapter {label!r} must be finite "
            f"and ({n}, {n}), or ({n},) if it is diagonal; got {tuple(gram.shape)}"
        )
    gram = gram.to(layer.updates[0].device).double()
    for frames in layer.frames:
        if frames.V is not None:
            V = frames.V.double()
            gram = V.T @ (gram[:, None] * V if gram.ndim == 1 else gram @ V)
    return gram


def check_reduction(reduction: float) -> None:
    """A factor of off-diagonals is in [0, 1]."""
    if not 0 <= reduction <= 1:
        raise MethodError(
            f"reduction multiplies the off-diagonals of Gram matrices, in [0, 1]; got {reduction!r}"
        )


def reduced(gram: Tensor, reduction: float) -> Tensor:
    """A Gram matrix with its off-diagonals times `reduction`; diagonal ones as (n,)."""
    if gram.ndim == 1 or reduction == 1:
        return gram
    if reduction == 0:
        return gram.diagonal().clone()
    return gram * reduction + torch.diag(gram.diagonal() * (1 - reduction))


def times(rows: Tensor, gram: Tensor) -> Tensor:
    """rows @ gram, for a matrix or a diagonal."""
    return rows * gram if gram.ndim == 1 else rows @ gram


def inverse(S: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """rows -> rows S^+, and rows -> rows (I - S S^+), of a symmetric positive semi-definite S,
    or its diagonal.
    """
    if S.ndim == 1:
        seen = RTOL * S.max() < S
        return (lambda rows: rows * torch.where(seen, 1 / torch.where(seen, S, 1.0), 0.0)), (
            lambda rows: torch.where(seen, 0.0, rows)
        )
    factored = torch.linalg.cholesky_ex(S)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    L, failed = cast("tuple[Tensor, Tensor]", factored)
    pivots = L.diagonal()
    if not int(failed) and float(pivots.min()) ** 2 > 1e3 * RTOL * float(pivots.max()) ** 2:
        return (lambda rows: torch.cholesky_solve(rows.T, L).T), torch.zeros_like
    sigma, V = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(S))  # pyright: ignore[reportUnknownMemberType]
    keep = sigma > max(RTOL * float(sigma[-1]), 0.0)
    size, frame = sigma[keep], V[:, keep]
    return (lambda rows: (rows @ frame / size) @ frame.T), (
        lambda rows: rows - (rows @ frame) @ frame.T
    )


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    """total + more; a diagonal is as good as a matrix."""
    if total is None or total.ndim == more.ndim:
        return more if total is None else total + more
    return (torch.diag(total) if total.ndim == 1 else total) + (
        torch.diag(more) if more.ndim == 1 else more
    )
