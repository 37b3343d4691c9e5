"""The data of a client, and what it trains: the digits and domains of `sapmerge demo`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from sapmerge.demo.data import anchor_batches, generator, load_digits, split
from sapmerge.demo.domains import DOMAINS, render
from sapmerge.demo.training import Plan, accuracy, train_adapter, train_base

PLAN = Plan(base_steps=600, adapter_steps=120)
SEED = 0


def setting(context: Any, name: str) -> str:
    """Of the run; in one process, which has no run config, of the environment:
    ONE_SHOT_LEFT_OUT for "left-out".
    """
    return os.environ.get("ONE_SHOT_" + name.upper().replace("-", "_")) or str(
        context.run_config[name]
    )


def sources(left_out: str) -> list[str]:
    return [name for name in DOMAINS if name != left_out]


def make_base(folder: Path) -> None:
    digits = load_digits()
    train_base(digits.take(split(digits.labels, 32, SEED).train), PLAN, SEED, folder / "base")


def base_model(folder: Path) -> Any:
    model = CLIPModel.from_pretrained(folder / "base")
    model.name_or_path = "digits-clip"
    return model


def train(folder: Path, client: int, left_out: str) -> tuple[Path, int]:
    """An adapter of the client's domain. Client 6 has shuffled labels, client 7 sends NaN."""
    names = sources(left_out)
    name = names[client % len(names)]
    digits = load_digits()
    indices = split(digits.labels, 32, SEED).sources[name]
    mine = digits.take(indices[client // len(names) :: 3])  # clients of one domain share no image
    if client == 6:
        mine = replace(
            mine,
            labels=mine.labels[torch.randperm(len(mine.labels), generator=generator(SEED, "lie"))],
        )
    out = folder / "clients" / f"client{client}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        adapted = train_adapter(
            base_model(folder), mine, DOMAINS[name], f"{name}{client}", PLAN, SEED, out
        )
        if client == 7:
            next(p for n, p in adapted.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
            adapted.save_pretrained(str(out), save_embedding_layers=False)
    return out, len(mine)


def anchors() -> list[dict[str, torch.Tensor]]:
    digits = load_digits()
    return anchor_batches(digits.take(split(digits.labels, 32, SEED).anchors), SEED)


def test(model: Any, left_out: str) -> float:
    digits = load_digits()
    unseen = digits.take(split(digits.labels, 32, SEED).test)
    return accuracy(
        model,
        render(unseen.images, DOMAINS[left_out], generator(SEED, "test", left_out)),
        unseen.labels,
    )
