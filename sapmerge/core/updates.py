"""An `Update`: the change of one weight matrix, as low-rank factors or as a dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from sapmerge.core.linalg import factor_grams, factor_svd, norm, numerical_rank, split_evenly, svd
from sapmerge.core.torch_state import without_autocast
from sapmerge.errors import MethodError

__all__ = ["Dense", "LowRank", "Update", "absent", "as_update"]

_COLUMNS = 512  # of factors, converted to float64 at a time


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update B @ A of one weight matrix, every scaling (alpha, rsLoRA) folded in.

    Args:
        B: (m, r), m = outputs of the layer.
        A: (r, n), n = inputs. Rank 0 means that the adapter does not have the layer.

    The factors must not be changed in place: the norm and the Gram matrices are computed once.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise MethodError(
                f"LowRank takes B (m, r) and A (r, n); got B {tuple(self.B.shape)} and A "
                f"{tuple(self.A.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B (an upper bound of the algebraic rank)."""
        return self.B.shape[1]

    @property
    def absent(self) -> bool:
        """Whether the adapter does not have the layer: an update of rank 0."""
        return self.rank == 0

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.B.nbytes + self.A.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    def dense(self) -> Tensor:
        """The update as an (m, n) matrix."""
        with without_autocast():
            return self.B @ self.A

    def rows(self, index: Tensor) -> Tensor:
        """Only the rows `index` of the update: (len(index), n)."""
        with without_autocast():
            return self.B[index] @ self.A

    def scaled(self, factor: float) -> LowRank:
        """`factor` times the update."""
        return LowRank(self.B * factor, self.A)

    def svd(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), sigma (k), Vh (k, n) with k = min(r, m, n), in float64;
        no (m, n) matrix for r < min(m, n).

        With `rank` U and Vh have the first `rank` singular vectors only, which is faster.
        """
        if self.rank < min(self.shape):
            return factor_svd(self.B, self.A, self._grams, rank)
        U, sigma, Vh = svd(self.product)
        return U[:, :rank], sigma, Vh[:rank]

    def norm(self) -> float:
        """The Frobenius norm, in float64; from the Gram matrices of the factors
        for r < min(m, n).
        """
        return self._norm

    @cached_property
    def _norm(self) -> float:
        if self.rank >= min(self.shape):
            return norm(self.product)
        left, right = self._grams
        return max(float(torch.dot(left.flatten(), right.flatten())), 0.0) ** 0.5

    @cached_property
    def product(self) -> Tensor:
        """B @ A in float64, for r >= min(m, n): no larger than the factors,
        which are converted piece by piece.
        """
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for start in range(0, self.rank, _COLUMNS):
            some = slice(start, start + _COLUMNS)
            total.addmm_(self.B[:, some].double(), self.A[some].double())
        return total

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        return factor_grams(self.B, self.A)

    @cached_property
    def balanced(self) -> LowRank:
        """The same update with factors of equal weight: B = U sqrt(sigma), A = sqrt(sigma) V^T.

        LoRA training prefers no factorisation (B R^-1, R A) over another; this one depends on the
        update alone. Singular values below `linalg.RTOL` are dropped:
        their directions are arbitrary.
        """
        return _even(self)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LowRank:
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Dense:
    """An update that is not low-rank any more (entries of it were masked, or chosen).

    Args:
        matrix: (m, n).
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor) or not self.matrix.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
            kind = getattr(self.matrix, "dtype", type(self.matrix).__name__)
            raise MethodError(f"Dense takes a tensor of floats; got {kind}")
        if self.matrix.ndim != 2:
            raise MethodError(f"Dense takes a matrix (m, n); got shape {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def absent(self) -> bool:
        return self.rank == 0

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def dense(self) -> Tensor:
        return self.matrix

    def rows(self, index: Tensor) -> Tensor:
        return self.matrix[index]

    def scaled(self, factor: float) -> Dense:
        return Dense(self.matrix * factor)

    def svd(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), sigma (k), Vh (k, n) with k = min(m, n), in float64;
        with `rank` the first singular vectors.
        """
        U, sigma, Vh = svd(self.matrix)
        return U[:, :rank], sigma, Vh[:rank]

    def norm(self) -> float:
        return self._norm

    @cached_property
    def balanced(self) -> LowRank:
        return _even(self)

    @cached_property
    def _norm(self) -> float:
        return norm(self.matrix)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Dense:
        return Dense(self.matrix.to(device=device, dtype=dtype))


Update: TypeAlias = LowRank | Dense


def as_update(made: object, by: object, layer: str) -> Update:
    """What a function of the user's returned, if it is an update.

    Args:
        by: the function.
        layer: its name.

    Raises:
        MethodError: it is none.
    """
    if isinstance(made, (LowRank, Dense)):
        return made
    raise MethodError(
        f"{by!r} must return an update, LowRank(B, A) or Dense(matrix); it returned a "
        f"{type(made).__name__} for layer {layer!r}"
    )


def _even(update: Update) -> LowRank:
    U, sigma, Vh = update.svd()
    B, A = split_evenly(U, sigma, Vh, numerical_rank(sigma))
    return LowRank(B.to(update.dtype), A.to(update.dtype))


def absent(shape: tuple[int, int], like: Tensor) -> LowRank:
    """The update of an adapter that does not have the layer: rank 0.

    Args:
        shape: (m, n) of the layer.
        like: gives dtype and device.

    Example:
        >>> import torch, sapmerge as sm
        >>> sm.absent((4, 3), torch.zeros(1)).rank
        0
    """
    return LowRank(like.new_zeros(shape[0], 0), like.new_zeros(0, shape[1]))


def zero_of(update: Update) -> LowRank:
    """The zero update of the same shape, dtype and device: rank 0."""
    like = update.matrix if isinstance(update, Dense) else update.A
    return absent(update.shape, like)
