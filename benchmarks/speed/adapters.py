"""Adapters with random weights, written as PEFT writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from speed.shapes import Shapes

__all__ = ["extract", "write_adapters"]


def write_adapters(
    folder: Path, shapes: Shapes, rank: int, count: int, dtype: torch.dtype
) -> list[Path]:
    """`count` adapters of one rank, folder/0, folder/1, ...; those that are there are kept.

    Singular values of the factors fall off as those of trained adapters do, so that a cut of the
    rank has something to choose. lora_alpha is twice the rank.
    """
    decay = torch.linspace(1.0, 0.05, rank)
    for k in range(count):
        target = folder / str(k)
        if (target / "adapter_config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(k)
        tensors: dict[str, torch.Tensor] = {}
        for name, (m, n) in shapes.items():
            a = torch.randn(rank, n, generator=generator) / n**0.5
            b = torch.randn(m, rank, generator=generator) * decay / m**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
        _write(target, tensors, rank, sorted(shapes))
    return [folder / str(k) for k in range(count)]


def extract(folder: Path, module: str, target: Path) -> Path:
    """The adapter in `folder` as it would be if it had one module only, written to `target`."""
    keys = [f"base_model.model.{module}.{factor}.weight" for factor in ("lora_A", "lora_B")]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in keys}
    target.mkdir(parents=True, exist_ok=True)
    _write(target, tensors, tensors[keys[0]].shape[0], [module])
    return target


def _write(target: Path, tensors: dict[str, torch.Tensor], rank: int, modules: list[str]) -> None:
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
