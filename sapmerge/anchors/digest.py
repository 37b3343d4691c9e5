"""What something is, by content: a digest of tensors, of nested data,
and of functions with all that they hold.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sapmerge.errors import AnchorError

__all__ = ["digest", "digest_of_model", "digest_of_weights"]

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    type(Ellipsis),
)

_NOT_THE_FUNCTION = {"training", "gradient_checkpointing", "name_or_path"}
"""Attributes of modules that say nothing about what eval mode computes."""


def digest(value: Any, everything: bool = True) -> str:
    """sha256 of data, or of a function: its bytecode, its defaults, what it encloses,
    and the state of its object.

    What a function finds by a global name (other functions, modules) is not looked into. An object
    counts with the bytecode of its class's methods; a module with its weights and settings, too.

    Args:
        everything: look into objects, too; without it only data in containers count.

    Raises:
        AnchorError: something of which the content cannot be told.
    """
    hasher = hashlib.sha256()
    for piece in _pieces(value, set(), everything):
        hasher.update(piece.encode() if isinstance(piece, str) else piece)
        hasher.update(b"\0")
    return hasher.hexdigest()


def digest_of_model(base: nn.Module) -> str:
    """Of a model's weights, buffers, modules, their plain attributes (an attention's scale) and
    configuration; LoRA parameters left out.
    """
    named = cast("Iterator[tuple[str, nn.Module]]", base.named_modules())
    parts = [
        (name, type(module).__qualname__, module.extra_repr(), _settings(module))
        for name, module in named
        if "lora_" not in name
    ]
    tensors = {name: tensor for name, tensor in base.named_parameters() if "lora_" not in name}
    tensors |= {name: tensor for name, tensor in base.named_buffers() if "lora_" not in name}
    config: Any = getattr(base, "config", None)
    settings = str(config.to_dict()) if hasattr(config, "to_dict") else ""
    return digest([parts, dict(sorted(tensors.items())), settings])


def digest_of_weights(base: nn.Module) -> str:
    """Of the values of a model's parameters and buffers by name, the same with adapters of PEFT
    beside them, wherever it was loaded from: what an output says about its model.
    """
    tensors = [*base.named_parameters(), *base.named_buffers()]
    own = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in tensors
        if "lora_" not in name and "modules_to_save." not in name
    }
    return digest(dict(sorted(own.items())), everything=False)


def _pieces(value: Any, within: set[int], everything: bool) -> Iterator[str | bytes | memoryview]:
    """A description, piece by piece; `within` are the objects that it is inside of."""
    if isinstance(value, _PLAIN):
        yield repr(value)
        return
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}"
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(cast("Any", value))
        if array.dtype.hasobject and everything:
            raise _unknown(value)
        yield f"{array.dtype} {array.shape}"
        yield array.tobytes()
        return
    if id(value) in within:
        yield "itself"
        return
    within = within | {id(value)}
    yield type(value).__qualname__
    if everything or isinstance(value, (Mapping, list, tuple)):
        for part in _held(value):
            yield from _pieces(part, within, everything)
    yield "end"


def _held(value: Any) -> list[Any]:
    """What a value is made of."""
    if isinstance(value, Mapping):
        return [part for item in cast("Mapping[Any, Any]", value).items() for part in item]
    if isinstance(value, (list, tuple)):
        return list(cast("list[Any]", value))
    if isinstance(value, (set, frozenset)):
        return sorted(digest(part) for part in cast("set[Any]", value))
    if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
        return [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, value.co_consts]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module):
        return [digest_of_model(value), _methods(value)]
    if hasattr(value, "__dict__"):
        return [type(value), _methods(value), vars(value)]
    raise _unknown(value)


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain attributes, by name: what a forward pass may multiply by, or branch on."""
    plain = (*_PLAIN, Tensor)
    found = [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _NOT_THE_FUNCTION
    ]
    return [
        (name, value)
        for name, value in sorted(found, key=lambda item: item[0])
        if all(
            isinstance(part, plain)
            for part in (cast("list[Any]", value) if isinstance(value, (list, tuple)) else [value])
        )
    ]


def _methods(value: Any) -> list[types.CodeType]:
    """The bytecode of what the class of an object defines and inherits, down to torch's own."""
    classes = [kind for kind in type(value).__mro__ if kind not in (object, nn.Module)]
    return [
        held.__code__
        for kind in classes
        for _, held in sorted(vars(kind).items())
        if isinstance(held, types.FunctionType)
    ]


def _unknown(value: Any) -> AnchorError:
    return AnchorError(
        f"cache=: whether a {type(value).__qualname__} is the same as in an earlier run cannot be "
        "told by its content; "
        "merge without a cache, or let the loss and the batches hold plain data, tensors and arrays"
    )
