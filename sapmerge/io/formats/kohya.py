"""kohya's format, which most programs for Stable Diffusion read: one safetensors file with
`lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, and `lora_te_` for the text
encoder (`lora_te1_`, `lora_te2_` for the two of SDXL). Without an alpha the scaling is 1.

https://github.com/kohya-ss/sd-scripts, networks/lora.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, ModelMismatchError
from sapmerge.io.files import shown
from sapmerge.io.formats.flat import flattened, unflattened
from sapmerge.io.formats.known import modules_of
from sapmerge.io.formats.lora import Lora, Parts, Stored, pairs_of

__all__ = ["is_kohya", "read", "write"]

_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_TENSORS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}
_KEY = re.compile(r"(lora_(?:unet|te[123]?)_)([^.]+)\.(.+)")


def is_kohya(names: list[str]) -> bool:
    """Whether tensors are called as in this format."""
    return any(_KEY.fullmatch(name) for name in names)


def read(stored: Stored, model: Any = None) -> dict[str, dict[str, Lora]]:
    """The factors, by component and module.

    Raises:
        AdapterFormatError: a tensor that is no part of a plain LoRA (LoHa, LoKr, DoRA), or a name
            of which nobody can tell the module.
        ModelMismatchError: the model has no such module, or two of that flat name.
    """
    found = defaultdict[str, dict[str, dict[str, Tensor]]](lambda: defaultdict(dict))
    for name, tensor in stored.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or match[3] not in _TENSORS:
            raise AdapterFormatError(
                f"{stored.where}: tensor {shown(name)} is none of a plain LoRA in kohya's format"
            )
        component, part = _COMPONENTS[match[1]], _TENSORS[match[3]]
        module = found[component][match[2]]
        if part in module:
            raise AdapterFormatError(f"{stored.where}: {shown(name)} is there as lora_te_ as well")
        module[part] = tensor
    parts = dict[str, dict[str, Lora]]()
    for component, modules in found.items():
        names = _names(sorted(modules), component, model, stored.where)
        pairs = pairs_of(modules, stored.where)
        parts[component] = {
            names[flat]: Lora(
                a, b, a.shape[0] if alpha is None else alpha, "conv" if a.ndim == 4 else "linear"
            )
            for flat, (a, b, alpha) in pairs.items()
        }
    return parts


def _names(flat: list[str], component: str, model: Any, where: str) -> dict[str, str]:
    """Flat name -> module."""
    known = modules_of(model, component)
    own = defaultdict[str, list[str]](list)
    for module in sorted(known or ()):
        own[flattened(module)].append(module)
    names, taken = dict[str, str](), dict[str, str]()
    for name in flat:
        module = unflattened(name, component)
        if known is not None:
            if len(own[name]) > 1:
                raise ModelMismatchError(
                    f"{where}: {shown(name)} may be {' or '.join(map(shown, own[name]))} of the "
                    "model"
                )
            module = own[name][0] if own[name] else module
            if module not in known:
                raise ModelMismatchError(
                    f"{where}: {shown(name)} is no module of the model's {component}"
                )
        if module is None:
            raise AdapterFormatError(
                f"{where}: nobody can tell which module of the {component} {shown(name)} is, for "
                "its dots are underscores; give the model: model=..."
            )
        if module in taken:
            raise AdapterFormatError(
                f"{where}: {shown(name)} and {shown(taken[module])} are one module"
            )
        names[name], taken[module] = module, name
    return names


def write(parts: Parts) -> dict[str, Tensor]:
    """The tensors of the file.

    Raises:
        AdapterFormatError: a component or a kind of module that the format does not have, or two
            modules of one flat name.
    """
    two = "text_encoder_2" in parts or "text_encoder_3" in parts
    prefixes = {component: prefix for prefix, component in _COMPONENTS.items()}
    prefixes["text_encoder"] = "lora_te1_" if two else "lora_te_"
    tensors = dict[str, Tensor]()
    for component, modules in parts.items():
        if component not in prefixes:
            raise AdapterFormatError(
                f"kohya's format has the components {', '.join(sorted(prefixes))}; which is "
                f"{shown(component)}? Name it: unet=..."
            )
        for module, lora in modules.items():
            if lora.kind == "embedding":
                raise AdapterFormatError(f"kohya's format has no embeddings ({shown(module)})")
            key = prefixes[component] + flattened(module)
            if f"{key}.alpha" in tensors:
                raise AdapterFormatError(f"two modules would be called {shown(key)}")
            tensors[f"{key}.lora_down.weight"] = lora.a
            tensors[f"{key}.lora_up.weight"] = lora.b
            tensors[f"{key}.alpha"] = torch.tensor(lora.alpha, dtype=torch.float32)
    return tensors
