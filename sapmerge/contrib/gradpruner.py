"""Pruning of whole layers, by GradPruner's score or by any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, Merger, Method, Scorer, Stats, Units
from sapmerge.core.updates import zero_of
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.parts.masks import TopFraction, check_density
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.prune import stats_of
from sapmerge.parts.scaling import block_of
from sapmerge.parts.units import Factors
from sapmerge.parts.wrappers import Chain

__all__ = ["GradientProduct", "PruneLayers", "Summed", "gradpruner"]

LayerScore: TypeAlias = Callable[[Mapping[str, tuple[Tensor, Stats]]], float]
"""part -> (values, what is known of them), of one update: its score."""


def initial_importance(gA: Tensor, gB: Tensor) -> Tensor:
    """gB gA, (m, n): GradPruner's stand-in for the gradient of the weight, from those of A (r,
    n) and B (m, r).

    It is B^T G and G A^T multiplied, G A^T B^T G: quadratic in the gradient, and zero while B is.
    """
    return gB @ gA


@part
class GradientProduct:
    """sum |gB gA|^power over all entries, to the power 1 / power:
    the size of GradPruner's gradient information.

    Args:
        power: 2: the Frobenius norm, as in the authors' layer scores.
    """

    power: int = 2

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise MethodError(f"GradientProduct's power is 1 or 2; got {self.power!r}")

    def __call__(self, parts: Mapping[str, tuple[Tensor, Stats]]) -> float:
        if set(parts) != {"A", "B"}:
            raise MethodError(
                "GradientProduct multiplies the gradients of A and B: use units=Factors()"
            )
        gA, gB = (parts[name][1].gradient.double() for name in "AB")
        if self.power == 2:  # |gB gA|^2 = <gB^T gB, gA gA^T>
            return max(float(((gB.T @ gB) * (gA @ gA.T)).sum()), 0.0) ** 0.5
        return sum(
            float(initial_importance(gA, rows).abs().sum()) for rows in torch.split(gB, 1024)
        )


@part
class Summed:
    """The sum of any scorer over all units of the layer.

    Args:
        scorer: (values, stats) -> scores.
    """

    scorer: Scorer

    def __call__(self, parts: Mapping[str, tuple[Tensor, Stats]]) -> float:
        return sum(
            float(self.scorer(values, stats).double().sum()) for values, stats in parts.values()
        )


@part
class PruneLayers:
    """Keep the layers of each adapter with the highest scores, and drop the others whole.

    Args:
        score: of one update: `GradientProduct()`, `Summed(scorer)`, or a function of {part:
            (values, stats)}.
        density: the fraction of layers kept: floor(density n + 1e-9) of n, at least 1; equal scores
            in order of names.
        by: "block": the modules of a transformer block live or die together, by the sum of their
            scores (a module in no block is for itself); "module": each for itself.
        units: what the score sees.

    A dropped update is absent, not rescaled: another layer cannot stand in for it.
    The report has "layer_score".
    """

    score: LayerScore
    density: float
    by: Literal["block", "module"] = "block"
    units: Units = Factors()
    dropped: frozenset[tuple[str, int]] | None = field(default=None, repr=False)
    scores: Mapping[tuple[str, int], float] = field(
        default_factory=dict[tuple[str, int], float], repr=False
    )

    def __post_init__(self) -> None:
        check_density(self.density)

    def prepare(self, layers: LayerStream) -> PruneLayers:
        seen = None if layers.anchors is None else layers.anchors.observe(layers, self.units)
        scores: dict[tuple[str, int], float] = {}
        groups: dict[int, dict[str, list[str]]] = {}
        for layer in layers:
            for k, update in enumerate(layer):
                if not update.absent:
                    values = self.units(update).values
                    score = self.score(
                        {name: (v, stats_of(layer, k, name, seen)) for name, v in values.items()}
                    )
                    if not torch.isfinite(torch.tensor(score)):
                        raise NonFiniteError(f"{self.score!r} is {score} for layer {layer.name!r} "
                                             "of "
                                             f"{layer.adapters[k]!r}")  # fmt: skip
                    scores[layer.name, k] = score
                    groups.setdefault(k, {}).setdefault(self._group(layer.name), []).append(
                        layer.name
                    )
        dropped = {
            (name, k) for k, group in groups.items() for name in self._dropped(k, group, scores)
        }
        return replace(self, dropped=frozenset(dropped), scores=scores)

    def __call__(self, layer: Layer) -> Layer:
        if self.dropped is None:
            raise unprepared(self)
        present = [k for k, update in enumerate(layer) if not update.absent]
        layer.record(
            "layer_score", {layer.adapters[k]: self.scores[layer.name, k] for k in present}
        )
        layer.record(
            "density",
            {layer.adapters[k]: float((layer.name, k) not in self.dropped) for k in present},
        )
        return layer.with_updates(
            [
                zero_of(update) if (layer.name, k) in self.dropped else update
                for k, update in enumerate(layer)
            ]
        )

    def _group(self, name: str) -> str:
        block = block_of(name) if self.by == "block" else None
        return name if block is None else f"{block[0]}.{block[1]}."

    def _dropped(
        self, k: int, groups: Mapping[str, list[str]], scores: Mapping[tuple[str, int], float]
    ) -> list[str]:
        names = sorted(groups)
        totals = [sum(sorted(scores[name, k] for name in groups[group])) for group in names]
        keep = TopFraction(self.density)(torch.tensor(totals, dtype=torch.float64))
        return [
            name
            for group, kept in zip(names, keep.unbind(), strict=True)
            if not kept
            for name in groups[group]
        ]


_SCORE = GradientProduct()


def gradpruner(
    density: float = 0.7,
    score: LayerScore = _SCORE,
    by: Literal["block", "module"] = "block",
    merger: Merger = Mean(),
) -> Method:
    """GradPruner's layer score, for merging: drop the blocks of each adapter that the anchors need
    least, average.

        score of a block = sum over its modules of ||gB gA||_F,
        with gA and gB the gradients of the LoRA factors

    Args:
        density: the fraction of blocks of each adapter that is kept.
        score: of a module: `GradientProduct()`, or `Summed(scorer)` for any scorer.
        by: "block" or "module".
        merger: how the pruned adapters are combined.

    Needs anchors and a model (not with a score that reads no gradients). The paper sums (gB gA)^2
    over the first steps of training, the code sums gB gA over 40 steps and takes norms; with
    anchors there is one step, the mean gradient at base + adapter, at which the two rank a module
    alike. Factors are balanced, so that the score does not depend on how B A is split. GradPruner
    then merges a pruned layer of the model into the one below; here nothing but the update is
    dropped, and the layer of the model stays. gB gA is quadratic in the gradient and no first-order
    effect of dropping a layer: `Summed(Taylor())` is nearer to that.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.gradpruner()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: GradPruner, https://github.com/secretflow/ACoLab (PaperCode/GradPrune)
    """
    return Chain(PruneLayers(score, density, by), merger)
