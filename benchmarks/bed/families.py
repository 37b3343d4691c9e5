"""The families of domains, and which half of them may decide anything.

A family is a `dg.data.Task`: domains with the same classes, and public image-text pairs (the
anchors). Any folder domain/class/image in the bundle, and any npz of digits, is one; the others are
made from real images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from dg.data import Domain, Task, digits, pictures
from dg.encoders import unit
from torch import Generator, Tensor
from torch.nn import functional

from bed.styles import CORRUPTIONS, STYLES, Style, rotated, textured, toned

__all__ = ["FAMILIES", "LANGUAGE", "choosing", "confirming"]

SIZE, DIGIT = 160, 64
"""Pixels per side."""

Maker = Callable[[Path], Task]


def _styled(source: Domain, styles: Mapping[str, Style], batch: int = 128) -> dict[str, Domain]:
    """The same images in every style, row for row."""
    domains = {}
    for name, style in styles.items():
        generator = Generator().manual_seed(0)
        parts = [style(part.float() / 255, generator) for part in source.images.split(batch)]
        domains[name] = Domain((torch.cat(parts) * 255).round().to(torch.uint8), source.labels)
    return domains


def _some(styles: Mapping[str, Style], names: str) -> dict[str, Style]:
    return {name: styles[name] for name in names.split()}


def _pacs(bundle: Path) -> Task:
    return pictures(bundle, "pacs", SIZE)


def _digits(bundle: Path) -> Task:
    return digits(bundle, DIGIT)


def _made(
    name: str,
    base: Callable[[Path], Task],
    domain: str,
    styles: Callable[[Task], Mapping[str, Style]],
) -> Maker:
    """A family made from one domain of another."""

    def make(bundle: Path) -> Task:
        task = base(bundle)
        source = task.domains[domain]
        some = torch.cat(
            [(source.labels == k).nonzero().flatten()[:110] for k in range(len(task.text))]
        )
        domains = _styled(source.take(some), styles(task))
        return Task(name, domains, task.text, task.anchor_images, task.anchor_text)

    return make


def _donors(task: Task) -> dict[str, Style]:
    given = {
        "art": task.domains["art_painting"],
        "cartoon": task.domains["cartoon"],
        "coco": task.anchor_images,
    }
    found: dict[str, Style] = {"plain": lambda x, _: x}
    for name, source in given.items():
        images = source.images if isinstance(source, Domain) else source
        found[name] = toned(images[:: max(1, len(images) // 100)].float() / 255)
    found["noise"] = toned(torch.rand(50, 3, SIZE, SIZE, generator=Generator().manual_seed(1)))
    return found


def _textures(task: Task) -> dict[str, Style]:
    """Four textures, each of ten COCO photos enlarged in the middle:
    those of the most and the least fine detail.
    """
    centre = task.anchor_images[:, :, 40:120, 40:120].float() / 255
    large = functional.interpolate(centre, size=SIZE, mode="bilinear")
    order = (large.diff(dim=3).abs().mean((1, 2, 3))).argsort()
    groups = {
        "smooth": order[:10],
        "soft": order[45:55],
        "rough": order[-60:-50],
        "fine": order[-10:],
    }
    return {name: textured(large[index]) for name, index in groups.items()}


COCO_CLASSES = {
    "animal": "dog puppy cat kitten bear bird duck horse sheep cow elephant zebra giraffe",
    "food": "pizza food cake sandwich broccoli plate fruit",
    "person": "man woman boy girl people",
    "vehicle": "bus truck train car motorcycle bike airplane plane boat",
    "room": "kitchen bathroom bed bedroom toilet sink refrigerator",
    "computer": "laptop computer keyboard monitor",
}


def _coco(bundle: Path) -> Task:
    """COCO photos with one object that three of their five captions name;
    the others are the anchors.
    """
    base = _pacs(bundle)
    entries = json.loads((bundle / "coco_anchors" / "captions.json").read_text(encoding="utf-8"))
    kinds = [frozenset(words.split()) for words in COCO_CLASSES.values()]

    def votes(captions: Iterable[str], words: frozenset[str]) -> int:
        return sum(bool(words & set(re.findall("[a-z]+", caption.lower()))) for caption in captions)

    labels = torch.full((len(entries),), -1)
    for row, entry in enumerate(entries):
        counts = torch.tensor([votes(entry["captions"], words) for words in kinds])
        if counts.max() >= 3 and (counts >= 3).sum() == 1:
            labels[row] = counts.argmax()
    named = labels >= 0
    text = torch.stack([base.anchor_text[labels == k].mean(0) for k in range(len(kinds))])
    source = Domain(base.anchor_images[named], labels[named])
    domains = _styled(source, _some(STYLES, "pencil negative night halftone oil"))
    return Task(
        "coco-styles", domains, unit(text), base.anchor_images[~named], base.anchor_text[~named]
    )


def _drawn(bundle: Path) -> Task:
    """Scikit-learn's handwritten digits in the styles of the demo;
    anchors are others of them, in its generic style.
    """
    from sklearn.datasets import load_digits

    from sapmerge.demo.domains import DOMAINS, generic

    base, found = _digits(bundle), load_digits()
    strokes, labels = torch.from_numpy(found.images / 16).float(), torch.from_numpy(found.target)

    def drawn(style: Callable[[Tensor, Generator], Tensor], rows: slice) -> Tensor:
        from sapmerge.demo.domains import render

        small = render(strokes[rows], style, Generator().manual_seed(0)) / 2 + 0.5
        large = functional.interpolate(small, size=DIGIT, mode="bilinear")
        return (large * 255).round().to(torch.uint8)

    domains = {
        name: Domain(drawn(style, slice(300, None)), labels[300:])
        for name, style in DOMAINS.items()
    }
    return Task(
        "drawn-digits", domains, base.text, drawn(generic, slice(0, 160)), base.text[labels[:160]]
    )


FAMILIES: Mapping[str, Maker] = MappingProxyType(
    {
        "pacs": _pacs,
        "digits": _digits,
        "photo-styles": _made("photo-styles", _pacs, "photo", lambda _: STYLES),
        "coco-styles": _coco,
        "drawn-digits": _drawn,
        "tones": _made("tones", _pacs, "photo", _donors),
        "textures": _made("textures", _pacs, "cartoon", _textures),
        "corruptions": _made("corruptions", _pacs, "art_painting", lambda _: CORRUPTIONS),
        "rotations": _made(
            "rotations", _digits, "mnist", lambda _: {f"{d}": rotated(d) for d in range(0, 100, 20)}
        ),
        "printed-digits": _made(
            "printed-digits",
            _digits,
            "fonts",
            lambda _: _some(STYLES, "negative night halftone blurred edges"),
        ),
        "art-styles": _made(
            "art-styles",
            _pacs,
            "art_painting",
            lambda _: _some(STYLES, "posterised negative night halftone blurred edges"),
        ),
        "noisy-digits": _made("noisy-digits", _digits, "usps", lambda _: CORRUPTIONS),
    }
)
"""Name -> bundle -> family."""


LANGUAGE = "language"
"""The family of texts, which has a module of its own."""


def _by_hash() -> list[str]:
    return sorted((*FAMILIES, LANGUAGE), key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def choosing() -> list[str]:
    """The half of the families that defaults may be chosen on:
    the first by the SHA-256 of their names.
    """
    return _by_hash()[: (len(FAMILIES) + 1) // 2]


def confirming() -> list[str]:
    """The other half, which is run once after the choice was committed."""
    return _by_hash()[(len(FAMILIES) + 1) // 2 :]
