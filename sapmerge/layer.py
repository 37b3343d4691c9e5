"""The two things that everything else is made of: an `Update`, and a `Layer` that holds one per adapter.

A transform maps a Layer to a Layer, a merger maps a Layer to an Update, a method is a chain of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from sapmerge.errors import MethodError
from sapmerge.linalg import factor_grams, factor_svd, norm, svd
from sapmerge.protocols import AnchorPass, Observation, Stats

if TYPE_CHECKING:
    from sapmerge.bases import Frames

__all__ = [
    "AnchorPass",
    "Dense",
    "Layer",
    "LayerStream",
    "LowRank",
    "MaskBuilder",
    "Merger",
    "Method",
    "Observation",
    "Rescaler",
    "Scorer",
    "Stats",
    "Transform",
    "Update",
    "absent",
]

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
                f"LowRank takes B (m, r) and A (r, n); got B {tuple(self.B.shape)} and A {tuple(self.A.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """The number of columns of B (an upper bound of the algebraic rank)."""
        return self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    def dense(self) -> Tensor:
        """The update as an (m, n) matrix."""
        return self.B @ self.A

    def rows(self, index: Tensor) -> Tensor:
        """Only the rows `index` of the update: (len(index), n)."""
        return self.B[index] @ self.A

    def scaled(self, factor: float) -> LowRank:
        """`factor` times the update."""
        return LowRank(self.B * factor, self.A)

    def svd(self, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, k), sigma (k), Vh (k, n) with k = min(r, m, n), in float64; no (m, n) matrix for r < min(m, n).

        With `rank` U and Vh have the first `rank` singular vectors only, which is faster.
        """
        if self.rank < min(self.shape):
            return factor_svd(self.B, self.A, self._grams, rank)
        U, sigma, Vh = svd(self._product())
        return U[:, :rank], sigma, Vh[:rank]

    def norm(self) -> float:
        """The Frobenius norm, in float64; from the Gram matrices of the factors for r < min(m, n)."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        if self.rank >= min(self.shape):
            return norm(self._product())
        left, right = self._grams
        return max(float(torch.dot(left.flatten(), right.flatten())), 0.0) ** 0.5

    def _product(self) -> Tensor:
        """B @ A in float64, for r >= min(m, n): no larger than the factors, which are converted piece by piece."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for start in range(0, self.rank, _COLUMNS):
            some = slice(start, start + _COLUMNS)
            total.addmm_(self.B[:, some].double(), self.A[some].double())
        return total

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        return factor_grams(self.B, self.A)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Dense:
    """An update that is not low-rank any more (entries of it were masked, or chosen).

    Args:
        matrix: (m, n).
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2:
            raise MethodError(f"Dense takes a matrix (m, n); got shape {tuple(self.matrix.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        return min(self.shape)

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
        """U (m, k), sigma (k), Vh (k, n) with k = min(m, n), in float64; with `rank` the first singular vectors."""
        U, sigma, Vh = svd(self.matrix)
        return U[:, :rank], sigma, Vh[:rank]

    def norm(self) -> float:
        return self._norm

    @cached_property
    def _norm(self) -> float:
        return norm(self.matrix)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.matrix.to(device=device, dtype=dtype))


Update: TypeAlias = LowRank | Dense


def absent(shape: tuple[int, int], like: Tensor) -> LowRank:
    """The update of an adapter that does not have the layer: rank 0."""
    return LowRank(like.new_zeros(shape[0], 0), like.new_zeros(0, shape[1]))


def zero_of(update: Update) -> LowRank:
    """The zero update of the same shape, dtype and device: rank 0."""
    like = update.matrix if isinstance(update, Dense) else update.A
    return absent(update.shape, like)


def _no_record(key: str, value: object) -> None:
    """Where notes go when nobody asked for a report."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight matrix as all adapters see it.

    Args:
        name: the module's name, e.g. "vision_model.encoder.layers.0.self_attn.q_proj".
        updates: one per adapter, all of one shape (m, n); rank 0 where an adapter lacks the layer.
        adapters: their labels, for messages and reports.
        weights: one number per adapter, 1.0 by default. Pruning never sees them.
        digests: their content digests, for randomness that does not depend on order or paths. Labels by default.
        anchors: with anchors, where gradients come from (see `sapmerge.anchors`); None without.
        frames: the coordinate systems that the updates are written in, outermost first (see `In`); usually none.
        record: receives notes for the report (`record(key, value)`); does nothing by default.
    """

    name: str
    updates: tuple[Update, ...]
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    digests: tuple[str, ...] = ()
    anchors: AnchorPass | None = field(default=None, repr=False)
    frames: tuple[Frames, ...] = ()
    record: Callable[[str, object], None] = field(default=_no_record, repr=False)

    def __post_init__(self) -> None:
        count = len(self.updates)
        if count == 0:
            raise MethodError(f"layer {self.name!r} has no updates; a Layer needs at least one adapter")
        if not self.adapters:
            object.__setattr__(self, "adapters", tuple(f"adapter{k}" for k in range(count)))
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * count)
        if not self.digests:
            object.__setattr__(self, "digests", self.adapters)
        for what in ("adapters", "weights", "digests"):
            got = len(getattr(self, what))
            if got != count:
                raise MethodError(f"layer {self.name!r} has {count} updates but {got} {what}")
        shapes = {update.shape for update in self.updates}
        if len(shapes) > 1:
            found = ", ".join(f"{a}: {u.shape}" for a, u in zip(self.adapters, self.updates, strict=True))
            raise MethodError(f"layer {self.name!r} needs updates of one shape; got {found}")

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def shape(self) -> tuple[int, int]:
        return self.updates[0].shape

    @property
    def present(self) -> tuple[bool, ...]:
        """Which adapters have the layer."""
        return tuple(update.rank > 0 for update in self.updates)

    def with_updates(self, updates: Sequence[Update]) -> Layer:
        """The same layer with other updates. The anchors are dropped: gradients are those of the updates as read."""
        return replace(self, updates=tuple(updates), anchors=None)


class LayerStream(Protocol):
    """The layers of a merge, in a fixed order; can be iterated as often as a pre-pass needs."""

    def __iter__(self) -> Iterator[Layer]: ...


Scorer: TypeAlias = Callable[[Tensor, Stats], Tensor]
"""(values, stats) -> scores of the same shape."""
MaskBuilder: TypeAlias = Callable[[Tensor], Tensor]
"""(scores) -> what to keep: bool, or a float multiplier."""
Rescaler: TypeAlias = Callable[[Update, Update], Update]
"""(pruned, original) -> rescaled."""
Transform: TypeAlias = Callable[[Layer], Layer]
Merger: TypeAlias = Callable[[Layer], Update]
Method: TypeAlias = Callable[[Layer], Update]
"""A method is a merger, whatever it is made of."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from names and numbers: the only source of randomness in the library."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
