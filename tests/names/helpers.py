"""Adapters of tiny transformers models, written under other names,
and PEFT as the oracle of what they do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models import PREFIX, quietly

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QV = ["q_proj", "v_proj"]
Make = Callable[[], nn.Module]


def seeded(build: Make) -> Make:
    """The same weights at every call."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return make


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **more}))


def qwen_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    text = dict(TEXT, rope_parameters=rope)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def train(make: Make, path: Path, seed: int, base: str = "org/base", **settings: Any) -> Path:
    """A folder written by PEFT; every trainable parameter was moved."""
    model = quietly(
        get_peft_model, make(), LoraConfig(**{"r": 4, "init_lora_weights": False} | settings)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    quietly(model.save_pretrained, str(path))
    return reconfigured(path, base_model_name_or_path=base)


def reconfigured(path: Path, **changes: object) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def renamed(path: Path, name: str, change: Callable[[str], str], **config: object) -> Path:
    """A copy of an adapter whose tensors have other names."""
    out = path.parent / name
    shutil.copytree(path, out)
    file = out / "adapter_model.safetensors"
    save_file({change(key): value.contiguous() for key, value in load_file(file).items()}, file)
    return reconfigured(out, **config) if config else out


def modules(path: Path) -> set[str]:
    return {
        name.removeprefix(PREFIX).split(".lora_")[0]
        for name in load_file(path / "adapter_model.safetensors")
        if ".lora_" in name
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    return {
        k.replace(".base_layer.", "."): v.double()
        for k, v in model.state_dict().items()
        if v.is_floating_point()
    }


def folded(make: Make, path: Path) -> dict[str, Tensor]:
    """The weights of the base with one adapter merged into it by PEFT."""
    return state(quietly(PeftModel.from_pretrained, make(), str(path)).merge_and_unload())


def mean(make: Make, paths: Sequence[Path]) -> dict[str, Tensor]:
    """base + mean over adapters of (base with it - base)."""
    base, parts = state(make()), [folded(make, path) for path in paths]
    return {
        key: value + sum(part[key] - value for part in parts) / len(parts)
        for key, value in base.items()
    }


def agree(make: Make, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every change of a weight is right, and what must not move has not moved."""
    base, moved = state(make()), 0
    for key, value in wanted.items():
        size = float((value - base[key]).norm())
        moved += size > 1e-9
        assert float((got[key] - value).norm()) <= 1e-4 * max(size, 1e-3), key
    assert moved
