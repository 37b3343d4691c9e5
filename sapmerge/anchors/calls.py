"""One call of a module: what went in and what came out, if these are plain data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Call", "Traces", "version_of"]

_MOST = 100_000
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class Plain:
    """Nested containers of tensors and of plain values, taken apart.

    Args:
        leaves: tensors and plain values.
        form: the containers.
        versions: of the tensors; another one now means that a tensor was changed in place.
    """

    leaves: Sequence[Any]
    form: Any
    versions: Sequence[int]

    @staticmethod
    def of(data: Any) -> Plain | None:
        """None if the data is anything else, or asks for a gradient."""
        leaves, form = cast("tuple[list[Any], Any]", pytree.tree_flatten(data))
        tensors = [leaf for leaf in leaves if not isinstance(leaf, _PLAIN)]
        if not all(_is_data(leaf) for leaf in tensors):
            return None
        return Plain(leaves, form, _versions(leaves))

    def unchanged(self) -> bool:
        """Whether no tensor was changed in place."""
        return _versions(self.leaves) == self.versions

    def equals(self, other: Plain) -> bool:
        """Whether both hold the same bits in the same containers."""
        return self.form == other.form and all(map(_equal, self.leaves, other.leaves))

    def rebuilt(self) -> Any:
        """The data, in new containers."""
        return pytree.tree_unflatten(self.leaves, self.form)


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module.

    Args:
        inputs: its arguments.
        result: what it returned.
    """

    inputs: Plain
    result: Plain | None = None

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """A call that begins; None if the arguments are more than plain data."""
        inputs = _inputs(args, kwargs)
        return None if inputs is None else Call(inputs)

    def returning(
        self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call | None:
        """The call at its end; None if it changed its arguments,
        or returns more than plain data.
        """
        result = Plain.of(output)
        return (
            Call(self.inputs, result) if result is not None and self._begins(args, kwargs) else None
        )

    def equals(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether these are the same arguments, and neither the old ones nor the result were
        changed in place.
        """
        return self.result is not None and self.result.unchanged() and self._begins(args, kwargs)

    def output(self) -> Any:
        """What the call returned."""
        assert self.result is not None
        return self.result.rebuilt()

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the call keeps alive."""
        for side in (self.inputs, self.result):
            for leaf in () if side is None else side.leaves:
                if isinstance(leaf, Tensor):
                    yield leaf

    def _begins(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        inputs = _inputs(args, kwargs)
        return inputs is not None and self.inputs.unchanged() and self.inputs.equals(inputs)


def _inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Plain | None:
    """The arguments of a call, and what else in torch decides on its result."""
    kinds = ("cpu", "cuda")
    mode = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    return Plain.of((args, dict(kwargs), mode, torch.get_default_dtype()))


@dataclass(frozen=True, eq=False)
class Traces:
    """All that a module could leave a trace in: attributes, what is in their containers and
    objects, and the random state. Not what it finds by a global name.

    Args:
        values: attributes and what they hold, of the module and all its parts; kept, so that no id
            is used again.
        versions: of the tensors among them.
        random: the states of the generators.
    """

    values: Sequence[Any]
    versions: Sequence[int]
    random: Sequence[Tensor]

    @staticmethod
    def of(module: nn.Module) -> Traces:
        values, seen = list[Any](), set[int]()
        pending = [value for part in module.modules() for value in vars(part).values()]
        while pending and len(values) < _MOST:
            value = pending.pop()
            values.append(value)
            if id(value) not in seen:
                seen.add(id(value))
                pending += _held(value)
        if pending:
            values.append(object())  # too much to watch: never the same
        random = [torch.random.get_rng_state()]
        if torch.cuda.is_initialized():
            random += torch.cuda.get_rng_state_all()
        return Traces(values, _versions(values), random)

    def same(self, other: Traces) -> bool:
        """Whether nothing was written in between."""
        return (
            len(self.values) == len(other.values)
            and all(one is two for one, two in zip(self.values, other.values))
            and self.versions == other.versions
            and all(map(torch.equal, self.random, other.random))
        )


def _held(value: Any) -> list[Any]:
    """What a container or an object holds."""
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).values())
    if isinstance(value, (list, tuple, set, deque)):
        return list(cast("list[Any]", value))
    if isinstance(value, (nn.Module, Tensor, type, FunctionType, ModuleType)) or not hasattr(
        value, "__dict__"
    ):
        return []
    return list(cast("dict[str, Any]", vars(value)).values())


def _is_data(leaf: Any) -> bool:
    """Whether a leaf is an ordinary tensor, of which no derivative is wanted."""
    return (
        type(leaf) in (Tensor, nn.Parameter)
        and leaf.layout == torch.strided
        and not (leaf.requires_grad or leaf.is_inference() or leaf.is_meta)
        and not torch._C._functorch.is_functorch_wrapped_tensor(leaf)  # pyright: ignore
    )


def _versions(values: Sequence[Any]) -> list[int]:
    return [version_of(value) for value in values if isinstance(value, Tensor)]


def version_of(tensor: Tensor) -> int:
    """A number that grows when a tensor is changed in place;
    those of inference mode do not have it.
    """
    return -1 if tensor.is_inference() else tensor._version  # pyright: ignore[reportPrivateUsage]


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = (
            one.dtype == other.dtype
            and one.device == other.device
            and one.stride() == other.stride()
        )
        return same and torch.equal(one, other)
    return type(one) is type(other) and one == other
