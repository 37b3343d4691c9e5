"""The upper half of the ViT-Ti, which adapters are trained on,
and the tokens that its lower half makes.

The lower half is frozen and runs once per image, so that a trial takes seconds. Clients are trained
together: their factors are stacked, and AdamW acts on every entry by itself, so each trains as if
it were alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Factors", "Half", "load_vit", "lower_half"]

Factors: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""Module -> B (clients, m, r) with the scaling folded in, and A (clients, r, n)."""

CUT = 6
"""The first block of the upper half."""


class Block(nn.Module):
    """A pre-norm transformer block with separate projections, as PEFT finds them."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.before, self.between = source.layernorm_before, source.layernorm_after
        attention, mlp = source.attention, source.mlp
        self.q, self.k, self.v, self.o = (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
        )
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2


class Half(nn.Module):
    """The last blocks of a `transformers.ViTModel`: tokens (..., T, d) -> CLS features (..., d)."""

    def __init__(self, vit: nn.Module, heads: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer) for layer in vit.layers[CUT:])
        self.norm, self.heads = vit.layernorm, heads
        self.register_buffer("logit_scale", torch.tensor(20.0).log())
        self.requires_grad_(False).eval()

    def targets(self) -> list[str]:
        """The linear layers, all of which carry adapters."""
        return [name for name, module in self.named_modules() if isinstance(module, nn.Linear)]

    def bfloat16_copy(self) -> Half:
        return copy.deepcopy(self).bfloat16()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The CLS features of cached tokens, under the name by which an image-text
        loss asks for them.
        """
        return self(pixel_values)

    def forward(self, tokens: Tensor, factors: Factors | None = None) -> Tensor:
        """With `factors` the first dimension of the tokens runs over clients."""
        x = tokens
        for number, block in enumerate(self.blocks):

            def linear(
                name: str, value: Tensor, block: nn.Module = block, number: int = number
            ) -> Tensor:
                out = getattr(block, name)(value)
                if factors is None:
                    return out
                B, A = (factor.to(value.dtype) for factor in factors[f"blocks.{number}.{name}"])
                flat = value.flatten(1, -2)
                return out + torch.bmm(torch.bmm(flat, A.mT), B.mT).view_as(out)

            last = number == len(self.blocks) - 1  # of which only the CLS token is read
            normed = block.before(x)
            kept, asked = (x[..., :1, :], normed[..., :1, :]) if last else (x, normed)
            attended = self._attention(linear("q", asked), linear("k", normed), linear("v", normed))
            x = kept + linear("o", attended)
            x = x + linear("fc2", functional.gelu(linear("fc1", block.between(x))))
        return self.norm(x[..., 0, :])

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in (q, k, v))
        shares = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
        return (shares @ v).transpose(-3, -2).flatten(-2)


def load_vit(folder: Path) -> nn.Module:
    from transformers import ViTModel

    return ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()


@torch.no_grad()
def lower_half(vit: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """(N, 3, s, s) uint8 -> tokens for the upper half, bfloat16:
    CLS, patches averaged to at most 5 x 5.
    """
    found = []
    for part in images.split(batch):
        with torch.autocast("cpu", torch.bfloat16):
            x = vit.embeddings(part.float() / 127.5 - 1, interpolate_pos_encoding=True)
            for layer in vit.layers[:CUT]:
                x = layer(x)
        patches = x[:, 1:].float()
        side = round(patches.shape[1] ** 0.5)
        grid = functional.adaptive_avg_pool2d(patches.mT.unflatten(2, (side, side)), min(side, 5))
        found.append(torch.cat([x[:, :1].float(), grid.flatten(2).mT], 1).bfloat16())
    return torch.cat(found)
