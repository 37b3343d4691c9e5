"""What is no matrix (biases, rows of embeddings) merges as deltas from the base,
with the method's weights.

For coefficients c_k of the adapters, the merged value is base + sum c_k (v_k - base) + sum c_k s_k
b_k, where v_k replaces the base's value and s_k b_k moves it; an adapter without it has a delta of
zero. The base's own share is 1 - sum c_k over those that replace it. Where it is zero (all adapters
have the tensor, and the method is a mean), the base is not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import (
    IncompatibleAdaptersError,
    MethodError,
    ModelMismatchError,
    NonFiniteError,
)
from sapmerge.io.adapter import Adapter
from sapmerge.io.kinds.vectors import Vector
from sapmerge.io.modules import BaseWeights
from sapmerge.models import find_tensors
from sapmerge.parts.mergers.linear import FactorSum, Sum, shared_out
from sapmerge.parts.tuning import Tune
from sapmerge.parts.wrappers import ByModule, Chain

__all__ = [
    "Change",
    "Vectors",
    "apply_vectors",
    "check_vectors",
    "coefficients",
    "plan_vectors",
    "rows_before",
    "used_weights",
]

_NONE = 1e-9  # a share of the base below this is rounding


def coefficients(method: object, weights: Sequence[float], module: str) -> tuple[float, ...]:
    """What a prepared method multiplies the adapters by, as far as that is one number each:
    w, or w / sum w.

    A sum is a sum; everything else counts as a mean.
    Weights by anchors or agreement and shortened adapters count.

    Args:
        module: whose coefficients; `ByModule` has methods of its own for some.

    Raises:
        MethodError: the weights of a mean sum to zero.
    """
    merger, used, scales = _settled(method, weights, module)
    if not isinstance(merger, (Sum, FactorSum)):
        total = sum(used)
        if abs(total) <= 1e-12 * sum(map(abs, used)):
            raise MethodError(
                f"the weights {tuple(used)} sum to zero, so the adapters' biases have no mean"
            )
        used = tuple(weight / total for weight in used)
    return tuple(weight * scale for weight, scale in zip(used, scales, strict=True))


def used_weights(method: object, weights: Sequence[float], module: str) -> tuple[float, ...]:
    """What a prepared method makes of the weights in a module: 0 for who is left out."""
    return _settled(method, weights, module)[1]


def _settled(
    method: object, weights: Sequence[float], module: str
) -> tuple[object, tuple[float, ...], tuple[float, ...]]:
    """What is inside of all wrappers, the weights that it gets, and by what the wrappers multiply
    the adapters.
    """
    used, factors = tuple(weights), (1.0,) * len(weights)
    while True:
        if isinstance(method, Chain):
            inner: object = method.steps[-1]
        elif isinstance(method, ByModule):
            inner = method.of(module)
        elif isinstance(method, Tune):
            inner, factors = method.chosen, tuple(method.scale * factor for factor in factors)
        else:
            inner = getattr(method, "method", None)
            shares, scales = (
                cast("Sequence[float] | None", getattr(method, name, None))
                for name in ("shares", "scales")
            )
            if inner is not None and shares and len(shares) == len(used):
                used = shared_out(used, shares)
            if inner is not None and isinstance(scales, tuple) and len(scales) == len(used):
                factors = tuple(f * scale for f, scale in zip(factors, scales, strict=True))
        if inner is None:
            return method, used, factors
        method = inner


@dataclass(frozen=True)
class Part:
    """What one adapter brings to a change.

    Args:
        coefficient: of its delta; the scaling of what moves the base is folded in.
    """

    adapter: Adapter
    vector: Vector
    coefficient: float

    def read(self) -> Tensor:
        return self.adapter.vector(self.vector.key).double()


@dataclass(frozen=True)
class Change:
    """The change of one tensor of the base.

    Args:
        name: canonical.
        spelled: as a file spells it.
        parts: one per adapter that has it.
        rows: the rows that are replaced; empty where all of the tensor is.
    """

    name: str
    spelled: str
    how: str
    parts: tuple[Part, ...]

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(sorted({row for part in self.parts for row in part.vector.rows}))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that is stored."""
        first = self.parts[0].vector.shape
        return (len(self.rows), *first[1:]) if self.rows else first

    @property
    def dtype(self) -> torch.dtype:
        dtype = (
            torch.float32
            if self.parts[0].vector.dtype.itemsize == 1
            else self.parts[0].vector.dtype
        )
        for part in self.parts[1:]:
            dtype = torch.promote_types(
                dtype, torch.float32 if part.vector.dtype.itemsize == 1 else part.vector.dtype
            )
        return dtype

    @property
    def module(self) -> str:
        """The module that has the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def needs_base(self) -> bool:
        """Whether the stored value depends on the base's."""
        return self.how != "moves" and bool((self._base_share().abs() > _NONE).any())

    def _base_share(self) -> Tensor:
        """1 - sum of the coefficients of those that replace; one number per row, or one."""
        share = torch.ones(max(1, len(self.rows)), dtype=torch.float64)
        for part in self.parts:
            share[self._places(part)] -= part.coefficient
        return share

    def _places(self, part: Part) -> Tensor:
        rows = self.rows
        return torch.tensor([rows.index(row) for row in part.vector.rows] if rows else [0])

    def total(self) -> Tensor:
        """sum c_k v_k, of the stored shape, in float64."""
        total = torch.zeros(self.shape, dtype=torch.float64)
        for part in self.parts:
            value = part.read() * part.coefficient
            if self.rows:
                total[self._places(part)] += value
            else:
                total += value
        return total

    def value(self, base: Tensor | None) -> Tensor:
        """The new value, or for what moves the base the sum of the moves; float64.

        Args:
            base: the base's tensor, whole; may be None where `needs_base` is false.
        """
        total = self.total()
        if self.how == "moves" or base is None:
            return total
        base = base.to("cpu", torch.float64)
        if self.rows:
            return self._base_share()[:, None] * base[list(self.rows)] + total
        return self._base_share() * base + total

    def delta(self, base: Tensor) -> Tensor:
        """By how much the rows differ from those of the base; float64."""
        return self.value(base) - base[list(self.rows)].to("cpu", torch.float64)


