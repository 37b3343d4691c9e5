"""A small federation: a model with every kind of module, and adapters for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from torch import Tensor

from tests.models import KINDS, Zoo, lora, save_lora

SMALL = r"q|enc\.q|layers\.1\.v"


def uploads(folder: Path, count: int, **options: Any) -> list[Path]:
    """Folders of random adapters, `client0` on."""
    options = {"targets": SMALL, **options}
    return [save_lora(folder / f"client{k}", seed=k, **options) for k in range(count)]


def pair(seed: int, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state_dict) of a random adapter."""
    peft_model = lora(Zoo(), seed, **{"targets": SMALL, **options})
    return peft_model.peft_config["default"].to_dict(), get_peft_model_state_dict(
        peft_model, save_embedding_layers=False
    )


def zoo() -> Zoo:
    return Zoo()


ALL = KINDS
