"""The linear layers of the models that the benchmark pretends to have adapters of:
names and shapes, no weights.
"""

from __future__ import annotations

import re
from collections import Counter

__all__ = ["MODELS", "Shapes", "sample", "shallow", "stack"]

Shapes = dict[str, tuple[int, int]]
"""Name of a module -> (outputs, inputs)."""


def _clip_tower(name: str, layers: int, hidden: int) -> Shapes:
    """Attention (q, k, v, out) and MLP (fc1, fc2) of one tower of a CLIP."""
    found: Shapes = {}
    for layer in range(layers):
        where = f"{name}.encoder.layers.{layer}"
        found |= {
            f"{where}.self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")
        }
        found |= {
            f"{where}.mlp.fc1": (4 * hidden, hidden),
            f"{where}.mlp.fc2": (hidden, 4 * hidden),
        }
    return found


def _llama(name: str, layers: int, hidden: int, inner: int) -> Shapes:
    """Attention and gated MLP of a LLaMA."""
    found: Shapes = {}
    for layer in range(layers):
        where = f"{name}.layers.{layer}"
        found |= {f"{where}.self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        found |= {f"{where}.mlp.{part}_proj": (inner, hidden) for part in ("gate", "up")}
        found[f"{where}.mlp.down_proj"] = (hidden, inner)
    return found


def stack(layers: int, hidden: int = 512) -> Shapes:
    """A tower of any depth, for the tables of growth."""
    return _clip_tower("vision_model", layers, hidden)


MODELS: dict[str, Shapes] = {
    "ViT-B/32": _clip_tower("vision_model", 12, 768) | _clip_tower("text_model", 12, 512),
    "ViT-L/14": _clip_tower("vision_model", 24, 1024) | _clip_tower("text_model", 12, 768),
    "LLaVA-1.5-7B": _llama("model.language_model", 32, 4096, 11008)
    | _clip_tower("model.vision_tower", 24, 1024)
    | {
        "model.multi_modal_projector.linear_1": (4096, 1024),
        "model.multi_modal_projector.linear_2": (4096, 4096),
    },
}


def sample(shapes: Shapes) -> dict[str, int]:
    """One layer of each shape, and how many layers of the model it stands for."""
    count = Counter(shapes.values())
    first = {shape: name for name, shape in reversed(shapes.items())}
    return {name: count[shape] for shape, name in first.items()}


def shallow(shapes: Shapes, layers: int) -> Shapes:
    """The first layers of every tower."""
    return {
        name: shape
        for name, shape in shapes.items()
        if all(int(n) < layers for n in re.findall(r"\d+", name))
    }
