"""The format of mlx-lm: `adapters.safetensors` with `<module>.lora_a` (inputs, r) and `.lora_b`
(r, outputs), and `adapter_config.json` with one scale for all: W + scale (A B)^T.

Modules of language models are called as in transformers. https://github.com/ml-explore/mlx-lm,
mlx_lm/tuner/lora.py and utils.py
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any, cast

from torch import Tensor

from sapmerge.errors import AdapterConfigError, AdapterFormatError, ModelMismatchError
from sapmerge.io.files import shown
from sapmerge.io.formats.known import modules_of
from sapmerge.io.formats.lora import Lora, Parts, Stored, pairs_of

__all__ = ["FILE", "read", "write"]

FILE = "adapters.safetensors"
_KEY = re.compile(r"(.+)\.lora_([ab])")
_ALIKE = re.compile(r"(?:model\.layers\.\d+\..+|model\.embed_tokens|lm_head)")
"""What mlx-lm calls as transformers does."""
_IN_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")
_EMBEDDING = "embed_tokens"


def read(stored: Stored, config: dict[str, Any], model: Any = None) -> dict[str, dict[str, Lora]]:
    """The factors, by module of the component "".

    Raises:
        AdapterConfigError: another kind of fine-tuning than LoRA, or no scale.
        AdapterFormatError: a tensor that is no part of a plain LoRA (DoRA, experts), or a module
            that may be called otherwise in transformers.
        ModelMismatchError: the model has no such module.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterConfigError(f"{stored.where}: fine_tune_type is {shown(kind)}, not 'lora'")
    parameters = config.get("lora_parameters")
    table = cast("dict[str, object]", parameters) if isinstance(parameters, dict) else {}
    scale = table.get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise AdapterConfigError(
            f"{stored.where}: adapter_config.json has no lora_parameters.scale"
        )
    found = defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in stored.tensors.items():
        match = _KEY.fullmatch(name)
        if match is None or tensor.ndim != 2:
            raise AdapterFormatError(
                f"{stored.where}: tensor {shown(name)} is none of a plain LoRA of mlx-lm"
            )
        found[match[1]][match[2]] = tensor.T.contiguous()
    known = modules_of(model, "")
    for module in found:
        if known is None and not _ALIKE.fullmatch(module):
            raise AdapterFormatError(
                f"{stored.where}: whether transformers calls {shown(module)} so, only the model "
                "can tell: model=..."
            )
        if known is not None and module not in known:
            raise ModelMismatchError(f"{stored.where}: the model has no module {shown(module)}")
    pairs = pairs_of(found, stored.where)
    return {
        "": {
            module: Lora(a, b, scale * a.shape[0], _kind(module))
            for module, (a, b, _) in pairs.items()
        }
    }


def _kind(module: str) -> str:
    return "embedding" if module.rpartition(".")[2] == _EMBEDDING else "linear"


def write(parts: Parts, base_model: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config. Where scalings differ they are multiplied into B.

    Raises:
        AdapterFormatError: a module that mlx-lm may call otherwise, or that is no matrix.
    """
    if set(parts) != {""}:
        raise AdapterFormatError(f"mlx-lm's format has no components; got {', '.join(parts)}")
    modules = parts[""]
    scalings = {lora.alpha / lora.rank for lora in modules.values()}
    if len(scalings) > 1:
        modules, scalings = {name: lora.unscaled() for name, lora in modules.items()}, {1.0}
    tensors = dict[str, Tensor]()
    for module, lora in modules.items():
        if not _ALIKE.fullmatch(module) or lora.kind != _kind(module):
            raise AdapterFormatError(
                f"how mlx-lm calls the {lora.kind} {shown(module)} is not known: only modules of "
                "model.layers, model.embed_tokens and lm_head are converted"
            )
        tensors[f"{module}.lora_a"] = lora.a.T.contiguous()
        tensors[f"{module}.lora_b"] = lora.b.T.contiguous()
    matches = [(module, _IN_LAYER.fullmatch(module)) for module in modules]
    ranks = Counter(lora.rank for lora in modules.values())
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all
        "lora_parameters": {
            "rank": ranks.most_common(1)[0][0],
            "scale": scalings.pop(),
            "dropout": 0.0,
            "keys": sorted({match[1] if match else module for module, match in matches}),
        },
    }
    return tensors, config if base_model is None else {"model": base_model, **config}
