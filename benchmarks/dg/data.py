"""Domains: images, labels, the text embeddings of the classes;
and anchors: public image-text pairs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from dg.encoders import Clip, unit

__all__ = ["Domain", "Task", "bundled", "digits", "folder", "pictures"]

TEMPLATES = (
    "a photo of a {}.",
    "a painting of a {}.",
    "a cartoon of a {}.",
    "a sketch of a {}.",
    "an image of a {}.",
)
HELD = 50
"""Images per class and domain that nobody trains on, where a class has twice as many."""


@dataclass(frozen=True, eq=False)
class Domain:
    """One domain.

    Args:
        images: (N, 3, s, s) uint8.
        labels: (N,).
    """

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Domain:
        return Domain(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class Task:
    """Several domains with the same classes, and the server's public pairs.

    Args:
        domains: name -> Domain.
        text: (classes, d) unit text embeddings.
        anchor_images: (n, 3, s, s) uint8.
        anchor_text: (n, d) unit text embeddings.
    """

    name: str
    domains: dict[str, Domain]
    text: Tensor
    anchor_images: Tensor
    anchor_text: Tensor

    def split(self, domain: str, seed: int, train: int, test: int = HELD) -> tuple[Domain, Domain]:
        """Disjoint training and test images, so many per class, drawn by the seed;
        neither depends on the other.

        `HELD` images of a class are kept for the test,
        and of a class with fewer than twice as many, half.

        Raises:
            ValueError: a class with a single image, or with none.
        """
        found, generator = self.domains[domain], torch.Generator().manual_seed(1000 + seed)
        training, testing = [], []
        for k in range(len(self.text)):
            index = (found.labels == k).nonzero().flatten()
            if len(index) < 2:
                raise ValueError(
                    f"{self.name}, domain {domain}: class {k} has {len(index)} images; two are "
                    "needed"
                )
            index = index[torch.randperm(len(index), generator=generator)]
            held = min(HELD, len(index) // 2)
            testing.append(index[:held][:test])
            training.append(index[held : held + train])
        return found.take(torch.cat(training)), found.take(torch.cat(testing))

    def anchors(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` of the public pairs, drawn by the seed: images and text embeddings."""
        generator = torch.Generator().manual_seed(2000 + seed)
        chosen = torch.randperm(len(self.anchor_text), generator=generator)[:count]
        return self.anchor_images[chosen], self.anchor_text[chosen]


def bundled(bundle: Path) -> dict[str, Task]:
    """Every task of a bundle: its folders NAME/domain/class/image whose classes have texts,
    and digits.
    """
    features = load_file(bundle / "text_features.safetensors")
    names = [key.removesuffix("_classes") for key in features if key.endswith("_classes")]
    tasks = {name: pictures(bundle, name) for name in sorted(names) if (bundle / name).is_dir()}
    return tasks | ({"digits": digits(bundle)} if any(bundle.glob("digits*.npz")) else {})


def pictures(bundle: Path, name: str, size: int = 160) -> Task:
    """A folder NAME/domain/class/image, with COCO photos and captions as anchors;
    all text embeddings are given.

    Args:
        bundle: the folder of NAME, of text_features.safetensors with NAME_classes (templates,
            classes, d) in the alphabetical order of the classes, and of coco_anchors.

    Raises:
        ValueError: not one text per class.
    """
    features = load_file(bundle / "text_features.safetensors")
    domains, classes = _domains(bundle / name, size)
    text = unit(features[f"{name}_classes"].mean(0))
    if len(text) != len(classes):
        raise ValueError(
            f"{bundle / name} has the classes {classes}, and {name}_classes has {len(text)} texts"
        )
    images, _ = _pairs(bundle / "coco_anchors", size)
    return Task(name, domains, text, images, unit(features["coco_captions"].mean(1)))


def digits(bundle: Path, size: int = 64) -> Task:
    """Every domain of every digits*.npz, with scikit-learn's handwritten digits and their
    names as anchors.

    A domain NAME is an array NAME_x (n, s, s) or (n, s, s, 3) of images, and NAME_y of labels.

    Raises:
        ValueError: a domain that is in two files.
    """
    from sklearn.datasets import load_digits

    text = unit(load_file(bundle / "text_features.safetensors")["digits"].mean(0))
    domains = dict[str, Domain]()
    for path in sorted(bundle.glob("digits*.npz")):
        arrays = np.load(path)
        for name in (key.removesuffix("_x") for key in arrays.files if key.endswith("_x")):
            if name in domains:
                raise ValueError(f"{path}: the domain {name} is in another file, too")
            images, labels = (
                torch.from_numpy(arrays[f"{name}_x"]),
                torch.from_numpy(arrays[f"{name}_y"]),
            )
            domains[name] = Domain(_enlarged(images, size), labels.long())
    found = load_digits()
    images, labels = (
        torch.from_numpy((found.images * (255 / 16)).astype(np.uint8)),
        torch.from_numpy(found.target),
    )
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:160]
    return Task("digits", domains, text, _enlarged(images[chosen], size), text[labels[chosen]])


def folder(root: Path, anchors: Path, clip: Clip) -> Task:
    """Any folder domain/class/image, with texts embedded by a CLIP.

    Args:
        root: the folder; class names are read from the subfolders, "_" as a space.
        anchors: a folder of images with captions.json: [{"file": ..., "captions": [...]}, ...].
    """
    size = clip.encoder.size or 224
    domains, classes = _domains(root, size)
    text = torch.stack(
        [
            clip.texts([line.format(name.replace("_", " ")) for line in TEMPLATES]).mean(0)
            for name in classes
        ]
    )
    images, captions = _pairs(anchors, size)
    embedded = torch.stack([clip.texts(texts).mean(0) for texts in captions])
    return Task(root.name, domains, unit(text), images, unit(embedded))


def _domains(root: Path, size: int) -> tuple[dict[str, Domain], list[str]]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    classes = sorted(path.name for path in (root / names[0]).iterdir() if path.is_dir())
    domains = {}
    for name in names:
        if {path.name for path in (root / name).iterdir() if path.is_dir()} != set(classes):
            raise ValueError(f"{root / name} has other classes than {root / names[0]}")
        files = [
            (path, k)
            for k, kind in enumerate(classes)
            for path in sorted((root / name / kind).iterdir())
        ]
        images = torch.stack([_image(path, size) for path, _ in files])
        domains[name] = Domain(images, torch.tensor([k for _, k in files]))
    return domains, classes


def _pairs(root: Path, size: int) -> tuple[Tensor, list[list[str]]]:
    entries = json.loads((root / "captions.json").read_text(encoding="utf-8"))
    return torch.stack([_image(root / entry["file"], size) for entry in entries]), [
        e["captions"] for e in entries
    ]


def _image(path: Path, size: int) -> Tensor:
    with Image.open(path) as opened:
        array = np.array(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(array).permute(2, 0, 1)


def _enlarged(images: Tensor, size: int) -> Tensor:
    images = images[..., None].expand(-1, -1, -1, 3) if images.ndim == 3 else images
    larger = functional.interpolate(images.permute(0, 3, 1, 2).float(), size=size, mode="bilinear")
    return larger.round().clamp(0, 255).to(torch.uint8)
