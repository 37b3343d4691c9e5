"""How long the merged update should be: what its energy says, and what the anchors say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field, replace

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import norm
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import anchors_of
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError
from sapmerge.losses import comparing
from sapmerge.parts.tuning import loss_curve

__all__ = ["MatchEnergy", "ScaleByAnchors", "ScaleByDepth"]

_SCALES = tuple(2 ** (step / 2) for step in range(-3, 3))
"""The multiples that are tried, from 0.35 to 2: one step is a factor of sqrt(2)."""


@part
class ScaleByAnchors:
    """Scale the merged adapter to a length between the one that energy gives and the one that
    the anchors give.

    The direction of a merge says little about how far to go along it. `MatchEnergy` goes as far as
    the adapters did; that is too far where they went too far themselves, and not far enough where
    they stopped early. With s the length in units of `MatchEnergy`'s, the anchors choose

        s* = argmin L(base + s D) - price log s:

    on from s*, every per cent of length costs more than `price` per cent of loss.
    The update is scaled by s*^trust.

    Args:
        method: any method.
        loss: (model, batch) -> scalar. None: `centered_alignment` for image-text pairs, which no
            collapse and no common shift can lower, and the anchors' own loss for others.
        price: of one e-fold of length, in units of the loss.
        trust: 0 is `MatchEnergy`, 1 the anchors alone;
            0.5 is the geometric mean of the two lengths.

    The report has, for every layer, "length" (s*^trust) and the losses that it was chosen by. Six
    forward passes over the anchors; while they run the merged update is held whole,
    which is the size of the model if it is dense.

    Raises:
        MethodError: there are no anchors.
    """

    method: Method
    loss: Callable[..., Tensor] | None = None
    price: float = 0.03
    trust: float = 0.5
    energy_factor: float = field(default=1.0, repr=False)
    length: float | None = field(default=None, repr=False)
    losses: Mapping[float, float] = field(default_factory=dict[float, float], repr=False)

    def __post_init__(self) -> None:
        if not (self.price >= 0 and 0 <= self.trust <= 1):
            raise MethodError(
                f"a price is not negative and a trust in [0, 1]; got {self.price!r} and "
                f"{self.trust!r}"
            )

    def prepare(self, layers: LayerStream) -> ScaleByAnchors:
        anchors = anchors_of(layers, "ScaleByAnchors")
        matched = MatchEnergy(self.method).prepare(layers)
        curve = loss_curve(matched, layers, anchors, _SCALES, self.loss or comparing(anchors))
        length = _lowest(curve, self.price) ** self.trust
        return replace(
            self, method=matched.method, energy_factor=matched.factor, length=length, losses=curve
        )

    def __call__(self, layer: Layer) -> Update:
        if self.length is None:
            raise unprepared(self)
        layer.record("energy_factor", self.energy_factor)
        layer.record("length", self.length)
        layer.record("losses_by_length", self.losses)
        return self.method(layer).scaled(self.energy_factor * self.length)


def _lowest(curve: Mapping[float, float], price: float) -> float:
    """The s with the least L(s) - price log s: the lowest point of the parabola in log s through
    the best three.
    """
    values = [loss - price * math.log(s) for s, loss in curve.items()]
    best = min(range(len(values)), key=values.__getitem__)
    if 0 < best < len(values) - 1:
        left, here, right = values[best - 1 : best + 2]
        bend = left - 2 * here + right
        if bend > 0:
            return _SCALES[best] * 2 ** ((left - right) / (4 * bend))
    return _SCALES[best]


@part
class MatchEnergy:
    """Scale the result of a method so that the merged adapter's norm is the mean
    norm of its inputs.

    The mean of K nearly orthogonal updates is sqrt(K) shorter than each of them: averaging loses
    energy as pruning does. One factor for the whole adapter; norms are weighted by |weights|.

    Args:
        method: any method.
    """

    method: Method
    factor: float | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> MatchEnergy:
        method = prepare(self.method, layers)
        merged, squares, weights = 0.0, dict[str, float](), dict[str, float]()
        for layer in layers:
            merged += method(layer).norm() ** 2
            for member in layer.members:
                squares[member.label] = squares.get(member.label, 0.0) + member.update.norm() ** 2
                weights[member.label] = abs(member.weight)
        total = sum(weights.values())
        wanted = sum(weights[k] * squares[k] ** 0.5 for k in squares) / total if total else 0.0
        return MatchEnergy(method, wanted / merged**0.5 if merged > 0 else 1.0)

    def __call__(self, layer: Layer) -> Update:
        if self.factor is None:
            raise unprepared(self)
        layer.record("energy_factor", self.factor)
        return self.method(layer).scaled(self.factor)


CONTAINERS = ("layers", "layer", "h", "block", "blocks", "resblocks", "transformer_blocks")
"""What model codebases call the list of blocks."""

ROWS = 512
"""Rows of an update that are formed at once for its sum of magnitudes."""


def block_of(name: str, containers: tuple[str, ...] = CONTAINERS) -> tuple[str, int] | None:
    """The tower that a module belongs to, and the number of its block there.

    The outermost number that follows a container counts: "model.layers.3.mlp.experts.1.up" is in
    block 3, and "layer.1" of T5's "encoder.block.0.layer.1.wo" is a part of block 0.
    Each tower counts for itself.

    Args:
        name: of a module, components separated by dots.
        containers: what lists of blocks are called.

    Returns:
        (path of the list, number); None if the module is in no block.

    Example:
        >>> from sapmerge.parts.scaling import block_of
        >>> block_of("vision_model.encoder.layers.11.mlp.fc1")
        ('vision_model.encoder.layers', 11)
    """
    path = name.split(".")
    for position in range(1, len(path)):
        if (
            path[position - 1] in containers
            and path[position].isascii()
            and path[position].isdigit()
        ):
            return ".".join(path[:position]), int(path[position])
    return None


@part
class ScaleByDepth:
    """(alpha + beta l / (L - 1)) times the method's result in block l of L;
    alpha times it outside of the blocks.

    Args:
        method: any method.
        alpha: the factor of the first block. "norm": |sum_k w_k D_k|_1 / |merged|_1 / K over the
            whole adapter, K the number of adapters that are not zero; 1 / K for a sum.
        beta: what the last block gets on top.
        containers: what lists of blocks are called; None: `layers`, `layer`, `h`, `block`,
            `blocks`, `resblocks`, `transformer_blocks`.

    L is one more than the highest number of a block that an adapter has, for each tower apart (a
    CLIP has two). With L = 1 there is no depth: alpha.
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
                adapters |= {
                    m.label for m in layer.members if m.weight != 0 and m.update.norm() > 0
                }
        if isinstance(self.alpha, str):
            alpha = summed / merged / len(adapters) if merged > 0 else 1.0
        else:
            alpha = float(self.alpha)
        factors = {
            name: alpha + self.beta * _depth(block, lengths) for name, block in blocks.items()
        }
        return replace(self, method=method, factors=factors)

    def __call__(self, layer: Layer) -> Update:
        if self.factors is None:
            raise unprepared(self)
        layer.record("depth_factor", self.factors[layer.name])
        return self.method(layer).scaled(self.factors[layer.name])


def _depth(block: tuple[str, int] | None, lengths: Mapping[str, int]) -> float:
    """l / (L - 1); 0 outside of the blocks and for L = 1."""
    if block is None or lengths[block[0]] < 2:
        return 0.0
    return block[1] / (lengths[block[0]] - 1)


def magnitudes(update: Update) -> float:
    """sum |D_ij|, a few rows at a time."""
    if update.absent:
        return 0.0
    every = torch.arange(update.shape[0], device=update.device)
    return sum(
        norm(update.rows(every[start : start + ROWS]), p=1) for start in range(0, len(every), ROWS)
    )
