"""Scorers: (values, stats) -> scores of the same shape. The highest scores are kept.

A plain function is a scorer too: `lambda values, stats: (values * stats.gradient).abs()`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sapmerge.core.part import part
from sapmerge.core.protocols import Stats

__all__ = [
    "Activation",
    "SecondOrder",
    "Magnitude",
    "PerSampleTaylor",
    "Random",
    "SNIP",
    "SignedTaylor",
    "Taylor",
]


@part
class Magnitude:
    """|w|: keep what is large.

    Example:
        >>> import torch, sapmerge as sm
        >>> sm.Magnitude()(torch.tensor([-2.0, 1.0]), None)
        tensor([2., 1.])
    """

    reads_gradients: ClassVar[bool] = False

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return values.abs()


@part
class Random:
    """Uniform scores in [0, 1), the coin of DARE.

    Drawn from a generator that is seeded by (seed, content of the adapter, name of the layer,
    part), so the result does not depend on the order of adapters or layers, on paths or threads.

    Args:
        seed: any integer.
    """

    seed: int = 0
    reads_gradients: ClassVar[bool] = False

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        drawn = torch.rand(values.shape, generator=stats.generator(self.seed), dtype=torch.float64)
        return drawn.to(values.device)


@part
class Taylor:
    """|w g|: to first order, how much the anchor loss changes if w is dropped.
    SAP's saliency; SNIP's, up to a factor.

    Args:
        at: gradients at base + "adapter" (SAP), or at the "base" (one pass for all adapters).

    Source: Molchanov et al., https://arxiv.org/abs/1906.10771; Lee et al.
    (SNIP), https://arxiv.org/abs/1810.02340
    """

    at: Literal["adapter", "base"] = "adapter"
    reads_gradients: ClassVar[bool] = True

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return (values * stats.moment("mean", self.at)).abs()


@part
class SignedTaylor:
    """-w g: by how much w lowers the anchor loss. Drops what hurts it, however large.

    A loss without negatives, like 1 - cos, can be won by collapsing; use `contrastive`.

    Args:
        at: see `Taylor`.
    """

    at: Literal["adapter", "base"] = "adapter"
    reads_gradients: ClassVar[bool] = True

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return -values * stats.moment("mean", self.at)


@part
class PerSampleTaylor:
    """|w| E|g| with the mean over single anchors: what matters for some of them counts even if it
    cancels in the mean.

    Args:
        at: see `Taylor`.
    """

    at: Literal["adapter", "base"] = "adapter"
    reads_gradients: ClassVar[bool] = True

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return values.abs() * stats.moment("absolute", self.at)


@part
class SecondOrder:
    """w^2 E[g^2] / 2 with the mean over single anchors:
    the second-order effect of dropping w (diagonal Fisher, OBD).

    Args:
        at: see `Taylor`.

    Source: LeCun et al., "Optimal brain damage", 1989;
    Theis et al., https://arxiv.org/abs/1801.05787
    """

    at: Literal["adapter", "base"] = "adapter"
    reads_gradients: ClassVar[bool] = True

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return values.square() * stats.moment("square", self.at) / 2


@part
class SNIP:
    """|w g| / sum |w g|: Taylor's score as a share of its tensor, so that every layer counts alike.

    Within a layer it ranks as `Taylor()` does; the shares matter for TopFraction(scope="adapter").
    The authors divide by the sum over the whole network, which changes no rank at all:
    their method is Taylor() with that scope.

    Args:
        at: see `Taylor`; the authors score at the base ("at initialisation").

    Source: Lee et al., "SNIP", https://arxiv.org/abs/1810.02340
    """

    at: Literal["adapter", "base"] = "adapter"
    reads_gradients: ClassVar[bool] = True

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        scores = (values * stats.moment("mean", self.at)).abs()
        total = scores.sum()
        return scores / total if float(total) > 0 else scores


@part
class Activation:
    """|w| |x_j|: how much dropping w changes the output of its layer on the anchors;
    no gradient is needed (Wanda).

    |x_j| is the norm of the input that w multiplies, at base + adapter: the square root of the mean
    over anchors of its square, summed over tokens. On Entries and on the factor A that is the
    layer's input x, on B it is A x, on Directions v^T x. The published comparison is within each
    row: Prune(Activation(), PerRow(density)).

    Source: Sun et al., "A simple and effective pruning approach for large language models" (Wanda),
    https://arxiv.org/abs/2306.11695
    """

    reads_gradients: ClassVar[bool] = True  # it reads the anchors

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return values.abs() * stats.activations.to(values)
