"""LoRAPrune: rows or columns of an update, by a sensitivity that is made from the gradients
of its factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import norm
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, MaskBuilder, Merger, Method, Rescaler
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import MethodError
from sapmerge.parts.masks import TopFraction
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.prune import stats_of
from sapmerge.parts.rescalers import MatchNorm
from sapmerge.parts.units import Factors
from sapmerge.parts.wrappers import Chain

__all__ = ["PruneGroups", "loraprune"]

_ROWS = 1024
"""Rows of an update that are formed at once."""


def sensitivity(
    weight: Tensor, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, power: int = 2
) -> Tensor:
    """|(gB A + B gA - gB gA) * weight|^power per entry:
    LoRAPrune's importance of a weight without its gradient.

    The bracket is what a step of gradient descent with lr 1 on A and B takes from B A;
    it stands in for dL/dW.

    Args:
        weight: (m, n): W0 + s B A in the paper, or any matrix that the update is part of.
        A: (r, n), and gA: its gradient.
        B: (m, r), and gB: its gradient.
        power: 2 in the paper, 1 in its code.

    Returns:
        (m, n).

    Source: Zhang et al., "LoRAPrune", https://arxiv.org/abs/2305.18403
    """
    return ((gB @ A + B @ gA - gB @ gA) * weight).abs() ** power


@part
class PruneGroups:
    """Drop whole rows (outputs) or columns (inputs) of every update by the sum of `sensitivity`
    over their entries.

    Factors and gradients are those of the balanced form, at base + adapter; the sums of a layer are
    divided by their norm, so that layers compare. What is left is low-rank, as before.

    Args:
        mask: scores of the rows or columns -> which to keep.
        axis: "row" or "column".
        power: see `sensitivity`.
        rescaler: (pruned, original) -> update.

    Raises:
        MethodError: there are no anchors, or an update is dense.
    """

    mask: MaskBuilder
    axis: Literal["row", "column"] = "row"
    power: int = 2
    rescaler: Rescaler = MatchNorm()
    kept: Mapping[tuple[str, int], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise MethodError(
                f"PruneGroups' power is 2 (the paper) or 1 (its code); got {self.power!r}"
            )

    def prepare(self, layers: LayerStream) -> PruneGroups:
        seen = None if layers.anchors is None else layers.anchors.observe(layers, Factors())
        scores: dict[tuple[str, int], Tensor] = {}
        owners: dict[tuple[str, int], str] = {}
        for layer in layers:
            for k, update in enumerate(layer):
                if not update.absent:
                    values = Factors()(update).values
                    gA, gB = (stats_of(layer, k, name, seen).gradient.double() for name in "AB")
                    scores[layer.name, k] = self._scores(
                        values["A"].double(), values["B"].double(), gA, gB
                    )
                    owners[layer.name, k] = layer.adapters[k]
        fit = getattr(self.mask, "fit", None)
        fitted = (
            None if fit is None else fit(lambda: ((owners[key], scores[key]) for key in scores))
        )
        masks = {key: self.mask if fitted is None else fitted[owners[key]] for key in scores}
        return replace(self, kept={key: masks[key](values) != 0 for key, values in scores.items()})

    def __call__(self, layer: Layer) -> Layer:
        if self.kept is None:
            raise unprepared(self)
        kept = {k: self.kept[layer.name, k] for k, update in enumerate(layer) if update.rank}
        layer.record(
            "density", {layer.adapters[k]: float(keep.double().mean()) for k, keep in kept.items()}
        )
        updates = [
            self._pruned(update, kept[k]) if k in kept else update for k, update in enumerate(layer)
        ]
        return layer.with_updates(updates)

    def _scores(self, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor) -> Tensor:
        """The normalised sums of the groups, a block of rows at a time."""
        sums: list[Tensor] = []
        for start in range(0, len(B), _ROWS):
            rows = slice(start, start + _ROWS)
            importance = sensitivity(B[rows] @ A, A, B[rows], gA, gB[rows], self.power)
            sums.append(importance.sum(1) if self.axis == "row" else importance.sum(0))
        total = torch.cat(sums) if self.axis == "row" else torch.stack(sums).sum(0)
        size = norm(total)
        return total / size if size > 0 else total

    def _pruned(self, update: Update, keep: Tensor) -> Update:
        if not isinstance(update, LowRank):
            raise MethodError("PruneGroups scores LoRA factors, but this update is dense already")
        keep = keep.to(update.A)
        rows = self.axis == "row"
        pruned = (
            LowRank(update.B * keep[:, None], update.A)
            if rows
            else LowRank(update.B, update.A * keep)
        )
        return self.rescaler(pruned, update)


def loraprune(
    density: float = 0.5,
    axis: Literal["row", "column"] = "row",
    power: int = 2,
    rescaler: Rescaler = MatchNorm(),
    merger: Merger = Mean(),
) -> Method:
    """LoRAPrune's criterion, for merging: drop the rows or columns of each update that the anchors
    need least, average.

        score of a group = sum over its entries of ((gB A + B gA - gB gA) * B A)^2,
        over the norm of all in the layer

    Args:
        density: the fraction of rows (columns) kept per layer.
        axis: "row", the outputs of a layer, or "column", its inputs.
        power: 2, the paper's form, or 1, that of its code, with which the published numbers were
            made, as far as known.
        rescaler: what is given back after pruning.
        merger: how the pruned adapters are combined.

    Needs anchors and a model. LoRAPrune shrinks a model, so it scores W0 + B A, over many steps
    with a moving average; here the update alone is pruned, and scored at one place: the mean
    gradient over the anchors at base + adapter. The bracket depends on how B A is split into
    factors: ours are balanced, with alpha / r folded in; the code takes them as trained.
    `sensitivity` is the formula itself.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.loraprune()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: Zhang et al., "LoRAPrune: structured pruning meets low-rank parameter-efficient
    fine-tuning", https://arxiv.org/abs/2305.18403
    """
    return Chain(PruneGroups(TopFraction(density), axis, power, rescaler), merger)
