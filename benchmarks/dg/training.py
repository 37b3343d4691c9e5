"""One LoRA per client, trained once and cached as a PEFT checkpoint."""

from __future__ import annotations

import copy
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dg.data import Domain
from dg.encoders import Encoder
from sapmerge.losses import embedding

__all__ = ["REGIMES", "Regime", "train"]

RANK, ALPHA, BATCH = 8, 16, 32


@dataclass(frozen=True)
class Regime:
    """How clients train.

    Args:
        images: per class.
        epochs: passes over them.
        rate: the learning rate of AdamW.
    """

    images: int
    epochs: float
    rate: float


REGIMES = {"A": Regime(60, 4, 5e-4), "B": Regime(20, 20, 3e-3)}
"""A: many images, few steps. B: few images, many steps, large updates."""


def train(
    encoder: Encoder,
    data: Domain,
    text: Tensor,
    regime: Regime,
    seed: int,
    path: Path,
    init: str = "shared",
) -> Path:
    """A rank-8 LoRA on every linear layer of the image tower's blocks:
    cross-entropy on the cosines with the texts.

    Args:
        init: "shared": A is drawn by the seed alone, so all clients start from one;
            "own": by the path's name, too.
    """
    if (path / "adapter_config.json").exists():
        return path
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed if init == "shared" else zlib.crc32(f"{seed} {path.name}".encode()))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=encoder.targets())
    model = get_peft_model(copy.deepcopy(encoder.model), config).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=regime.rate
    )
    classes, generator = text.to(encoder.device), torch.Generator().manual_seed(seed)
    steps = round(regime.epochs * len(data.labels) / BATCH)
    for index in _batches(len(data.labels), steps, generator):
        with torch.autocast(encoder.device.type, torch.bfloat16):
            features = embedding(
                model.get_base_model(),
                {"pixel_values": encoder.pixels(data.images[index])},
                "image",
            )
        loss = functional.cross_entropy(
            encoder.logit_scale * features @ classes.T, data.labels[index].to(encoder.device)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    model.save_pretrained(scratch)
    scratch.rename(path)
    return path


def _batches(count: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Index batches of `BATCH` over shuffled passes;
    batches go across the end of a pass, so that all are full.
    """
    passes = -(-steps * BATCH // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    return list(order[: steps * BATCH].split(BATCH))
