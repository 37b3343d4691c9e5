"""The data of a client, and what it trains: the digits and domains of `sapmerge demo`."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from sapmerge.demo.data import CLASSES, anchor_batches, captions, generator, load_digits, split
from sapmerge.demo.domains import DOMAINS, render
from sapmerge.demo.training import Plan, train_adapter, train_base

PLAN = Plan(base_steps=600, adapter_steps=120)
LIAR, BROKEN = 6, 7  # the clients with shuffled labels, and with NaN


def setting(context: Any, name: str) -> str:
    """Of the run; in one process, which has no run config, of the environment:
    ONE_SHOT_LEFT_OUT for "left-out".
    """
    return os.environ.get("ONE_SHOT_" + name.upper().replace("-", "_")) or str(
        context.run_config[name]
    )


def sources(left_out: str) -> list[str]:
    return [name for name in DOMAINS if name != left_out]


def make_base(folder: Path, seed: int) -> None:
    digits = load_digits()
    train_base(digits.take(split(digits.labels, 32, seed).train), PLAN, seed, folder / "base")


def base_model(folder: Path) -> Any:
    model = CLIPModel.from_pretrained(folder / "base")
    model.name_or_path = "digits-clip"
    return model


def train(folder: Path, client: int, left_out: str, seed: int) -> tuple[Path, int]:
    """An adapter of the client's domain. Client 6 has shuffled labels, client 7 sends NaN."""
    names = sources(left_out)
    name = names[client % len(names)]
    digits = load_digits()
    indices = split(digits.labels, 32, seed).sources[name]
    mine = digits.take(indices[client // len(names) :: 3])  # clients of one domain share no image
    if client == LIAR:
        mine = replace(
            mine,
            labels=mine.labels[torch.randperm(len(mine.labels), generator=generator(seed, "lie"))],
        )
    out = folder / "clients" / f"client{client}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        adapted = train_adapter(
            base_model(folder), mine, DOMAINS[name], f"{name}{client}", PLAN, seed, out
        )
        if client == BROKEN:
            next(p for n, p in adapted.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
            adapted.save_pretrained(str(out), save_embedding_layers=False)
    return out, len(mine)


def anchors(seed: int) -> list[dict[str, torch.Tensor]]:
    digits = load_digits()
    return anchor_batches(digits.take(split(digits.labels, 32, seed).anchors), seed)


@torch.no_grad()
def right(model: Any, left_out: str, seed: int) -> list[bool]:
    """Of every test image of the domain that no client has, whether it is called right."""
    digits = load_digits()
    unseen = digits.take(split(digits.labels, 32, seed).test)
    images = render(unseen.images, DOMAINS[left_out], generator(seed, "test", left_out))
    prompts = captions(range(len(CLASSES)), [0] * len(CLASSES))
    called = model(pixel_values=images, **prompts).logits_per_image.argmax(1)
    return (called == unseen.labels).tolist()


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.replace(path)
