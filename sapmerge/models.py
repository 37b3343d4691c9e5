"""Finding an adapter's modules in a live model, whichever transformers version spelled their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sapmerge.errors import ModelMismatchError
from sapmerge.io.contents import Module
from sapmerge.io.names import canonical

__all__ = [
    "base_of",
    "canonical_in",
    "check_untied",
    "device_of",
    "find_modules",
    "find_saved",
    "model_names",
    "tensor_name",
    "weight_view",
]


def base_of(model: Any) -> nn.Module:
    """The plain model inside a PeftModel, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return cast("nn.Module", inner() if inner is not None and hasattr(model, "peft_config") else model)


def model_names(model: Any) -> Mapping[str, str]:
    """Canonical name -> the name that the model uses, without the wrappers that PEFT inserts."""
    base = base_of(model)
    names = cast("list[str]", [name for name, _ in base.named_modules()])  # pyright: ignore[reportUnknownVariableType]
    return {canonical_in(base, name): name for name in names if name and ".lora_" not in name}


def tensor_name(name: str, names: Mapping[str, str]) -> str:
    """A canonical tensor name, e.g. "classifier.weight", as the model with those module names spells it."""
    module, _, last = name.rpartition(".")
    return f"{names.get(module, module)}.{last}"


def canonical_in(base: nn.Module, name: str) -> str:
    """The canonical name of a module or tensor of a model."""
    family = getattr(getattr(base, "config", None), "model_type", "")
    return canonical(name, {"base_model_name_or_path": family})


def find_modules(model: Any, wanted: Mapping[str, Module]) -> dict[str, nn.Module]:
    """The model's module for every adapted module.

    Raises:
        ModelMismatchError: modules are missing, or their weight has another shape.
    """
    base, names = base_of(model), model_names(model)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ModelMismatchError(
            f"{type(base).__name__} has no module {missing[0]!r}"
            + (f" (nor {len(missing) - 1} others of the {len(wanted)} adapted ones)" if len(missing) > 1 else "")
            + f"; it has e.g. {list(names.values())[-3:]}. Is it the adapters' base model?"
        )
    found: dict[str, nn.Module] = {}
    for name, spec in wanted.items():
        module = base.get_submodule(names[name])
        module = cast("nn.Module", getattr(module, "base_layer", module))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ModelMismatchError(f"module {name!r} ({type(module).__name__}) has no floating-point weight")
        shape = matrix_shape(module, weight)
        if shape != spec.shape:
            raise ModelMismatchError(
                f"module {name!r} has a weight matrix {shape} in {type(base).__name__}, but the adapters' update is "
                f"{spec.shape}"
            )
        found[name] = module
    return found


def matrix_shape(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """(outputs, inputs) of a module's weight, seen as the matrix that an update is added to."""
    if _transposed(module):
        return weight.shape[1], weight.shape[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups != 1:
        raise ModelMismatchError(f"{module} has groups: updates of grouped convolutions are not supported")
    return weight.shape[0], weight.numel() // max(1, weight.shape[0])


def weight_view(module: nn.Module, matrix: Tensor) -> Tensor:
    """An (outputs, inputs) matrix in the layout of the module's weight."""
    return matrix.T if _transposed(module) else matrix.reshape(cast("Tensor", module.weight).shape)


def _transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def check_untied(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Refuse to write to a weight that another module uses too: an adapter changes one of them, a write both.

    Args:
        weights: what is written to, by the name that a message shows.

    Raises:
        ModelMismatchError: one of them is shared.
    """
    users: dict[int, list[str]] = {}
    for name, parameter in base_of(model).named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    for name, weight in weights.items():
        sharing = users.get(id(weight), [])
        if len(sharing) > 1:
            raise ModelMismatchError(
                f"the weight of {name!r} is tied ({', '.join(sharing)}): writing to it would change both. Use "
                "save_pretrained or add_to, or untie the weights first"
            )


def find_saved(model: Any, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The model's own tensor for every tensor of a module that was saved whole.

    Args:
        wanted: canonical tensor name -> shape.

    Raises:
        ModelMismatchError: it has none, or one of another shape.
    """
    state, names = cast("dict[str, Tensor]", base_of(model).state_dict(keep_vars=True)), model_names(model)
    own = {name.replace(".original_module.", "."): tensor for name, tensor in state.items()}
    targets: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        target = own.get(tensor_name(name, names))
        if target is None or tuple(target.shape) != shape:
            found = "none" if target is None else str(tuple(target.shape))
            raise ModelMismatchError(
                f"the adapters save {name!r} {shape}, and the model has {found}; modules_to_save='drop' leaves it out"
            )
        targets[name] = target
    return targets


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter lives."""
    return next((parameter.device for parameter in cast("nn.Module", model).parameters()), torch.device("cpu"))
