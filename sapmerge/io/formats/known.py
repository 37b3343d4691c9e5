"""Names of the modules of a model that is at hand: loaded, or a folder of safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from sapmerge.errors import ModelMismatchError
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, shown
from sapmerge.io.formats.lora import read_json
from sapmerge.io.header import open_weights

__all__ = ["config_of", "modules_of"]


def modules_of(model: Any, component: str) -> frozenset[str] | None:
    """Names of the modules with a weight, of one component of a pipeline or of a model alone.

    Args:
        model: an `nn.Module`; a mapping component -> `nn.Module`; a folder of safetensors, or of a
            pipeline with one such folder for each component; None.
        component: "unet" and the like, "" for a model alone.

    Returns:
        None where nothing is known of the component.

    Raises:
        ModelMismatchError: `model` is something else, or a folder without safetensors.
    """
    if model is None:
        return None
    if isinstance(model, Mapping):
        table = cast("Mapping[str, Any]", model)
        return modules_of(table[component], "") if component in table else None
    if isinstance(model, nn.Module):
        return frozenset(
            name
            for name, module in _named(model)
            if isinstance(getattr(module, "weight", None), nn.Parameter)
        )
    if not isinstance(model, (str, os.PathLike)):
        raise ModelMismatchError(
            f"model= is a module, a mapping component -> module or a folder; got a "
            f"{type(model).__name__}"
        )
    folder = os.fspath(cast("str | os.PathLike[str]", model))
    inside = os.path.join(folder, component)
    if component and os.path.isdir(inside):
        folder = inside
    elif component and os.path.isfile(os.path.join(folder, "model_index.json")):
        return None  # a pipeline without this component
    return _in_folder(folder)


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def _in_folder(folder: str) -> frozenset[str]:
    names = set[str]()
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in files:
        path = os.path.join(folder, name)
        if name.endswith(".safetensors"):
            with RegularFile(path, shown(path)) as file:
                entries = open_weights(file, path, DEFAULT_LIMITS).entries
            names.update(
                tensor.removesuffix(".weight") for tensor in entries if tensor.endswith(".weight")
            )
    if not names:
        raise ModelMismatchError(
            f"model={shown(folder)} is no folder with the safetensors of a model"
        )
    return frozenset(names)


def config_of(model: Any) -> dict[str, Any] | None:
    """The config.json of a model, or of a loaded one of transformers; None without a model.

    Raises:
        ModelMismatchError: it has none.
    """
    if model is None:
        return None
    if isinstance(model, (str, os.PathLike)):
        folder = os.fspath(cast("str | os.PathLike[str]", model))
        path = os.path.join(folder, "config.json")
        if not os.path.isfile(path):
            raise ModelMismatchError(f"model={shown(folder)} has no config.json")
        return read_json(path)
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise ModelMismatchError(f"a {type(model).__name__} has no config")
    return dict(cast("Any", config).to_dict())
