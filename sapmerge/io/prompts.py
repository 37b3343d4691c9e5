"""Checkpoints that hold a soft prompt: PEFT's prompt, p-, prefix and CPT tuning,
and CoOp's context vectors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import AdapterConfigError, AdapterFormatError, NonFiniteError
from sapmerge.io.adapter import CONFIG, WEIGHTS
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, shown
from sapmerge.io.header import open_weights
from sapmerge.io.strict_json import parse

__all__ = ["CONTEXT", "EMBEDDINGS", "SoftPrompt", "read_prompt"]

EMBEDDINGS, CONTEXT = "prompt_embeddings", "ctx"
_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT")
_BUFFERS = ("token_prefix", "token_suffix")
_MULTITASK = ("prefix_task_cols", "prefix_task_rows")


@dataclass(frozen=True, eq=False)
class SoftPrompt:
    """One checkpoint, in memory.

    Args:
        config: of PEFT; None for context vectors.
        tensors: `prompt_embeddings` (virtual tokens, width) or `ctx`, and modules that were saved
            whole.
        buffers: of CoOp: they belong to class names, and are no part of the prompt.
        digest: of the tensors.
    """

    label: str
    config: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]
    buffers: tuple[str, ...]
    digest: str

    @property
    def name(self) -> str:
        """Of the prompt's tensor."""
        return CONTEXT if self.config is None else EMBEDDINGS


def read_prompt(checkpoint: object, label: str) -> SoftPrompt:
    """A folder of PEFT, (config, state_dict), a safetensors file with `ctx`,
    or a state dict with `ctx`.

    Raises:
        AdapterFormatError: it is none of these, or holds other tensors.
        AdapterConfigError: it is of a kind that cannot be averaged.
        NonFiniteError: a value is NaN or infinite.
    """
    where = f"prompt {shown(label)}"
    if isinstance(checkpoint, (str, os.PathLike)):
        path = os.path.abspath(os.fsdecode(cast("str", checkpoint)))
        if os.path.isdir(path):
            with RegularFile(os.path.join(path, CONFIG), f"{where}, {CONFIG}") as file:
                raw = bytes(file.read(0, min(file.size, DEFAULT_LIMITS.config_bytes + 1)))
            config: Mapping[str, Any] | None = parse(raw, f"{where}, {CONFIG}", DEFAULT_LIMITS)
            tensors = _stored(os.path.join(path, WEIGHTS), f"{where}, {WEIGHTS}")
        elif path.endswith(".safetensors"):
            config, tensors = None, _stored(path, where)
        else:
            raise AdapterFormatError(
                f"{where}: expected a folder of PEFT or a .safetensors file with {CONTEXT!r}. A "
                "pickle can hold code: "
                "if you trust its author, load it with torch.load and give the state dict"
            )
    elif isinstance(checkpoint, tuple) and len(cast("tuple[object, ...]", checkpoint)) == 2:
        given, tensors = cast("tuple[Any, Mapping[str, Tensor]]", checkpoint)
        config = given.to_dict() if hasattr(given, "to_dict") else dict(given)
    elif isinstance(checkpoint, Mapping):
        config, tensors = None, cast("Mapping[str, Tensor]", checkpoint)
    else:
        raise AdapterFormatError(
            f"{where}: a {type(cast('object', checkpoint)).__name__} is no checkpoint of a prompt"
        )
    return _sorted(label, where, config, tensors)


def _stored(path: str, where: str) -> dict[str, Tensor]:
    with RegularFile(path, where) as file:
        weights = open_weights(file, path, DEFAULT_LIMITS)
        weights.scan(file)
    return {name: weights.read(name) for name in weights.entries}


def _sorted(
    label: str, where: str, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> SoftPrompt:
    """Every tensor has a place, or the checkpoint is refused."""
    if config is not None:
        kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
        config = {**config, "peft_type": kind}
        if kind == "MULTITASK_PROMPT_TUNING" or any(name in tensors for name in _MULTITASK):
            raise AdapterConfigError(
                f"{where}: a multitask prompt is a product of factors, and the mean of products "
                "is not the product of means; save the prompts of single tasks"
            )
        if kind not in _TYPES:
            raise AdapterConfigError(
                f"{where}: peft_type {shown(kind)} is no prompt; expected one of "
                f"{', '.join(_TYPES)}"
            )
    wanted = CONTEXT if config is None else EMBEDDINGS
    plain = {name.removeprefix("prompt_learner."): tensor for name, tensor in tensors.items()}
    if wanted not in plain:
        raise AdapterFormatError(
            f"{where}: has no tensor {wanted!r}; it has {shown(sorted(plain)[:5])}"
        )
    saved = tuple(cast("list[str]", (config or {}).get("modules_to_save") or ()))
    buffers: list[str] = []
    kept: dict[str, Tensor] = {}
    for name, tensor in sorted(plain.items()):
        if config is None and name in _BUFFERS:
            buffers.append(name)
            continue
        inside = any(f".{module}." in f".{name}" for module in saved)
        if name != wanted and not inside:
            raise AdapterFormatError(
                f"{where}: tensor {shown(name)} has no place in a checkpoint of a prompt"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise NonFiniteError(f"{where}: tensor {shown(name)} is not finite numbers")
        kept[name] = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256()
    for name, tensor in kept.items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return SoftPrompt(label, config, kept, tuple(buffers), digest.hexdigest())
