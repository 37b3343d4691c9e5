"""`ScaleByDepth`: a wrapper that scales a method's result by the depth of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import cast

import torch

from sapmerge.compose import prepare
from sapmerge.errors import MethodError
from sapmerge.layer import Layer, LayerStream, Method, Update
from sapmerge.linalg import norm
from sapmerge.mergers import weighted_sum
from sapmerge.recipe import part

__all__ = ["ScaleByDepth"]

CONTAINERS = ("layers", "layer", "h", "block", "blocks", "resblocks", "transformer_blocks")
"""What model codebases call the list of blocks."""

ROWS = 512
"""Rows of an update that are formed at once for its sum of magnitudes."""


def block_of(name: str, containers: tuple[str, ...] = CONTAINERS) -> tuple[str, int] | None:
    """The tower that a module belongs to, and the number of its block there.

    The outermost number that follows a container counts: "model.layers.3.mlp.experts.1.up" is in block 3, and "layer.1"
    of T5's "encoder.block.0.layer.1.wo" is a part of block 0. Each tower counts for itself.

    Args:
        name: of a module, components separated by dots.
        containers: what lists of blocks are called.

    Returns:
        (path of the list, number); None if the module is in no block.

    Example:
        >>> from sapmerge.depth import block_of
        >>> block_of("vision_model.encoder.layers.11.mlp.fc1")
        ('vision_model.encoder.layers', 11)
    """
    path = name.split(".")
    for position in range(1, len(path)):
        if path[position - 1] in containers and path[position].isascii() and path[position].isdigit():
            return ".".join(path[:position]), int(path[position])
    return None


@part
class ScaleByDepth:
    """(alpha + beta l / (L - 1)) times the method's result in block l of L; alpha times it outside of the blocks.

    Args:
        method: any method.
        alpha: the factor of the first block. "norm": |sum_k w_k D_k|_1 / |merged|_1 / K over the whole adapter, K the
            number of adapters that are not zero; 1 / K for a sum.
        beta: what the last block gets on top.
        containers: what lists of blocks are called; None: `layers`, `layer`, `h`, `block`, `blocks`, `resblocks`,
            `transformer_blocks`.

    L is one more than the highest number of a block that an adapter has, for each tower apart (a CLIP has two). With
    L = 1 there is no depth: alpha.
    """

    method: Method
    alpha: float | str = 0.5
    beta: float = 0.5
    containers: tuple[str, ...] | None = None
    factors: Mapping[str, float] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and self.alpha != "norm":
            raise MethodError(f"alpha is a number, or 'norm'; got {self.alpha!r}")

    def prepare(self, layers: LayerStream) -> ScaleByDepth:
        method = prepare(self.method, layers)
        blocks: dict[str, tuple[str, int] | None] = {}
        lengths: dict[str, int] = {}
        summed, merged, adapters = 0.0, 0.0, set[str]()
        for layer in layers:
            blocks[layer.name] = block = block_of(layer.name, self.containers or CONTAINERS)
            if block is not None:
                lengths[block[0]] = max(lengths.get(block[0], 0), block[1] + 1)
            if isinstance(self.alpha, str):
                summed += magnitudes(weighted_sum(layer, layer.weights))
                merged += magnitudes(method(layer))
                present = zip(layer.adapters, layer, layer.weights, strict=True)
                adapters |= {label for label, update, weight in present if weight != 0 and update.norm() > 0}
        if isinstance(self.alpha, str):
            alpha = summed / merged / len(adapters) if merged > 0 else 1.0
        else:
            alpha = float(self.alpha)
        factors = {name: alpha + self.beta * _depth(block, lengths) for name, block in blocks.items()}
        return replace(self, method=method, factors=factors)

    def __call__(self, layer: Layer) -> Update:
        if self.factors is None:
            return self.prepare(cast("LayerStream", [layer]))(layer)
        layer.record("depth_factor", self.factors[layer.name])
        return self.method(layer).scaled(self.factors[layer.name])


def _depth(block: tuple[str, int] | None, lengths: Mapping[str, int]) -> float:
    """l / (L - 1); 0 outside of the blocks and for L = 1."""
    if block is None or lengths[block[0]] < 2:
        return 0.0
    return block[1] / (lengths[block[0]] - 1)


def magnitudes(update: Update) -> float:
    """sum |D_ij|, a few rows at a time."""
    if update.rank == 0:
        return 0.0
    every = torch.arange(update.shape[0], device=update.device)
    return sum(norm(update.rows(every[start : start + ROWS]), p=1) for start in range(0, len(every), ROWS))
