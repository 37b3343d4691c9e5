"""torchtune's format: a `.pt` file with `layers.0.attn.q_proj.lora_a.weight` and so on, beside an
`adapter_config.json` with r and lora_alpha.

torchtune rotates neighbouring entries of a head where transformers rotates its halves, so the rows
of q_proj and k_proj stand in another order. How many heads there are is in the model's config. Of
Llama and Mistral, that is; other models are converted in other ways by torchtune and refused here.
https://github.com/pytorch/torchtune, torchtune/models/convert_weights.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import Tensor

from sapmerge.errors import AdapterConfigError, AdapterFormatError, ModelMismatchError
from sapmerge.io.files import shown
from sapmerge.io.formats.lora import Lora, Parts, Stored, pairs_of

__all__ = ["FILE", "read", "write"]

FILE = "adapter_model.pt"
_KEY = re.compile(r"(.+)\.lora_([ab])\.weight")
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_OUTPUT = {"output": "lm_head"}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_FAMILIES = ("llama", "mistral")


def read(
    stored: Stored, config: dict[str, Any], base: dict[str, Any] | None
) -> dict[str, dict[str, Lora]]:
    """The factors, by module of the component "", as transformers calls and orders them.

    Args:
        config: adapter_config.json, of which r and lora_alpha are read.
        base: the base model's config.

    Raises:
        AdapterConfigError: no r or no lora_alpha.
        AdapterFormatError: a tensor that is no part of a plain LoRA, or of no known module.
        ModelMismatchError: the base is another model than Llama or Mistral, is needed and not
            given, or has other shapes.
    """
    numbers = [config.get(key) for key in ("r", "lora_alpha")]
    if not all(isinstance(number, (int, float)) for number in numbers) or not numbers[0]:
        raise AdapterConfigError(f"{stored.where}: adapter_config.json has no r or no lora_alpha")
    scaling = float(numbers[1]) / float(numbers[0])  # pyright: ignore[reportArgumentType]
    found = defaultdict[str, dict[str, Tensor]](dict)
    for name, tensor in stored.tensors.items():
        match = _KEY.fullmatch(name)
        module = None if match is None else _renamed(match[1], _NAMES, "model.", _OUTPUT)
        if match is None or module is None:
            raise AdapterFormatError(
                f"{stored.where}: tensor {shown(name)} is none of a plain LoRA of torchtune's Llama"
            )
        found[module][match[2]] = tensor
    pairs = pairs_of(found, stored.where)
    order = _Order(base)
    return {
        "": {
            module: Lora(a, order.by_halves(module, b), scaling * a.shape[0])
            for module, (a, b, _) in pairs.items()
        }
    }


def write(parts: Parts, base: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config. Where scalings differ they are multiplied into B.

    Raises:
        AdapterFormatError: a module that torchtune's Llama has not.
        ModelMismatchError: as `read`.
    """
    if set(parts) != {""}:
        raise AdapterFormatError(f"torchtune's format has no components; got {', '.join(parts)}")
    modules, order = parts[""], _Order(base)
    ranks = {lora.rank for lora in modules.values()}
    if len(ranks) > 1:
        raise AdapterFormatError(f"torchtune has one rank for all modules; got {sorted(ranks)}")
    if len({lora.alpha for lora in modules.values()}) > 1:
        modules = {name: lora.unscaled() for name, lora in modules.items()}
    tensors, targets = dict[str, Tensor](), set[str]()
    theirs = {ours: name for name, ours in _NAMES.items()}
    for module, lora in modules.items():
        inner = module.removeprefix("model.")
        name = _renamed(inner, theirs, "", {"lm_head": "output"})
        if name is None or lora.kind != "linear" or (inner == module) != (module == "lm_head"):
            raise AdapterFormatError(f"torchtune's Llama has no {lora.kind} {shown(module)}")
        tensors[f"{name}.lora_a.weight"] = lora.a
        tensors[f"{name}.lora_b.weight"] = order.by_pairs(module, lora.b)
        targets.add(module.rpartition(".")[2])
    alpha = next(iter(modules.values())).alpha
    config = {
        "peft_type": "LORA",
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
    }
    return tensors, config


def _renamed(module: str, names: dict[str, str], prefix: str, others: dict[str, str]) -> str | None:
    match = _LAYER.fullmatch(module)
    if match is None:
        return others.get(module)
    return f"{prefix}layers.{match[1]}.{names[match[2]]}" if match[2] in names else None


class _Order:
    """The order of rows of the heads' projections, which the base's config tells."""

    def __init__(self, base: dict[str, Any] | None) -> None:
        if base is not None and base.get("model_type") not in _FAMILIES:
            raise ModelMismatchError(
                f"the base is a {shown(base.get('model_type'))}; torchtune's format is converted "
                f"for {' and '.join(_FAMILIES)}"
            )
        self._base = base

    def by_halves(self, module: str, b: Tensor) -> Tensor:
        """Rows in pairs (0, 1), (2, 3), ... of a head as its two halves."""
        shape = self._shape(module, b)
        return b if shape is None else _swapped(b, shape[0], shape[1] // 2, 2)

    def by_pairs(self, module: str, b: Tensor) -> Tensor:
        """The other way round."""
        shape = self._shape(module, b)
        return b if shape is None else _swapped(b, shape[0], 2, shape[1] // 2)

    def _shape(self, module: str, b: Tensor) -> tuple[int, int] | None:
        """Number and size of the heads; None for a projection whose order is the same."""
        key = _HEADS.get(module.rpartition(".")[2])
        if key is None:
            return None
        if self._base is None:
            raise ModelMismatchError(
                f"torchtune orders the rows of {shown(module)} by heads, and how many there are is "
                "in the config of the model: model=..."
            )
        attention = self._base.get("num_attention_heads")
        heads = self._base.get(key) or attention
        size = self._base.get("head_dim") or (
            self._base.get("hidden_size", 0) // attention if isinstance(attention, int) else 0
        )
        if not isinstance(heads, int) or heads * size != b.shape[0] or size % 2:
            raise ModelMismatchError(
                f"{shown(module)} has {b.shape[0]} rows; the model's config says {heads} heads of "
                f"{size}"
            )
        return heads, size


def _swapped(b: Tensor, heads: int, outer: int, inner: int) -> Tensor:
    rank = b.shape[1]
    return b.reshape(heads, outer, inner, rank).transpose(1, 2).reshape(-1, rank).contiguous()
