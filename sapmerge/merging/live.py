"""Adapters of a live PeftModel: what belongs to them, and how one is taken out again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sapmerge.errors import ModelMismatchError
from sapmerge.merging.run import Run
from sapmerge.naming import Names, base_of

__all__ = ["activate", "ask", "delete", "live_parameters", "names_in", "own_heads"]


def ask(asking: Mapping[nn.Parameter, bool]) -> None:
    """Let parameters ask for a gradient as they did."""
    for parameter, was in asking.items():
        parameter.requires_grad = was


def activate(peft_model: Any, adapter: Any, tuners: list[str]) -> None:
    """Back to the adapters that were active, in the model and in its layers."""
    if peft_model.active_adapter != adapter or list(peft_model.active_adapters) != tuners:
        peft_model.base_model.set_adapter(tuners)
        peft_model.active_adapter = adapter


def delete(peft_model: Any, adapter_name: str) -> None:
    """Take an adapter out, if it is there."""
    if adapter_name in peft_model.peft_config:
        peft_model.delete_adapter(adapter_name)


def names_in(peft_model: Any, run: Run) -> Mapping[str, str]:
    """Key -> where a live model has the module, of everything that the merge changes."""
    own = Names(peft_model)
    tensors = (*run.heads.chosen, *(change.name for change in run.vectors.changes))
    keys = own.locate({name.rpartition(".")[0]: None for name in tensors})
    return own.located(run.stream.modules.values()) | {
        module: own.paths[key] for module, key in keys.items()
    }


def live_parameters(peft_model: Any, parameters: Sequence[str]) -> list[str]:
    """How `target_parameters` of a live model's other adapters say the same:
    PEFT wants one wording for all of them.

    Raises:
        ModelMismatchError: they mean other parameters.
    """
    known = [config.target_parameters for config in peft_model.peft_config.values()]
    wording = next((list(targets) for targets in known if targets), list(parameters))
    names = [_LORA_INFIX.sub("", name) for name, _ in base_of(peft_model).named_parameters()]
    meant = {name for name in names if any(f".{name}".endswith(f".{target}") for target in wording)}
    if meant != set(parameters):
        raise ModelMismatchError(
            "PEFT wants all adapters of a model to adapt the same parameters; those that are "
            f"there adapt {sorted(meant ^ set(parameters))[0]!r} and the merged one does not, or "
            "the other way round. Use save_pretrained or apply_to"
        )
    return wording


_LORA_INFIX = re.compile(r"\.base_layer(?=\.)")


def own_heads(peft_model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The heads that PEFT gives to every adapter of a model:
    copies of the base's, also where the merge has none.
    """
    from peft.utils import ModulesToSaveWrapper

    return {
        f"{name}.{key}": tensor
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }
