"""Merged layers as PEFT stores them: one module's factors,
or those of several layers that PEFT keeps in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapmerge.core.linalg import finite
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import NonFiniteError
from sapmerge.io.kinds.attention import TWICE
from sapmerge.io.kinds.experts import order_of, packed
from sapmerge.io.modules import Module

__all__ = ["Bundle", "Bundler"]


@dataclass(frozen=True)
class Bundle:
    """The tensors of layers that share one rank in PEFT.

    Args:
        tensors: name -> tensor, without the prefix.
        ranks: module or parameter -> rank.
        parameters: which of them are parameters.
    """

    tensors: Mapping[str, Tensor]
    ranks: Mapping[str, int]
    parameters: tuple[str, ...] = ()


_NOTHING = Bundle({}, {})


class Bundler:
    """Gathers what belongs together: all experts of a parameter,
    both projections of an nn.MultiheadAttention.

    Layers come sorted by name, so that what belongs together comes together.

    Args:
        modules: all layers of the merge.
        names: canonical name -> the name that the model uses.
        dtype: of the output; factors are rounded once.
    """

    def __init__(
        self, modules: Mapping[str, Module], names: Mapping[str, str], dtype: torch.dtype
    ) -> None:
        self._depths, self._names, self._dtype = _depths(modules.values()), names, dtype
        self._group = list[tuple[Module, Update]]()

    def add(self, module: Module, update: Update) -> Bundle:
        """Take one layer. What is finished, which may be nothing.

        Raises:
            NonFiniteError: a factor overflows the dtype.
        """
        done = _NOTHING
        if self._group and _key(self._group[0][0]) != _key(module):
            done = self.finish()
        self._group.append((module, update))
        return done

    def finish(self) -> Bundle:
        """What was gathered last."""
        group, self._group = self._group, []
        return _bundle(group, self._depths, self._names, self._dtype) if group else _NOTHING


def _key(module: Module) -> tuple[str, str]:
    if module.kind == "parameter":
        return module.owner, module.parameter
    return (
        (module.owner, "attention") if module.kind in ("in_proj", "out_proj") else (module.name, "")
    )


def _depths(modules: Iterable[Module]) -> dict[tuple[str, str], int]:
    """(module, parameter) -> how many other parameters of the module are wrapped around it."""
    owners: dict[str, set[str]] = {}
    for module in modules:
        if module.kind == "parameter":
            owners.setdefault(module.owner, set()).add(module.parameter)
    return {
        (owner, parameter): depth
        for owner, parameters in owners.items()
        for depth, parameter in enumerate(
            reversed(order_of(sorted(parameters), owner, "the output"))
        )
    }


def _bundle(
    group: Sequence[tuple[Module, Update]],
    depths: Mapping[tuple[str, str], int],
    names: Mapping[str, str],
    dtype: torch.dtype,
) -> Bundle:
    first, rank = group[0][0], max(1, *(update.rank for _, update in group))
    name = names.get(first.owner, first.owner)
    factors = [_rounded(module, update, rank, dtype) for module, update in group]
    if first.kind == "parameter":
        path = name + ".base_layer" * depths[_key(first)]
        numbered = sorted(zip(group, factors, strict=True), key=lambda pair: pair[0][0].expert)
        a, b = packed([low for _, low in numbered], rank)
        parameter = f"{name}.{first.parameter}"
        tensors = {f"{path}.lora_A.weight": a.contiguous(), f"{path}.lora_B.weight": b.contiguous()}
        return Bundle(tensors, {parameter: rank}, (parameter,))
    tensors: dict[str, Tensor] = {}
    for (module, _), low in zip(group, factors, strict=True):
        path = f"{name}.base_layer.out_proj" if module.kind == "out_proj" else name
        tensors |= {f"{path}.{key}": tensor for key, tensor in _as_stored(module, low).items()}
    return Bundle(tensors, {name: rank})


def _rounded(module: Module, update: Update, rank: int, dtype: torch.dtype) -> LowRank:
    """The factors in the output's dtype, padded with zeros to the rank of their bundle."""
    assert isinstance(update, LowRank)
    if module.kind == "out_proj":
        update = update.scaled(1 / TWICE)
    b, a = update.B.to("cpu", dtype), update.A.to("cpu", dtype)
    if not (finite(a) and finite(b)):
        raise NonFiniteError(
            f"the merged update of layer {module.name!r} overflows the output's {dtype}"
        )
    missing = rank - update.rank
    if missing:
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], 1)
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
    return replace(update, B=b, A=a)


def _as_stored(module: Module, low: LowRank) -> dict[str, Tensor]:
    a, b = low.A, low.B
    if module.kind == "embedding":
        return {"lora_embedding_A": a.contiguous(), "lora_embedding_B": b.contiguous()}
    a = a.reshape(a.shape[0], *module.a_shape[1:])
    b = b.reshape(*b.shape, *module.b_shape[2:])
    return {"lora_A.weight": a.contiguous(), "lora_B.weight": b.contiguous()}
