"""Averages, medians and sums of whole updates."""

from __future__ import annotations

from typing import Literal

from sapmerge.core.protocols import Method
from sapmerge.parts.mergers.entrywise import CoordinateMedian, TrimmedMean
from sapmerge.parts.mergers.linear import FactorMean, Mean, Sum
from sapmerge.parts.mergers.robust import GeometricMedian, Krum, ModelStock, Slerp
from sapmerge.parts.scaling import ScaleByDepth
from sapmerge.parts.wrappers import Chain

__all__ = [
    "coordinate_median",
    "factor_average",
    "geometric_median",
    "krum",
    "lines",
    "mean",
    "model_stock",
    "slerp",
    "task_arithmetic",
    "trimmed_mean",
]


def mean() -> Method:
    """The weighted mean of the updates: sum w D / sum w.
    Exact, of rank at most the sum of the ranks.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.mean())
    """
    return Chain(Mean())


def task_arithmetic() -> Method:
    """The weighted sum of the updates: sum w D; negative weights forget.

    The paper's coefficient lambda (0.3 for eight tasks) is `scale=` of `merge`.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.task_arithmetic())

    Source: Ilharco et al., "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089
    """
    return Chain(Sum())


def slerp() -> Method:
    """Spherical interpolation of two adapters, layer by layer:
    (sin((1 - t) a) D_1 + sin(t a) D_2) / sin a.

    a is the angle between the updates and t = w_2 / (w_1 + w_2): for mergekit's t write weights=(1
    - t, t). mergekit interpolates whole weights; on updates the arc is that of what was learnt.
      More than two adapters are an error.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch"], method=sm.slerp())

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985
    """
    return Chain(Slerp())


def factor_average() -> Method:
    """The mean of the Bs times the mean of the As: (sum p B)(sum p A), p = w / sum w.
    Not the mean of the updates.

    What FedAvg does to LoRA parameters (FedIT). The cross terms B_i A_j make it another function of
    the adapters, and one that depends on how each is split into factors; a warning says so. Ranks
    must be equal. `mean()` is the mean of the updates.
    PEFT's combination "linear", with roots of the weights, is Chain(FactorSum()).

    Example:
        >>> import sapmerge as sm
        >>> sm.factor_average()
        Chain(FactorMean())

    Source: Zhang et al., "Towards building the federated GPT" (FedIT),
    https://arxiv.org/abs/2305.05644
    """
    return Chain(FactorMean())


def model_stock(scope: Literal["layer", "row"] = "layer") -> Method:
    """t mean(D) with t = N c / (1 + (N - 1) c), c the mean cosine between the updates of the layer.

    For adapters of one task. Those of unrelated tasks have c = 0, and what comes back is the base
    model; the report has t for every layer.

    Args:
        scope: "layer" (the paper) or "row" (mergekit's `filter_wise`).

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.model_stock())

    Source: Jang et al., "Model Stock: all we need is just a few fine-tuned models",
    https://arxiv.org/abs/2403.19522
    """
    return Chain(ModelStock(scope))


def geometric_median(scope: Literal["adapter", "layer"] = "adapter") -> Method:
    """The update that minimises sum w ||X - D||, by Weiszfeld's iteration;
    exact, of rank at most the sum of the ranks.

    Args:
        scope: "adapter" measures distances over all layers together,
            "layer" in every layer by itself.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.geometric_median())

    Source: Pillutla et al., "Robust aggregation for federated learning" (RFA),
    https://arxiv.org/abs/1912.13445. RFA smooths distances below 1e-6 and stops after a few
    iterations; ours is the minimum itself.
    """
    return Chain(GeometricMedian(scope))


def coordinate_median() -> Method:
    """The (weighted) median of every entry of the updates. The result is dense.

    With a minority of adapters in a layer (fewer than half have it) the median is zero there.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.coordinate_median())

    Source: Yin et al., "Byzantine-robust distributed learning", https://arxiv.org/abs/1803.01498
    """
    return Chain(CoordinateMedian())


def trimmed_mean(trim: float = 0.2) -> Method:
    """The mean of every entry without the `trim` share of lowest and of highest adapters.
    The result is dense.

    Args:
        trim: the share dropped at each end, in [0, 0.5): floor(trim K) adapters with equal weights,
            so fewer than 1 / trim adapters give the plain mean.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.trimmed_mean())

    Source: Yin et al., "Byzantine-robust distributed learning", https://arxiv.org/abs/1803.01498
    """
    return Chain(TrimmedMean(trim))


def krum(
    byzantine: int | None = None, select: int = 1, scope: Literal["adapter", "layer"] = "adapter"
) -> Method:
    """Krum: the adapter nearest to its K - f - 2 nearest others;
    with `select` > 1 the mean of so many (multi-Krum).

    Args:
        byzantine: f, how many adapters may be arbitrary (K >= 2 f + 3); None for the most that the
            theorem allows.
        select: how many are averaged.
        scope: "adapter" (the paper) or "layer".

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.krum())

    Source: Blanchard et al., "Machine learning with adversaries", https://arxiv.org/abs/1703.02757
    """
    return Chain(Krum(byzantine, select, scope))


def lines(method: Method | None = None, alpha: float | str = 0.5, beta: float = 0.5) -> Method:
    """LiNeS: scale the result of any method linearly with depth;
    early layers, which are shared, move least.

        D^l -> (alpha + beta l / (L - 1)) D^l in block l of L, alpha D outside of the blocks

    Args:
        method: `task_arithmetic()` by default.
        alpha: the factor of the first block. "norm" is the authors' choice for several adapters:
            the sum of magnitudes of sum_k w_k D_k over that of the merged update, divided by the
            number of adapters.
        beta: what the last block gets on top. The authors search it on validation data; for one
            model they take 1 - alpha, which is the default.

    The authors find the block by the first ".{l}." in a name, l below the number of blocks of a
    ViT: ".1." also matches an expert or a module of a Sequential. Ours is the number after
    `layers`, `h`, `blocks`, ... (see `ScaleByDepth`),
    and L = 1 is alpha instead of a division by zero.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.lines())

    Source: Wang et al., "LiNeS: Post-training layer scaling prevents forgetting and enhances model
    merging", https://arxiv.org/abs/2410.17146
    """
    return ScaleByDepth(task_arithmetic() if method is None else method, alpha, beta)
