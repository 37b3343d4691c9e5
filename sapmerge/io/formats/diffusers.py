"""diffusers' format: `pytorch_lora_weights.safetensors` with `<component>.<module>.lora_A.weight`,
or `.lora.down.weight` and still older names. The scaling is 1 unless the file has alphas or
diffusers' own metadata.

https://github.com/huggingface/diffusers, src/diffusers/utils/state_dict_utils.py and
loaders/lora_base.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from typing import Any

from torch import Tensor

from sapmerge.errors import AdapterFormatError
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import shown
from sapmerge.io.formats.lora import Lora, Parts, Stored, pairs_of

__all__ = ["FILE", "is_diffusers", "read", "write"]

FILE = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_COMPONENT = r"(unet|transformer(?:_2)?|text_encoder(?:_[23])?|prior)\."
_NEW = re.compile(_COMPONENT + r"(.+?)\.(?:lora_(A|B)\.weight|(alpha))")
_OLD = re.compile(_COMPONENT + r"(.+?)\.(?:lora|lora_linear_layer)\.(down|up)\.weight")
_OLDEST = re.compile(_COMPONENT + r"(.+?)\.to_(q|k|v|out)_lora\.(down|up)\.weight")


def is_diffusers(names: list[str]) -> bool:
    """Whether tensors are called as in this format."""
    return any(_named(name) for name in names)


def _named(name: str) -> tuple[str, str, str] | None:
    """Component, module, and which part of it a tensor is."""
    name = name.replace(".processor.", ".")
    match = _NEW.fullmatch(name)
    if match:
        return match[1], match[2], match[4] or match[3].lower()
    match = _OLD.fullmatch(name)
    if match:
        return match[1], match[2], "a" if match[3] == "down" else "b"
    match = _OLDEST.fullmatch(name)
    if match is None:
        return None
    text = match[1].startswith("text")
    leaf = f"{match[3]}_proj" if text else "to_out.0" if match[3] == "out" else f"to_{match[3]}"
    return match[1], f"{match[2]}.{leaf}", "a" if match[4] == "down" else "b"


def read(stored: Stored) -> dict[str, dict[str, Lora]]:
    """The factors, by component and module.

    Raises:
        AdapterFormatError: a tensor that is no part of a plain LoRA, or metadata that does not fit.
    """
    found = defaultdict[str, dict[str, dict[str, Tensor]]](lambda: defaultdict(dict))
    for name, tensor in stored.tensors.items():
        named = _named(name)
        if named is None:
            raise AdapterFormatError(
                f"{stored.where}: tensor {shown(name)} is none of a plain LoRA in diffusers' "
                "format, or does not begin with its component (unet., transformer., text_encoder.)"
            )
        component, module, part = named
        if part in found[component][module]:
            raise AdapterFormatError(f"{stored.where}: {shown(name)} is there under two names")
        found[component][module][part] = tensor
    configs = _configs(stored)
    parts = dict[str, dict[str, Lora]]()
    for component, modules in found.items():
        pairs = pairs_of(modules, stored.where)
        told = {module: pair[2] for module, pair in pairs.items()}
        if component in configs:
            told = _alphas(configs[component], pairs, f"{stored.where}, {component}")
        parts[component] = {
            module: Lora(
                a,
                b,
                float(a.shape[0]) if (alpha := told[module]) is None else alpha,
                "conv" if a.ndim == 4 else "linear",
            )
            for module, (a, b, _) in pairs.items()
        }
    return parts


def _configs(stored: Stored) -> dict[str, dict[str, Any]]:
    """Component -> the LoraConfig that diffusers keeps in the metadata."""
    if _METADATA not in stored.metadata:
        return {}
    found = defaultdict[str, dict[str, Any]](dict)
    try:
        for key, value in json.loads(stored.metadata[_METADATA]).items():
            component, _, name = key.partition(".")
            found[component][name] = value
    except (ValueError, AttributeError):
        raise AdapterFormatError(
            f"{stored.where}: {_METADATA} of its metadata is not what diffusers writes"
        ) from None
    return found


def _alphas(
    config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor, float | None]], where: str
) -> dict[str, float | None]:
    """Module -> alpha, read from a config as the adapters' reader reads it."""
    state = dict[str, Tensor]()
    for module, (a, b, alpha) in pairs.items():
        if alpha is not None:
            raise AdapterFormatError(f"{where}: {shown(module)} has an alpha and metadata, too")
        state[f"base_model.model.{module}.lora_A.weight"] = a
        state[f"base_model.model.{module}.lora_B.weight"] = b
    adapter = Adapter.from_state_dict({**config, "peft_type": "LORA"}, state)
    if any(module.method for module in adapter.modules.values()):
        raise AdapterFormatError(f"{where}: the metadata says that it is no plain LoRA")
    by_file = {module.spelled: module for module in adapter.modules.values()}
    return {module: by_file[module].scaling * a.shape[0] for module, (a, _, _) in pairs.items()}


def write(parts: Parts) -> dict[str, Tensor]:
    """The tensors of the file; scalings are multiplied into B, for what reads the file may know
    no other than 1.

    Raises:
        AdapterFormatError: a component or a kind of module that the format does not have.
    """
    tensors = dict[str, Tensor]()
    for component, modules in parts.items():
        for module, lora in modules.items():
            key, plain = f"{component}.{module}", lora.unscaled()
            if lora.kind == "embedding" or not _NEW.fullmatch(f"{key}.lora_A.weight"):
                raise AdapterFormatError(
                    f"diffusers' format has no {lora.kind} {shown(module)} of "
                    f"{shown(component)}; name the component: unet=..."
                )
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = plain.a, plain.b
    return tensors
