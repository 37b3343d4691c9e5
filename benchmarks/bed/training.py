"""Clients of one family, trained together and kept as PEFT checkpoints."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from dg.data import Domain
from dg.training import ALPHA, BATCH, RANK, Regime
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from bed.half import Half

__all__ = ["REGIMES", "Client", "Regime", "train"]

REGIMES = {"A": Regime(40, 4, 7e-4), "M": Regime(24, 8, 1.5e-3), "B": Regime(14, 16, 3e-3)}
"""A: many images, few steps. B: few images, many steps, large updates. M lies between."""


@dataclass(frozen=True, eq=False)
class Client:
    """What one client trains on, and from where.

    Args:
        data: tokens and labels.
        init: of the random A, and of the order of the images.
        order: of the images alone.
        path: of its checkpoint.
    """

    data: Domain
    init: str
    order: str
    path: Path


def generator(text: str) -> torch.Generator:
    """A generator seeded by a text."""
    return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))


def train(half: Half, clients: Sequence[Client], text: Tensor, regime: Regime) -> None:
    """A rank-8 LoRA on every linear layer for each client that has no checkpoint yet.

    Cross-entropy on 20 times the cosines with the texts. Everybody makes as many steps as a client
    with `regime.images` per class does.
    """
    clients = [client for client in clients if not (client.path / "adapter_config.json").exists()]
    if not clients:
        return
    model = half.bfloat16_copy()
    steps = max(1, round(regime.epochs * regime.images * len(text) / BATCH))
    batches = torch.stack(
        [_batches(len(c.data.labels), steps, generator(c.order)) for c in clients], 1
    )
    factors, parameters = {}, []
    starts = [generator(client.init) for client in clients]
    for name in half.targets():
        m, n = half.get_submodule(name).weight.shape
        A = torch.stack(
            [(torch.rand(RANK, n, generator=g) * 2 - 1) / n**0.5 for g in starts]
        ).requires_grad_()
        B = torch.zeros(len(clients), m, RANK, requires_grad=True)
        factors[name] = (B, A)
        parameters += [A, B]
    optimizer = torch.optim.AdamW(parameters, lr=regime.rate)
    for rows in batches:
        tokens = torch.stack([client.data.images[row] for client, row in zip(clients, rows)])
        labels = torch.stack([client.data.labels[row] for client, row in zip(clients, rows)])
        scaled = {name: (B * (ALPHA / RANK), A) for name, (B, A) in factors.items()}
        features = functional.normalize(model(tokens, scaled).float(), dim=-1)
        logits = half.logit_scale.exp() * features @ text.T
        loss = (
            functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            / BATCH
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for k, client in enumerate(clients):
        _save(
            client.path, {name: (B[k].detach(), A[k].detach()) for name, (B, A) in factors.items()}
        )


def _batches(count: int, steps: int, shuffle: torch.Generator) -> Tensor:
    """(steps, BATCH) indices over shuffled passes;
    batches go across the end of a pass, so that all are full.
    """
    passes = -(-steps * BATCH // count)
    order = torch.cat([torch.randperm(count, generator=shuffle) for _ in range(passes)])
    return order[: steps * BATCH].view(steps, BATCH)


def _save(path: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    from peft import LoraConfig

    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.mkdir(parents=True)
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(factors)).save_pretrained(scratch)
    try:
        scratch.rename(path)
    except OSError:  # another process was faster, with the same result
        shutil.rmtree(scratch)
