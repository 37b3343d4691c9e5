"""The protocol of a kind, and the plainest one: B A."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sapmerge.core.updates import LowRank, Update
from sapmerge.io.files import Weights
from sapmerge.io.measuring import Facts

__all__ = ["BaseMatrix", "Factors", "Reading", "product"]


class BaseMatrix(Protocol):
    """Gives the weight of the base that an update belongs to, as an (outputs, inputs)
    matrix in float32.
    """

    def __call__(self) -> Tensor: ...


class Reading(Protocol):
    """How the update of one weight matrix is made of the tensors of a file."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all of them; the digest covers their values."""
        ...

    @property
    def needs_base(self) -> str | None:
        """Why the base's weight is needed; None where it is not."""
        ...

    def update(self, weights: Weights, base: BaseMatrix | None) -> Update:
        """The update, in float32, every scaling folded in."""
        ...

    def bound(self, facts: Mapping[str, Facts]) -> float:
        """No entry of the update or of its factors is larger;
        infinite where that cannot be told from norms.
        """
        ...

    def reach(self, facts: Mapping[str, Facts]) -> float:
        """The update's Frobenius norm is at most this; infinite where that depends on the base."""
        ...

    def mark(self) -> tuple[object, ...]:
        """What the digest has to cover besides values, shapes and scaling."""
        ...


class Factors(NamedTuple):
    """scaling * B A, as PEFT stores it for a Linear, Conv1D, convolution or embedding.

    Args:
        a, b: tensor names; A is (r, n) or the kernel of a convolution, B is (m, r).
        shape: (m, n) of the product.
        scaling: is folded into B.
        e: of AdaLoRA: a column (r, 1) that multiplies the rows of A.
    """

    a: str
    b: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    e: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.a, self.b) if self.e is None else (self.a, self.b, self.e)

    @property
    def needs_base(self) -> str | None:
        return None

    def update(self, weights: Weights, base: BaseMatrix | None = None) -> LowRank:
        a = weights.read(self.a).float().reshape(self.rank, self.shape[1])
        b = weights.read(self.b).float().reshape(self.shape[0], self.rank)
        if self.e is not None:
            a = a * weights.read(self.e).float().reshape(self.rank, 1)
        return product(b, a, self.scaling)

    def bound(self, facts: Mapping[str, Facts]) -> float:
        a, b = facts[self.a].norm, facts[self.b].norm
        a *= 1.0 if self.e is None else max(1.0, facts[self.e].norm)
        return max(abs(self.scaling) * max(b, a * b), a)

    def reach(self, facts: Mapping[str, Facts]) -> float:
        e = 1.0 if self.e is None else facts[self.e].norm
        return abs(self.scaling) * facts[self.a].norm * facts[self.b].norm * e

    def mark(self) -> tuple[object, ...]:
        return () if self.e is None else ("adalora",)


def product(b: Tensor, a: Tensor, scaling: float) -> LowRank:
    """scaling * b a. The scaling is folded into B; one that float32 has with a few digits only,
    if at all, is shared: each factor takes its root, which is below 1e-18.
    """
    if 0 < abs(scaling) < torch.finfo(torch.float32).tiny:
        root = math.sqrt(abs(scaling))
        return LowRank(b * math.copysign(root, scaling), a * root)
    return LowRank(b * scaling, a)


def largest() -> float:
    """The largest float32."""
    return torch.finfo(torch.float32).max
