"""STAR: each update cut to its main directions, at the nuclear norm that it had."""

from __future__ import annotations

import torch
from torch import Tensor

from sapmerge.core.part import part
from sapmerge.core.protocols import Merger, Method
from sapmerge.core.updates import Update
from sapmerge.parts.masks import check_density, descending_ranks
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.prune import Prune
from sapmerge.parts.scorers import Magnitude
from sapmerge.parts.units import Directions
from sapmerge.parts.wrappers import Chain

__all__ = ["MatchNuclearNorm", "TopSum", "star"]


@part
class TopSum:
    """Keep the fewest highest scores whose sum reaches `share` of the sum of all.

    Args:
        share: in (0, 1]; 1 keeps everything.

    Example:
        >>> import torch, sapmerge as sm
        >>> sm.TopSum(0.5)(torch.tensor([3.0, 1.0, 2.0, 1.0]))
        tensor([ True, False,  True, False])
    """

    share: float

    def __post_init__(self) -> None:
        check_density(self.share)

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.numel() == 0 or self.share == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        flat = scores.flatten().double()
        reached = flat.sort(descending=True).values.cumsum(0) >= self.share * flat.sum()
        kept = int(reached.to(torch.int8).argmax()) + 1
        return (descending_ranks(flat) < kept).view(scores.shape)


@part
class MatchNuclearNorm:
    """pruned * |original|_* / |pruned|_*, the sums of singular values;
    a pruned update of zero stays zero.
    """

    def __call__(self, pruned: Update, original: Update) -> Update:
        have, want = (float(update.svd(0)[1].sum()) for update in (pruned, original))
        return pruned.scaled(want / have) if have > 0 else pruned


def star(share: float = 0.4, merger: Merger = Mean()) -> Method:
    """STAR: of every update the first singular directions that hold `share` of the sum of singular
    values, rescaled to the whole sum; then the mean.

    Args:
        share: of the sum of singular values, in (0, 1]; 0.4 in the authors' runs (eta = 40).
        merger: how the updates are combined.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.star())

    Source: Lee et al., "STAR: spectral truncation and rescale for model merging",
    https://arxiv.org/abs/2502.10339
    """
    return Chain(Prune(Magnitude(), TopSum(share), MatchNuclearNorm(), Directions()), merger)
