"""Spectral Surgery: singular values of each update raised where the anchors' loss is sensitive to
them, and lowered elsewhere.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sapmerge.core.part import part
from sapmerge.core.protocols import Merger, Method, Stats
from sapmerge.errors import MethodError
from sapmerge.parts.masks import TopFraction, check_density
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.prune import Prune
from sapmerge.parts.rescalers import MatchNorm
from sapmerge.parts.units import Directions
from sapmerge.parts.wrappers import Chain

__all__ = ["Emphasize", "Sensitivity", "spectral_surgery"]


@part
class Sensitivity:
    """|g|: how much the anchor loss changes with a unit, however large the unit is.

    Args:
        at: see `Taylor`.
    """

    at: Literal["adapter", "base"] = "adapter"
    reads_gradients: ClassVar[bool] = True

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        return stats.moment("mean", self.at).abs().to(values)


@part
class Emphasize:
    """A soft mask: the `share` of highest scores is multiplied by `up`, the rest by `down`.

    Args:
        share: floor(share n + 1e-9) of n, at least 1; equal scores in index order.
        up: at least `down`.
        down: at least 0.

    Example:
        >>> import torch, sapmerge as sm
        >>> sm.Emphasize(0.5)(torch.tensor([3.0, 1.0, 2.0, 0.0]))
        tensor([1.2500, 0.8000, 1.2500, 0.8000])
    """

    share: float = 0.5
    up: float = 1.25
    down: float = 0.8

    def __post_init__(self) -> None:
        check_density(self.share)
        if not 0 <= self.down <= self.up:
            raise MethodError(
                f"Emphasize takes 0 <= down <= up; got up={self.up!r}, down={self.down!r}"
            )

    def __call__(self, scores: Tensor) -> Tensor:
        high = TopFraction(self.share)(scores)
        return torch.where(high, self.up, self.down).to(scores)


def spectral_surgery(
    share: float = 0.5, up: float = 1.25, down: float = 0.8, merger: Merger = Mean()
) -> Method:
    """Spectral Surgery: singular values times 1.25 where |u^T G v| is high, times 0.8 elsewhere, at
    the norm that the update had; then the mean.

    Args:
        share: of directions that are raised, per layer and adapter.
        up: their factor.
        down: that of the others.
        merger: how the refined adapters are combined.

    G is the gradient of the anchors' loss at base + adapter. The paper refines one adapter, which
    is a merge of one; all directions stay what they are.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.spectral_surgery()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: Tian et al., "Training-free refinement of LoRA via gradient-guided singular value
    reweighting", https://arxiv.org/abs/2603.03995. The norm that is kept is Frobenius'.
    """
    return Chain(
        Prune(Sensitivity(), Emphasize(share, up, down), MatchNorm(), Directions()), merger
    )
