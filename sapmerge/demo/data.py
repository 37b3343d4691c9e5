"""Real handwritten digits, split once by instance, and image-text pairs made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from sapmerge.core.layer import seed_of
from sapmerge.demo.domains import DOMAINS, Style, generic, render
from sapmerge.demo.extras import extra

__all__ = [
    "CLASSES",
    "Digits",
    "LENGTH",
    "Splits",
    "VOCABULARY",
    "anchor_batches",
    "captions",
    "generator",
    "load_digits",
    "pairs",
    "split",
]

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of the digit {}", "an image of a {}", "a handwritten {}", "the number {}")
WORDS = {word for text in (*TEMPLATES, *CLASSES) for word in text.split()} - {"{}"}
VOCABULARY = ("<pad>", "<start>", "<unknown>", "<end>", *sorted(WORDS))
"""The words of the tokenizer, by id. The end is not 2:
`CLIPTextModel` treats that id in a way of its own.
"""
LENGTH = 8
"""Of every caption, in words."""
TEST = 400
"""How many digits are tested on."""


@dataclass(frozen=True, eq=False)
class Digits:
    """Grey digits and what they are.

    Args:
        images: (n, 8, 8) in [0, 1].
        labels: (n,), 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class Splits:
    """Which digit is used for what, as indices; anchors, test and train share no digit,
    nor do two sources.

    Args:
        anchors: of the anchors.
        test: of every accuracy.
        train: of the base model's training, all the rest.
        sources: of each domain's adapter, by domain: a quarter of `train` each.
    """

    anchors: Tensor
    test: Tensor
    train: Tensor
    sources: Mapping[str, Tensor]


def generator(seed: int, *purpose: str) -> Generator:
    """A generator for one purpose, independent of all others."""
    return Generator().manual_seed(seed_of("demo", seed, *purpose))


def load_digits() -> Digits:
    """The 1797 digits that scikit-learn carries (UCI optical recognition of handwritten digits)."""
    bunch = extra("sklearn.datasets").load_digits()
    return Digits(
        torch.tensor(bunch.images, dtype=torch.float32) / 16,
        torch.tensor(bunch.target, dtype=torch.long),
    )


def split(labels: Tensor, anchors: int, seed: int) -> Splits:
    """Split by instance, every part with all classes in equal number as far as it goes.

    Args:
        labels: (n,).
        anchors: how many digits are set aside for the anchors.
        seed: of the shuffle.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "split"))
    one_hot = torch.nn.functional.one_hot(labels[order], len(CLASSES))
    # the first of every class, then the second of every class, ...
    turn = (one_hot.cumsum(0) * one_hot).sum(1)
    order = order[torch.argsort(turn, stable=True)]
    train = order[anchors + TEST :]
    cuts = [len(train) * k // len(DOMAINS) for k in range(len(DOMAINS) + 1)]
    sources = {domain: train[start:end] for domain, start, end in zip(DOMAINS, cuts, cuts[1:])}
    return Splits(order[:anchors], order[anchors : anchors + TEST], train, sources)


def captions(labels: Sequence[int], templates: Sequence[int]) -> dict[str, Tensor]:
    """Tokens of texts like "a photo of the digit three", padded to one length.

    Args:
        labels: classes.
        templates: which template, for each.

    Returns:
        `input_ids` and `attention_mask`, (n, LENGTH).
    """
    words = {word: k for k, word in enumerate(VOCABULARY)}
    texts = [
        TEMPLATES[template].format(CLASSES[label])
        for label, template in zip(labels, templates, strict=True)
    ]
    rows = [["<start>", *text.split(), "<end>"] for text in texts]
    ids = torch.tensor([[words[word] for word in row] + [0] * (LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def pairs(digits: Digits, style: Style, rng: Generator) -> dict[str, Tensor]:
    """One image-text pair per digit: the keyword arguments of a `CLIPModel`."""
    templates = torch.randint(len(TEMPLATES), (len(digits),), generator=rng)
    images = render(digits.images, style, rng)
    return {
        "pixel_values": images,
        **captions([int(k) for k in digits.labels], [int(k) for k in templates]),
    }


def anchor_batches(digits: Digits, seed: int, batch_size: int = 16) -> list[dict[str, Tensor]]:
    """The anchors: generic image-text pairs, as a list of batches."""
    rng = generator(seed, "anchors")
    rows = torch.arange(len(digits))
    return [
        pairs(digits.take(rows[k : k + batch_size]), generic, rng)
        for k in range(0, len(rows), batch_size)
    ]
