"""A tiny CLIP trained from scratch, a LoRA for each domain, and the accuracy of either."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapmerge.demo.data import CLASSES, LENGTH, VOCABULARY, Digits, captions, generator, pairs
from sapmerge.demo.domains import SIZE, Style, generic
from sapmerge.demo.extras import extra

__all__ = ["Plan", "accuracy", "train_adapter", "train_base"]


@dataclass(frozen=True)
class Plan:
    """How long to train, and how fast.

    Args:
        base_steps: steps of the base model.
        adapter_steps: steps of each adapter.
        batch_size: pairs in a step.
        base_rate: highest learning rate of the base model.
        adapter_rate: highest learning rate of the adapters.
        rank: of the adapters.
    """

    base_steps: int = 900
    adapter_steps: int = 200
    batch_size: int = 64
    base_rate: float = 1.5e-3
    adapter_rate: float = 1e-3
    rank: int = 8


def _unseen() -> None:
    """Nobody watches."""


def train_base(
    digits: Digits, plan: Plan, seed: int, path: Path, stepped: Callable[[], None] = _unseen
) -> Any:
    """Train a `CLIPModel` from scratch on the generic style, and save it.

    Args:
        digits: what to train on.
        plan: how.
        seed: of the weights and the batches.
        path: folder to write.
        stepped: is called after every step.
    """
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    model = _untrained()
    _train(
        model,
        digits,
        generic,
        plan.base_steps,
        plan.batch_size,
        plan.base_rate,
        generator(seed, "base"),
        stepped,
    )
    with _no_progress_bar():
        model.save_pretrained(str(path))
    model.name_or_path = str(path)  # PEFT writes it into the adapters' config
    return model


def train_adapter(
    model: Any,
    digits: Digits,
    style: Style,
    domain: str,
    plan: Plan,
    seed: int,
    path: Path,
    stepped: Callable[[], None] = _unseen,
) -> Any:
    """Train a LoRA of the vision tower on one domain, and save it with PEFT.

    Args:
        model: the base; it stays as it is.
        digits: what to train on.
        style: how to draw it.
        domain: the name of the style, for the random numbers.
        plan: how to train.
        seed: of the weights and the batches.
        path: folder to write.
        stepped: is called after every step.

    Returns:
        The `PeftModel`, on a copy of the base.
    """
    peft = extra("peft")
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    config = peft.LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules=r".*vision_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    )
    with warnings.catch_warnings():
        # PEFT reads a name that transformers 5 deprecates
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    batches = generator(seed, "adapter", domain)
    steps, size, rate = plan.adapter_steps, plan.batch_size, plan.adapter_rate
    _train(adapted, digits, style, steps, size, rate, batches, stepped)
    adapted.save_pretrained(str(path), save_embedding_layers=False)
    return adapted


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """The share of images whose nearest caption "a photo of the digit ..." is the right one.

    Args:
        model: a CLIPModel, with or without adapters.
        images: (n, 3, SIZE, SIZE) in [-1, 1].
        labels: (n,).
    """
    prompts = captions(range(len(CLASSES)), [0] * len(CLASSES))
    guesses: list[Tensor] = [
        model(pixel_values=images[k : k + 200], **prompts).logits_per_image.argmax(1)
        for k in range(0, len(images), 200)
    ]
    return float((torch.cat(guesses) == labels).float().mean())


@contextmanager
def _no_progress_bar() -> Generator[None]:
    logging = extra("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _untrained() -> Any:
    """A CLIP of 160 thousand random parameters: 3 vision layers and 1 text layer of width 64."""
    transformers = extra("transformers")
    tower = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "projection_dim": 64,
    }
    text = {
        **tower,
        "num_hidden_layers": 1,
        "vocab_size": len(VOCABULARY),
        "max_position_embeddings": LENGTH,
        "pad_token_id": VOCABULARY.index("<pad>"),
        "bos_token_id": VOCABULARY.index("<start>"),
        "eos_token_id": VOCABULARY.index("<end>"),
    }
    vision = {**tower, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": SIZE // 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    )


def _train(
    model: Any,
    digits: Digits,
    style: Style,
    steps: int,
    batch_size: int,
    rate: float,
    batches: torch.Generator,
    stepped: Callable[[], None],
) -> None:
    weights: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = digits.take(torch.randint(len(digits), (batch_size,), generator=batches))
        loss = _soft_contrastive(
            model(**pairs(batch, style, batches)).logits_per_text, batch.labels
        )
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        schedule.step()
        stepped()
    model.eval()


def _soft_contrastive(logits: Tensor, labels: Tensor) -> Tensor:
    """InfoNCE in which every pair of one class is a positive:
    a batch holds each digit several times.
    """
    same = (labels[:, None] == labels[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
