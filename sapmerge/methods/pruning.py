"""Prune every update on its own, by size or by chance, then combine: TIES, DARE and their kin."""

from __future__ import annotations

from sapmerge.compose import Chain
from sapmerge.layer import Method
from sapmerge.masks import Threshold, TopFraction, check_density
from sapmerge.mergers import DisjointMean, Sum
from sapmerge.prune import Prune
from sapmerge.rescalers import Divide
from sapmerge.scorers import Magnitude, Random
from sapmerge.transforms import ElectSign

__all__ = ["dare", "dare_ties", "magnitude_prune", "ties"]


def magnitude_prune(density: float = 0.5) -> Method:
    """Keep the entries of largest magnitude of every update, then sum.

    Args:
        density: the fraction of entries kept per layer.
    """
    return Chain(Prune(Magnitude(), TopFraction(density)), Sum())


def ties(density: float = 0.2, majority_sign_method: str = "total", scope: str = "layer") -> Method:
    """TIES: keep the largest entries, elect a sign per entry, average the adapters that agree with it.

    Args:
        density: the fraction of entries kept (the paper's K is 20 %).
        majority_sign_method: "total" (the paper) or "frequency".
        scope: "layer" (as mergekit, PEFT and the core-space code) or "adapter": one threshold for the whole adapter
            (the paper's code and KnOTS), which can empty layers with small updates.

    Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708. The authors' code keeps int(density n) + 1
    entries and, under a tie of magnitudes, more; ours keeps floor(density n).
    """
    return Chain(Prune(Magnitude(), TopFraction(density, scope)), ElectSign(majority_sign_method), DisjointMean())


def dare(density: float = 0.5, seed: int = 0) -> Method:
    """DARE: keep every entry with probability `density`, divide by it, sum.

    Args:
        density: the probability of keeping (the paper drops with p = 1 - density, up to 0.99).
        seed: of the masks; they do not depend on order, paths or threads.

    Source: Yu et al., "Language models are super Mario", https://arxiv.org/abs/2311.03099
    """
    return Chain(_drop(density, seed), Sum())


def dare_ties(density: float = 0.5, seed: int = 0, majority_sign_method: str = "total") -> Method:
    """DARE's random pruning, then the sign election and the disjoint mean of TIES."""
    return Chain(_drop(density, seed), ElectSign(majority_sign_method), DisjointMean())


def _drop(density: float, seed: int) -> Prune:
    check_density(density)
    return Prune(Random(seed), Threshold(1 - density), Divide(density))
