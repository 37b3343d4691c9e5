"""Movement pruning: keep what training moved, when several checkpoints of a run are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, MaskBuilder, Merger, Method, Observation, Rescaler
from sapmerge.core.stream import Mapped
from sapmerge.core.updates import Dense, Update, zero_of
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.parts.masks import TopFraction
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.prune import PackedMask, stats_of
from sapmerge.parts.rescalers import Keep
from sapmerge.parts.units import Entries
from sapmerge.parts.wrappers import Chain

__all__ = ["Displacement", "LossDecrease", "PruneRuns", "movement"]

RunScore: TypeAlias = Callable[[Layer, Sequence[int], "Observation | None"], Tensor]
"""(layer, the checkpoints of a run from the first to the last, gradients) -> scores
of the entries.
"""


@part
class Displacement:
    """sum_t D_t (D_t - D_{t-1}), D_0 = 0: high where checkpoints move away from zero,
    negative where they come back.

    Movement pruning's -sum w dL/dw with lr times the gradient read off the difference of two
    checkpoints. Without data. Of a single checkpoint it is D^2: magnitude pruning.
    """

    def __call__(self, layer: Layer, run: Sequence[int], seen: Observation | None) -> Tensor:
        before = torch.zeros(layer.shape, dtype=torch.float64, device=layer.updates[0].device)
        total = torch.zeros_like(before)
        for k in run:
            now = layer.updates[k].dense().double()
            total += now * (now - before)
            before = now
        return total


@part
class LossDecrease:
    """-sum_t (D_t - D_{t-1}) (g_{t-1} + g_t) / 2, D_0 = 0:
    how much each entry's way has lowered the anchor loss.

    g_t is the gradient at base + checkpoint t, g_0 at the base; the sum over all entries is the
    trapezoidal rule for the loss that the run has won. Needs anchors and a model.
    """

    def __call__(self, layer: Layer, run: Sequence[int], seen: Observation | None) -> Tensor:
        total = torch.zeros(layer.shape, dtype=torch.float64, device=layer.updates[0].device)
        there = [k for k in run if not layer.updates[k].absent]
        if not there:
            return total
        before = torch.zeros_like(total)
        gradient = stats_of(layer, there[0], "entries", seen).moment("mean", "base").double()
        for k in there:
            now, here = (
                layer.updates[k].dense().double(),
                stats_of(layer, k, "entries", seen).gradient.double(),
            )
            total -= (now - before) * (gradient + here) / 2
            before, gradient = now, here
        return total


@part
class PruneRuns:
    """Of each run keep the last checkpoint, and of that the entries with the highest scores.

    Args:
        runs: per run the labels of its checkpoints, from the first to the last; an adapter in none
            is a run by itself.
        score: `Displacement()` or `LossDecrease()`.
        mask: (scores) -> what to keep, per layer.
        rescaler: (pruned, original) -> update.

    The result has one update per run, with the weight of its last checkpoint.

    Raises:
        MethodError: a label that no adapter has, or one that is named twice.
    """

    runs: tuple[tuple[str, ...], ...] = ()
    score: RunScore = Displacement()
    mask: MaskBuilder = TopFraction(0.5)
    rescaler: Rescaler = Keep()
    kept: Mapping[tuple[str, str], PackedMask] | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> PruneRuns:
        first = next(iter(layers), None)
        if first is None:
            return self
        chains = self._chains(first)
        anchors = layers.anchors
        seen = (
            None
            if anchors is None
            else anchors.observe(Mapped(layers, _filled, anchors), Entries())
        )
        kept: dict[tuple[str, str], PackedMask] = {}
        for layer in layers:
            for run in chains:
                if not layer.updates[run[-1]].absent:
                    scores = self.score(layer, run, seen)
                    if not bool(torch.isfinite(scores).all()):
                        raise NonFiniteError(
                            f"{self.score!r} gives NaN or infinite scores in layer {layer.name!r}"
                        )
                    kept[layer.name, layer.adapters[run[-1]]] = PackedMask.packed(self.mask(scores))
        return replace(self, kept=kept)

    def __call__(self, layer: Layer) -> Layer:
        if self.kept is None:
            raise unprepared(self)
        last = [run[-1] for run in self._chains(layer)]
        updates, density = list[Update](), dict[str, float]()
        for k in last:
            update = layer.updates[k]
            if update.absent:
                updates.append(zero_of(update))
                continue
            keep = self.kept[layer.name, layer.adapters[k]].unpacked().to(update.device)
            density[layer.adapters[k]] = float((keep != 0).double().mean())
            updates.append(self.rescaler(Dense(update.dense() * keep), update))
        layer.record("density", density)
        return layer.with_members(
            replace(layer.members[k], update=u) for k, u in zip(last, updates, strict=True)
        )

    def _chains(self, layer: Layer) -> list[tuple[int, ...]]:
        """Per run the numbers of its checkpoints."""
        named = [label for run in self.runs for label in run]
        if (
            len(set(named)) < len(named)
            or not set(named) <= set(layer.adapters)
            or not all(self.runs)
        ):
            raise MethodError(
                "runs names every checkpoint once, by the label of an adapter; the adapters are "
                f"{layer.adapters}, runs is {self.runs!r}"
            )
        chains = {run[-1]: tuple(layer.adapters.index(label) for label in run) for run in self.runs}
        alone = {label: (k,) for k, label in enumerate(layer.adapters) if label not in named}
        return [
            (chains | alone)[label] for label in layer.adapters if label in chains or label in alone
        ]


_SCORE, _RESCALER = Displacement(), Keep()


def movement(
    runs: Sequence[Sequence[str]] = (),
    density: float = 0.5,
    score: RunScore = _SCORE,
    rescaler: Rescaler = _RESCALER,
    merger: Merger = Mean(),
) -> Method:
    """Movement pruning of adapters whose earlier checkpoints are given too;
    the last ones are pruned and averaged.

        S = sum_t D_t (D_t - D_{t-1})    or, on anchors,
        S = -sum_t (D_t - D_{t-1}) (g_{t-1} + g_t) / 2

    Args:
        runs: per run the labels of its checkpoints, from the first to the last, all of them among
            the adapters of the merge: merge({"a-100": ..., "a-200": ..., "b": ...},
            method=movement([("a-100", "a-200")])). Others are runs of one checkpoint.
        density: the fraction of entries kept per layer.
        score: `Displacement()`, without data, or `LossDecrease()`, which needs anchors and a model.
        rescaler: what is given back after pruning.
        merger: how the pruned adapters are combined.

    The authors sum -w dL/dw over all steps of a training that learns the scores; no training
    happens here, and what lies between two checkpoints is unknown. The more checkpoints, the nearer
    `Displacement` is to magnitude pruning (sum w dw -> w^2 / 2, since an update begins at zero).

    Example:
        >>> import sapmerge as sm
        >>> runs = [["art/100", "art/200"], ["sketch/100", "sketch/200"]]  # first to last
        >>> method = sm.movement(runs, density=0.2)

    Source: Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning",
    https://arxiv.org/abs/2005.07683
    """
    return Chain(
        PruneRuns(tuple(tuple(run) for run in runs), score, TopFraction(density), rescaler), merger
    )


def _filled(layer: Layer) -> Layer:
    """Absent updates as zeros, so that gradients are taken there too."""
    like = layer.updates[0]
    zero = Dense(torch.zeros(layer.shape, dtype=like.dtype, device=like.device))
    return layer.with_updates([zero if update.absent else update for update in layer])
