"""Biases and rows of embeddings as a PEFT checkpoint, or an adapter of a live model,
stores them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapmerge.core.linalg import finite
from sapmerge.errors import (
    IncompatibleAdaptersError,
    MethodError,
    ModelMismatchError,
    NonFiniteError,
)
from sapmerge.io.modules import Module
from sapmerge.merging.vectors import Change, Vectors
from sapmerge.models import tensor_name

__all__ = ["VectorOutput", "for_checkpoint", "for_live_model"]


@dataclass(frozen=True)
class VectorOutput:
    """What is written beside the factors.

    Args:
        moved: module -> the change of its bias, for `lora_B.bias`; PEFT then wants one for every
            adapted module.
        replaced: tensors of the base that are stored whole.
        rows: rows of embeddings.
    """

    moved: Mapping[str, Tensor] | None
    replaced: Mapping[str, Tensor]
    rows: Mapping[str, tuple[Change, Tensor]]
    dtype: torch.dtype = field(default=torch.float32)

    def tensors(self, adapted: Mapping[str, Module], names: Mapping[str, str]) -> dict[str, Tensor]:
        """Name without prefix -> tensor.

        Args:
            adapted: the layers of the output.
            names: canonical name -> the name that the model uses.
        """
        stored: dict[str, Tensor] = {}
        owners = {module.owner: module for module in adapted.values()}
        if self.moved is not None:
            for owner, module in owners.items():
                bias = self.moved.get(owner, torch.zeros(module.shape[0]))
                stored[f"{names.get(owner, owner)}.lora_B.bias"] = bias.to(self.dtype)
        for name, value in self.replaced.items():
            owner, _, leaf = name.rpartition(".")
            outer = owner.removesuffix(".out_proj")
            if owner != outer and outer in owners:
                spelled = f"{names.get(outer, outer)}.base_layer.out_proj.base_layer.{leaf}"
            else:
                inner = ".base_layer" if owner in owners else ""
                spelled = f"{names.get(owner, owner)}{inner}.{leaf}"
            stored[spelled] = value
        for name, (_, value) in self.rows.items():
            module = tensor_name(name, names).rpartition(".")[0]
            stored[f"{module}.token_adapter.trainable_tokens_delta"] = value
        for name, value in stored.items():
            if not finite(value):
                raise NonFiniteError(
                    f"the merged tensor {name!r} is NaN or infinite in {value.dtype}"
                )
        return {name: value.contiguous() for name, value in stored.items()}

    def config(self, adapted: Mapping[str, Module], names: Mapping[str, str]) -> dict[str, Any]:
        """What the config has to say about them."""
        fields: dict[str, Any] = {}
        if self.moved is not None:
            fields["lora_bias"] = True
        if self.replaced:
            owners = {module.owner for module in adapted.values()}
            fields["bias"] = (
                "lora_only" if all(_module(name) in owners for name in self.replaced) else "all"
            )
        if self.rows:
            fields["trainable_token_indices"] = {
                tensor_name(name, names).rpartition(".")[0]: list(change.rows)
                for name, (change, _) in self.rows.items()
            }
        return fields


def for_checkpoint(
    vectors: Vectors, adapted: Mapping[str, Module], dtype: torch.dtype
) -> VectorOutput:
    """The form of a folder. Where PEFT knows no `lora_bias`,
    what moves the base's bias is added to it.

    Raises:
        MethodError: that needs the base, and there is no model.
        IncompatibleAdaptersError: an embedding with a LoRA has trained rows, too.
    """
    moves = {change.module: change.value(None) for change in vectors.of("moves")}
    replaced = {change.name: vectors.value(change) for change in vectors.of("replaces")}
    odd = _odd(adapted.values())
    if moves and odd is not None:
        if vectors.base is None:
            raise MethodError(
                f"some adapters have lora_bias, and PEFT has no lora_bias for {odd.kind} layers "
                f"such as {odd.name!r}: "
                "to store whole biases instead, the base is needed: merge(adapters, model=model)"
            )
        for module, delta in moves.items():
            name = f"{module}.bias"
            before = replaced.get(name, vectors.base.tensor(name))
            replaced[name] = (before.double() + delta).to(dtype)
        moves = {}
    return VectorOutput(moves or None, replaced, _rows(vectors, adapted), dtype)


def for_live_model(
    vectors: Vectors, adapted: Mapping[str, Module], dtype: torch.dtype
) -> VectorOutput:
    """The form of an adapter beside others: what replaces a bias of the base becomes a move of it.

    Args:
        vectors: with the live model's base.

    Raises:
        ModelMismatchError: a bias of a module that the adapter does not adapt.
        IncompatibleAdaptersError: an embedding with a LoRA has trained rows, too.
    """
    moves = {change.module: change.value(None) for change in vectors.of("moves")}
    plain = {module.owner for module in adapted.values()}
    odd = _odd(adapted.values())
    for change in vectors.of("replaces"):
        if change.module not in plain or odd is not None:
            raise ModelMismatchError(
                f"the merged adapter replaces {change.name!r}, which is no bias that one adapter "
                "of several can have for itself; use save_pretrained or apply_to"
            )
        assert vectors.base is not None
        base = vectors.base.tensor(change.name)
        delta = change.value(base) - base.double()
        moves[change.module] = moves.get(change.module, torch.zeros_like(delta)) + delta
    if moves and odd is not None:
        raise ModelMismatchError(
            f"PEFT has no lora_bias for {odd.kind} layers such as {odd.name!r}; use apply_to"
        )
    return VectorOutput(moves or None, {}, _rows(vectors, adapted), dtype)


def _rows(vectors: Vectors, adapted: Mapping[str, Module]) -> dict[str, tuple[Change, Tensor]]:
    """Rows of embeddings with their values.

    Raises:
        IncompatibleAdaptersError: an embedding has a LoRA as well.
    """
    rows = vectors.of("rows")
    both = next((change.module for change in rows if change.module in adapted), None)
    if both is not None:
        raise IncompatibleAdaptersError(
            f"the embedding {both!r} has a LoRA in one adapter and trained rows of tokens "
            "(trainable_token_indices) in another, and PEFT loads no adapter with both: write the "
            "result into the base with apply_to or save_merged"
        )
    return {change.name: (change, vectors.value(change)) for change in rows}


def _odd(modules: Iterable[Module]) -> Module | None:
    """A layer for which PEFT has no `lora_bias`."""
    return next((module for module in modules if module.kind not in ("linear", "conv")), None)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
