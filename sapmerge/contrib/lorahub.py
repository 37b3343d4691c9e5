"""LoraHub: coefficients of adapters searched on the anchors' loss, without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.layer import Layer, outermost
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import anchors_of
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.linear import Sum
from sapmerge.parts.wrappers import Chain

__all__ = ["SearchCoefficients", "lorahub"]


@part
class SearchCoefficients:
    """D_k -> c_k D_k, with c found by a random search on the anchor loss at
    base + sum_k c_k w_k D_k, plus penalty mean |c_k|.

    A (1 + 1) evolution strategy: some of c plus normal steps, kept where it is no worse; the steps
    grow by a success and shrink by a failure so that one in five succeeds. It needs forward passes
    alone, one over all anchors per evaluation. Adapters are put in the order of their content, so
    equal inputs give equal coefficients in any order. Follow it with `Sum()`. The report has
    "coefficients" and "search_loss", what was found at every evaluation.

    Args:
        scope: "adapter", a coefficient for every adapter; "layer", one for every layer and adapter:
            many for a search of this kind.
        loss: (model, batch) -> scalar; None: the anchors' own.
        steps: evaluations, that of the start included.
        seed: of the steps.
        penalty: of the mean magnitude of the coefficients.
        bound: coefficients lie in [-bound, bound].
        init: where all of them start.

    Raises:
        MethodError: there are no anchors, or an argument that makes no sense.
    """

    scope: Literal["adapter", "layer"] = "adapter"
    loss: Callable[..., Tensor] | None = None
    steps: int = 40
    seed: int = 0
    penalty: float = 0.05
    bound: float = 1.5
    init: float = 0.0
    coefficients: Mapping[tuple[str, int], float] | None = field(default=None, repr=False)
    losses: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        right = self.steps >= 0 and self.penalty >= 0 and self.bound > 0
        if not right or not abs(self.init) <= self.bound or not math.isfinite(self.bound):
            raise MethodError(
                "SearchCoefficients takes steps >= 0, penalty >= 0, a finite bound > 0 and init in "
                f"[-bound, bound]; got steps={self.steps!r}, penalty={self.penalty!r}, "
                f"bound={self.bound!r}, init={self.init!r}"
            )

    def prepare(self, layers: LayerStream) -> SearchCoefficients:
        anchors = anchors_of(layers, "SearchCoefficients")
        places = self._places(layers)
        index = {place: number for number, place in enumerate(dict.fromkeys(places.values()))}
        if not index:
            return replace(self, coefficients={})
        loss = prepare(self.loss, layers)
        values = torch.full((len(index),), float(self.init), dtype=torch.float64)

        def at(c: Tensor) -> float:
            updates = dict[str, Update]()
            for layer in layers:
                mine = [k for name, k in places if name == layer.name]
                if mine:
                    some = layer.with_members(layer.members[k] for k in mine)
                    given = [float(c[index[places[layer.name, k]]]) for k in mine]
                    products = [w * x for w, x in zip(some.weights, given, strict=True)]
                    updates[layer.name] = outermost(some, weighted_sum(some, tuple(products)))
            return anchors.loss_of(updates, loss) + self.penalty * float(c.abs().mean())

        losses = list[float]()
        if self.steps:
            values, losses = _search(at, values, self.bound, self.steps, self.seed)
        found = {place: float(values[index[kind]]) for place, kind in places.items()}
        return replace(self, coefficients=found, losses=tuple(losses))

    def __call__(self, layer: Layer) -> Layer:
        if self.coefficients is None:
            raise unprepared(self)
        given = [self.coefficients.get((layer.name, k), 0.0) for k in range(len(layer))]
        layer.record("coefficients", dict(zip(layer.adapters, given, strict=True)))
        layer.record("search_loss", self.losses)
        return layer.with_updates(
            [update.scaled(c) for update, c in zip(layer, given, strict=True)]
        )

    def _places(self, layers: LayerStream) -> dict[tuple[str, int], tuple[str, int]]:
        """(layer, adapter) -> which coefficient it has, for what is not zero.
        Layers by name, adapters by content.
        """
        found = list[tuple[str, str, int]]()
        for layer in layers:
            found += [
                (layer.name, member.digest, k)
                for k, member in enumerate(layer.members)
                if member.counts and member.update.norm() > 0
            ]
        if self.scope == "layer":
            return {(name, k): (name, k) for name, _, k in sorted(found)}
        by_content = sorted(found, key=lambda place: (place[1], place[2], place[0]))
        return {(name, k): ("", k) for name, _, k in by_content}


def lorahub(
    scope: Literal["adapter", "layer"] = "adapter",
    loss: Callable[..., Tensor] | None = None,
    steps: int = 40,
    seed: int = 0,
    penalty: float = 0.05,
    bound: float = 1.5,
    init: float = 0.0,
) -> Method:
    """LoraHub: sum_k c_k w_k D_k, c searched without gradients for the lowest loss on a few
    examples, plus penalty mean |c|.

    Args:
        scope: "adapter" (the paper), or "layer": a coefficient for every layer and adapter.
        loss: what is lowered: the anchors' loss, or any (model, batch) -> scalar.
        steps: evaluations of the loss, 40 in the authors' code.
        seed: of the search.
        penalty: of the mean magnitude, 0.05 in the authors' code.
        bound: of the coefficients, 1.5 in the authors' code.
        init: of the coefficients, 0 in the authors' code: the base model.

    One adapter does not come back whole: it is given a coefficient too. With gradients the same is
    `adamerging`; CAT (LoRA soups, arXiv 2410.13025) is that with a coefficient per layer and a loss
    on examples of the task: adamerging("layer", loss).

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch"], loader, model, method=sm.lorahub(steps=5))

    Source: Huang et al., "LoraHub: efficient cross-task generalization via dynamic LoRA
    composition", https://arxiv.org/abs/2307.13269. The authors multiply A and B by c each, so that
    the product has c^2 and cross terms; ours multiplies the update. Their optimiser is nevergrad's
    choice; ours is a (1 + 1) evolution strategy.
    """
    return Chain(SearchCoefficients(scope, loss, steps, seed, penalty, bound, init), Sum())


def _search(
    function: Callable[[Tensor], float], start: Tensor, bound: float, steps: int, seed: int
) -> tuple[Tensor, list[float]]:
    """A (1 + 1) evolution strategy within [-bound, bound], and the values that it saw.

    Every step moves some of the coordinates, about half: steps in all of them shrink to nothing
    where one coordinate is at a kink of the penalty.

    Source: Rechenberg's rule of one success in five, smoothed.
    """
    generator = torch.Generator().manual_seed(seed)
    best, values = start, [function(start)]
    lowest, length, damping = values[0], bound / 3, math.sqrt(len(start) + 1)
    for _ in range(steps - 1):
        step = length * torch.randn(start.shape, generator=generator, dtype=torch.float64)
        moved = torch.rand(start.shape, generator=generator) < 0.5
        trial = (best + step * (moved if bool(moved.any()) else ~moved)).clamp(-bound, bound)
        values.append(function(trial))
        success = values[-1] <= lowest
        if success:
            best, lowest = trial, values[-1]
        length *= math.exp((float(success) - 0.2) / 0.8 / damping)
    return best, values
