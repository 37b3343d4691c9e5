"""LoRM: LoRA factors merged in closed form, one while the other is shared by all adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import RTOL, norm
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.updates import LowRank, Update, zero_of
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.regmean import (
    NormalEquations,
    check_reduction,
    each_gram,
    inverse,
    reduced,
    times,
)
from sapmerge.parts.wrappers import Chain

__all__ = ["LoRMA", "LoRMB", "lorm"]

Grams = Mapping[str, Mapping[str, Tensor]]


@part
class LoRMA:
    """A = (sum_k w_k A_k G_k) (sum_k |w_k| G_k)^+ with the B that all adapters share;
    the result is B A.

    It does not depend on B, and is `RegMean` on the updates. G_k = E[x x^T] at base + adapter k,
    off-diagonals times `reduction`. An adapter without the layer counts with a factor of zero.

    Args:
        reduction: of the off-diagonals of the Gram matrices, in [0, 1].
        grams: see `RegMean`.

    Raises:
        MethodError: the adapters do not share B, or an update is dense.
    """

    reduction: float = 0.0
    grams: Grams | None = field(default=None, repr=False)
    merged: Mapping[str, Update] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def prepare(self, layers: LayerStream) -> LoRMA:
        for layer in layers:
            shared(layer, "B")
        merged: dict[str, Update] = {}
        problems: dict[str, NormalEquations] = {}

        def fold(layer: Layer, k: int, gram: Tensor) -> None:
            problem = problems.setdefault(layer.name, NormalEquations(self.reduction))
            problem.add(layer, k, gram)
            if k == len(layer) - 1:
                merged[layer.name] = _with_shared_B(layer, problems.pop(layer.name))

        each_gram("LoRMA", layers, self.grams, fold)
        return replace(self, merged=merged)

    def __call__(self, layer: Layer) -> Update:
        if self.merged is None:
            raise unprepared(self)
        return self.merged[layer.name]


@part
class LoRMB:
    """B = (sum_k w_k B_k A G_k A^T) (sum_k |w_k| A G_k A^T)^+ with the A that all adapters share;
    the result is B A.

    min_B sum_k |w_k| E|(B - B_k) A x_k|^2. G_k = E[x x^T] at base + adapter k,
    off-diagonals times `reduction`.

    Args:
        reduction: of the off-diagonals of the Gram matrices, in [0, 1].
        grams: see `RegMean`.

    Raises:
        MethodError: the adapters do not share A, or an update is dense.
    """

    reduction: float = 0.0
    grams: Grams | None = field(default=None, repr=False)
    merged: Mapping[str, Update] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_reduction(self.reduction)

    def prepare(self, layers: LayerStream) -> LoRMB:
        for layer in layers:
            shared(layer, "A")
        merged: dict[str, Update] = {}
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

        def fold(layer: Layer, k: int, gram: Tensor) -> None:
            A, update, weight = shared(layer, "A"), layer.updates[k], layer.weights[k]
            if A is not None:
                seen = times(A, reduced(gram.double(), self.reduction)) @ A.T
                left, right = sums.get(layer.name, (0.0, 0.0))
                B = update.B.double() if isinstance(update, LowRank) and not update.absent else 0.0
                sums[layer.name] = (
                    left + weight * (B @ seen if isinstance(B, Tensor) else 0.0),
                    (right + abs(weight) * seen),
                )
            if k == len(layer) - 1:
                merged[layer.name] = _with_shared_A(layer, A, *sums.pop(layer.name, (0.0, 0.0)))

        each_gram("LoRMB", layers, self.grams, fold)
        return replace(self, merged=merged)

    def __call__(self, layer: Layer) -> Update:
        if self.merged is None:
            raise unprepared(self)
        return self.merged[layer.name]


def lorm(merge: str = "A", reduction: float = 0.0, grams: Grams | None = None) -> Method:
    """LoRM: merge one LoRA factor in closed form while all adapters share the other,
    as clients of one round do.

        merge="A":  A = (sum w A_k G_k) (sum w G_k)^+
        merge="B":  B = (sum w B_k A G_k A^T) (A (sum w G_k) A^T)^+

    Args:
        merge: the factor that differs, "A" (`LoRMA`) or "B" (`LoRMB`); the other one must be the
            same in all adapters. Adapters that were trained apart share none: `regmean()` is the
            same regression on whole updates.
        reduction: off-diagonals of the Gram matrices times this; the published runs keep the
            diagonal alone (0).
        grams: label -> layer -> G, measured elsewhere; without it anchors and a model are needed.

    The authors' G is a sum over the rows of each client, which weighs clients by their rows; with
    `grams` so does ours, and on anchors all adapters see the same rows.

    Example:
        >>> import sapmerge as sm
        >>> sm.lorm()
        Chain(LoRMA(reduction=0.0))

    Source: Salami et al., "Closed-form merging of parameter-efficient modules for federated
    continual learning", https://arxiv.org/abs/2410.17961
    """
    if merge not in ("A", "B"):
        raise MethodError(f"lorm merges 'A' or 'B'; got {merge!r}")
    return Chain(LoRMA(reduction, grams) if merge == "A" else LoRMB(reduction, grams))


def shared(layer: Layer, factor: str) -> Tensor | None:
    """The factor ("A" or "B") that all adapters of a layer have in common, float64;
    None if none has the layer.

    Raises:
        MethodError: they differ, or an update is dense.
    """
    common: Tensor | None = None
    first = ""
    for label, update in zip(layer.adapters, layer, strict=True):
        if update.absent:
            continue
        if not isinstance(update, LowRank):
            raise MethodError(
                f"layer {layer.name!r}: the update of {label!r} is dense and has no factors; use "
                "regmean()"
            )
        own = (update.B if factor == "B" else update.A).double()
        if common is None:
            common, first = own, label
        elif own.shape != common.shape or norm(own - common) > RTOL * norm(common):
            raise MethodError(
                f"layer {layer.name!r}: {first!r} and {label!r} do not share {factor}, so the "
                "other factor cannot be merged alone; regmean() merges whole updates"
            )
    return common


def _with_shared_B(layer: Layer, problem: NormalEquations) -> Update:
    B, like = shared(layer, "B"), layer.updates[0]
    if B is None or problem.total is None or not problem.low:
        return zero_of(like)
    weights = [member.weight for member in layer.members if member.counts]
    rows = torch.stack(
        [w * product for w, (_, product, _) in zip(weights, problem.low, strict=True)]
    ).sum(0)
    return LowRank(B.to(like.dtype), inverse(problem.total)[0](rows).to(like.dtype))


def _with_shared_A(
    layer: Layer, A: Tensor | None, left: Tensor | float, right: Tensor | float
) -> Update:
    like = layer.updates[0]
    if A is None or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return zero_of(like)
    return LowRank(inverse(right)[0](left).to(like.dtype), A.to(like.dtype))
