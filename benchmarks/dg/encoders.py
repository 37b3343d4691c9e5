"""Image encoders whose classes are texts: a tiny ViT with given text embeddings,
or a CLIP by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sapmerge.losses import embedding

__all__ = ["Clip", "Encoder", "TinyDualEncoder", "accuracy", "predictions", "tiny", "unit"]


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model with `get_image_features`, and what it wants to be fed.

    Args:
        name: of the model, for file names.
        model: frozen; merged updates are added to its weights.
        blocks: modules whose name contains this text carry the adapters.
        size: pixels per side, or None: the data's own.
        mean: of the pixel values, per channel, in [0, 1].
        std: likewise.
    """

    name: str
    model: nn.Module
    blocks: str
    size: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def targets(self) -> list[str]:
        """The linear layers that carry adapters: attention and MLP of every block of
        the image tower.
        """
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and self.blocks in name
        ]

    def pixels(self, images: Tensor) -> Tensor:
        """(N, 3, s, s) uint8 -> the model's input, on its device."""
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (images.to(self.device).float() / 255 - mean) / std


class TinyDualEncoder(nn.Module):
    """ViT-Ti/16; the score of an image and a text is the cosine of the CLS feature and a given
    text embedding.

    A dual encoder, not CLIP: the text embeddings come from a sentence encoder and a linear map.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import ViTModel

        # The fused attention kernel's backward pass is slow on CPUs: 54 images per second with
        # "eager", 36 without.
        self.vit = ViTModel.from_pretrained(
            folder, add_pooling_layer=False, attn_implementation="eager"
        )
        self.register_buffer("logit_scale", torch.tensor(20.0).log())

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.get_image_features(pixel_values)


def tiny(folder: Path, device: str) -> Encoder:
    """The ViT-Ti dual encoder in `folder`."""
    return Encoder("vit-tiny", TinyDualEncoder(folder).to(device).eval(), "layer")


class Clip:
    """A CLIP from a hub or a folder: an `Encoder`, and embeddings of texts."""

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(name)
        model = CLIPModel.from_pretrained(name).to(device).eval()
        images = self.processor.image_processor
        size = model.config.vision_config.image_size
        label = Path(name).name
        mean, std = tuple(images.image_mean), tuple(images.image_std)
        self.encoder = Encoder(label, model, "vision_model.encoder.layers", size, mean, std)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """(texts, d) unit embeddings."""
        inputs = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return embedding(self.encoder.model, inputs.to(self.encoder.device), "text").cpu()


@torch.no_grad()
def predictions(
    encoder: Encoder, model: nn.Module, images: Tensor, text: Tensor, batch: int = 64
) -> Tensor:
    """(N,) class indices by cosine with the texts.
    In bfloat16: three times faster on CPUs that have it.
    """
    found = []
    for part in images.split(batch):
        with torch.autocast(encoder.device.type, torch.bfloat16):
            feature = embedding(model, {"pixel_values": encoder.pixels(part)}, "image")
        found.append((feature @ text.to(feature).T).argmax(1).cpu())
    return torch.cat(found)


def accuracy(
    encoder: Encoder, model: nn.Module, images: Tensor, labels: Tensor, text: Tensor
) -> float:
    """The share of images whose nearest text is that of their class."""
    return float((predictions(encoder, model, images, text) == labels).double().mean())


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return functional.normalize(rows.float(), dim=-1)
