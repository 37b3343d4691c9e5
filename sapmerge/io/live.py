"""Configs and adapters that are already in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn

from sapmerge.errors import AdapterConfigError, MethodError
from sapmerge.io.files import shown
from sapmerge.io.modules import Module

__all__ = ["check_live_scaling", "config_bytes", "live_adapter"]


def _mapping(value: object) -> Mapping[str, object] | None:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else None


def config_bytes(config: object, where: str) -> bytes:
    """A config object as the JSON that PEFT would have saved."""

    def plain(value: object) -> object:
        if isinstance(value, set | frozenset):
            return sorted(cast("set[str]", value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"{type(value).__name__} is not JSON")

    to_dict = cast("Callable[[], object] | None", getattr(config, "to_dict", None))
    table = _mapping(to_dict() if to_dict else config)
    if table is None:
        raise AdapterConfigError(
            f"{where}: {shown(type(config).__name__)} is no config; pass a dict or a LoraConfig"
        )
    try:
        return json.dumps(dict(table), default=plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterConfigError(
            f"{where}: cannot be written as JSON ({shown(str(error))})"
        ) from None


def live_adapter(model: nn.Module, adapter_name: str) -> tuple[object, Mapping[str, Tensor]]:
    """The config and the tensors of one adapter of a live `PeftModel`."""
    configs = _mapping(cast("object", getattr(model, "peft_config", None))) or {}
    if adapter_name not in configs:
        raise MethodError(
            f"the model has no adapter {shown(adapter_name)}; it has {shown(sorted(configs))}"
        )
    from peft import get_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]

    # The embeddings of the base are no part of the adapter, even where PEFT would save them with
    # it.
    tensors = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False
    )
    return configs[adapter_name], tensors


def check_live_scaling(
    model: nn.Module, adapter_name: str, modules: Mapping[str, Module], source: str
) -> None:
    """A live layer may have been rescaled (`set_scale`); its config then tells another story."""
    layers: dict[str, nn.Module] = dict(model.named_modules())  # pyright: ignore[reportUnknownArgumentType]
    for module in modules.values():
        layer = layers.get(f"base_model.model.{module.spelled}")
        scaling = (_mapping(cast("object", getattr(layer, "scaling", None))) or {}).get(
            adapter_name
        )
        if isinstance(scaling, int | float) and not math.isclose(
            scaling, module.scaling, rel_tol=1e-6
        ):
            raise AdapterConfigError(
                f"{source}: module {shown(module.name)} is scaled by {scaling:g} in the live "
                f"model, by {module.scaling:g} in its config; undo set_scale first"
            )