@dataclass(frozen=True)
class Vectors:
    """All changes of a merge that are not updates of matrices.

    Args:
        changes: sorted by name.
        base: the weights of the base, if they are at hand.
    """

    changes: tuple[Change, ...]
    base: BaseWeights | None

    def value(self, change: Change) -> Tensor:
        """What a file stores for a change, in the dtype of the inputs."""
        base = (
            self.base.tensor(change.name) if change.needs_base and self.base is not None else None
        )
        return change.value(base).to(change.dtype)

    def notes(self) -> dict[str, Any]:
        """For the report: how many biases and rows of embeddings there are."""
        rows, biases = (
            sum(len(change.rows) for change in self.of("rows")),
            len({c.name for c in self.changes if not c.rows}),
        )
        return ({"biases": biases} if biases else {}) | ({"token rows": rows} if rows else {})

    def of(self, how: str) -> list[Change]:
        return [change for change in self.changes if change.how == how]


def _order(item: tuple[tuple[str, str], object]) -> tuple[str, bool]:
    """By name; what replaces a tensor before what moves it:
    its share is that of the base, not of a moved one.
    """
    (name, how), _ = item
    return name, how == "moves"


def plan_vectors(
    method: object,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    scale: float,
    base: BaseWeights | None,
) -> Vectors:
    """Gather the changes of all adapters; headers only.

    Args:
        method: prepared.
        adapters, weights: in the order in which the method saw them.

    Raises:
        IncompatibleAdaptersError: a tensor has different shapes.
        MethodError: a value depends on the base's, and there is no model.
    """
    if not any(adapter.vectors for adapter in adapters):
        return Vectors((), base)
    parts: dict[tuple[str, str], list[Part]] = {}
    shares: dict[str, tuple[float, ...]] = {}
    for k, adapter in enumerate(adapters):
        for vector in adapter.vectors.values():
            factor = vector.scaling if vector.how == "moves" else 1.0
            module = vector.name.rpartition(".")[0]
            if module not in shares:
                shares[module] = coefficients(method, weights, module)
            share = shares[module][k]
            parts.setdefault((vector.name, vector.how), []).append(
                Part(adapter, vector, scale * share * factor)
            )
    changes = [
        Change(name, members[0].vector.spelled, how, tuple(members))
        for (name, how), members in sorted(parts.items(), key=_order)
    ]
    for change in changes:
        shapes: dict[str, Any] = {part.adapter.label: part.vector.shape for part in change.parts}
        if len({shape[1:] if change.rows else shape for shape in shapes.values()}) > 1:
            raise IncompatibleAdaptersError(
                f"tensor {change.name!r} of the base has different shapes: {shapes}"
            )
        if change.needs_base and base is None:
            having = sorted(part.adapter.label for part in change.parts)
            raise MethodError(
                f"{having} replace values of {change.name!r} that the other adapters leave alone "
                "(or the weights do not sum to 1), so the merged value depends on the base: "
                "merge(adapters, model=model)"
            )
    return Vectors(tuple(changes), base)


def check_vectors(vectors: Vectors, model: Any) -> dict[str, Tensor]:
    """The model's tensor for every change.

    Raises:
        ModelMismatchError: the model lacks one, or has one of another shape.
    """
    targets = find_tensors(model, {change.name for change in vectors.changes})
    for change in vectors.changes:
        shape = tuple(targets[change.name].shape)
        fits = (
            shape[1:] == change.shape[1:] and change.rows[-1] < shape[0]
            if change.rows
            else shape == change.shape
        )
        if not fits:
            rows = f"rows up to {change.rows[-1]} of " if change.rows else ""
            raise ModelMismatchError(
                f"the adapters change {rows}{change.name!r} {change.shape}, and the model has "
                f"{shape}"
            )
    return targets


def rows_before(
    vectors: Vectors, targets: Mapping[str, Tensor], adapted: Collection[str]
) -> dict[str, Tensor]:
    """By how much rows move that a LoRA of their embedding moves, too; float64.
    To be taken before the layers are added, for their deltas are from the base.

    Args:
        adapted: the modules that have a LoRA.
    """
    return {
        change.name: change.delta(targets[change.name])
        for change in vectors.of("rows")
        if change.module in adapted
    }


def apply_vectors(
    vectors: Vectors, targets: Mapping[str, Tensor], moved: Mapping[str, Tensor]
) -> None:
    """Write every change into the model's tensors, in place.

    Args:
        moved: what `rows_before` gave.
    """
    for change in vectors.changes:
        target = targets[change.name]
        if change.how == "moves":
            new = target.double().cpu() + change.value(None)
        elif change.name in moved:
            new = target[list(change.rows)].double().cpu() + moved[change.name]
        else:
            new = change.value(target)
        if not bool(torch.isfinite(new.to(target.dtype)).all()):
            raise NonFiniteError(f"the merged {change.name!r} is NaN or infinite in {target.dtype}")
        if change.rows:
            target[list(change.rows)] = new.to(target)
        else:
            target.copy_(new)
