"""Prune every update on its own, by size or by chance, then combine: TIES, DARE and their kin."""

from __future__ import annotations

from typing import Literal

from sapmerge.core.protocols import Method
from sapmerge.parts.chances import Flip, RankChance
from sapmerge.parts.masks import DropOutliers, Reciprocal, Threshold, TopFraction, check_density
from sapmerge.parts.mergers.linear import DisjointMean, Sum
from sapmerge.parts.prune import Prune
from sapmerge.parts.rescalers import Divide
from sapmerge.parts.scorers import Magnitude, Random
from sapmerge.parts.transforms import Consensus, ElectSign, Select, WeighByEnergy
from sapmerge.parts.wrappers import Chain

__all__ = [
    "breadcrumbs",
    "consensus_ta",
    "dare",
    "dare_ties",
    "della",
    "magnitude_prune",
    "sce",
    "ties",
]


def consensus_ta(ratio: float = 0.4, count: int = 2) -> Method:
    """Consensus task arithmetic: the sum of the updates in the entries that at least `count`
    adapters care about.

    D = sum_k D_k where #{k: |D_k| > ratio |sum_j D_j - D_k|} >= count, else 0 (TALL masks).

    Args:
        ratio: lambda of the TALL masks; the authors pick it per task from 0.2 ... 0.6 on validation
            data.
        count: how many adapters must care; of fewer adapters, all must.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.consensus_ta())

    Source: Wang et al., "Localizing task information for improved model merging and compression",
    https://arxiv.org/abs/2405.07813. The authors scale the result by an alpha found on validation
    data: `scale=`.
    """
    return Chain(Consensus(ratio, count), Sum())


def magnitude_prune(density: float = 0.5) -> Method:
    """Keep the entries of largest magnitude of every update, then sum.

    Args:
        density: the fraction of entries kept per layer.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.magnitude_prune(density=0.2))
    """
    return Chain(Prune(Magnitude(), TopFraction(density)), Sum())


def ties(
    density: float = 0.2,
    majority_sign_method: Literal["total", "frequency"] = "total",
    scope: Literal["layer", "adapter"] = "layer",
) -> Method:
    """TIES: keep the largest entries, elect a sign per entry,
    average the adapters that agree with it.

    Args:
        density: the fraction of entries kept (the paper's K is 20 %).
        majority_sign_method: "total" (the paper) or "frequency".
        scope: "layer" (as mergekit, PEFT and the core-space code) or "adapter": one threshold for
            the whole adapter (the paper's code and KnOTS),
            which can empty layers with small updates.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.ties(density=0.2))

    Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708. The authors' code keeps
    int(density n) + 1 entries and, under a tie of magnitudes, more; ours keeps floor(density n).
    """
    return Chain(
        Prune(Magnitude(), TopFraction(density, scope)),
        ElectSign(majority_sign_method),
        DisjointMean(),
    )


def dare(density: float = 0.5, seed: int = 0) -> Method:
    """DARE: keep every entry with probability `density`, divide by it, sum.

    Args:
        density: the probability of keeping (the paper drops with p = 1 - density, up to 0.99).
        seed: of the masks; they do not depend on order, paths or threads.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.dare(density=0.3))

    Source: Yu et al., "Language models are super Mario", https://arxiv.org/abs/2311.03099
    """
    return Chain(_drop(density, seed), Sum())


def dare_ties(
    density: float = 0.5,
    seed: int = 0,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> Method:
    """DARE's random pruning, then the sign election and the disjoint mean of TIES.

    Args:
        density: the probability of keeping an entry.
        seed: see `dare`.
        majority_sign_method: see `ties`.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.dare_ties(density=0.3))

    Source: Yu et al., https://arxiv.org/abs/2311.03099;
    Yadav et al., https://arxiv.org/abs/2306.01708
    """
    return Chain(_drop(density, seed), ElectSign(majority_sign_method), DisjointMean())


def della(
    density: float = 0.7,
    window: float = 0.14,
    seed: int = 0,
    scope: Literal["row", "layer"] = "row",
) -> Method:
    """DELLA: keep entries by chance, larger ones more likely, divide each by its chance;
    then the election of TIES.

    p = density - window/2 + window (rank - 1)/(n - 1), rank 1 the smallest magnitude of the n;
    D~ = D / p where kept.

    Args:
        density: the mean chance of being kept (the paper drops 0.3).
        window: the chance of the largest minus that of the smallest: 2 epsilon. mergekit's
            `epsilon` is half of it.
        seed: of the draws; they do not depend on order, paths or threads.
        scope: "row" ranks within rows (the paper), "layer" within the whole matrix.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.della(density=0.7))

    Source: Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617. The authors scale the
    result by 1.1: `scale=` of `merge`. mergekit matches the sum of magnitudes instead of dividing
    by p: `MatchNorm(1)`.
    """
    prune = Prune(Flip(RankChance(density, window, scope), seed), Reciprocal())
    return Chain(prune, ElectSign(), DisjointMean())


def breadcrumbs(
    density: float = 0.1,
    gamma: float = 0.01,
    scope: Literal["layer", "row"] = "layer",
    first: Literal["drop", "keep"] = "drop",
) -> Method:
    """Model Breadcrumbs: drop the largest entries of every update as outliers,
    keep the next largest, sum.

    Args:
        density: the fraction of entries kept (the authors keep 0.1 to 0.15; their beta is 1 - gamma
            - density).
        gamma: the fraction dropped at the top.
        scope: "layer" (the paper; mergekit) or "row" (the authors' code, which made the published
            numbers).
        first: see `DropOutliers`.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.breadcrumbs())

    Source: Davari & Belilovsky, https://arxiv.org/abs/2312.06795.
    The authors scale the sum (0.3 or so): `scale=`.
    """
    return Chain(Prune(Magnitude(), DropOutliers(density, gamma, scope, first)), Sum())


def sce(density: float = 0.1) -> Method:
    """SCE: select the entries in which adapters differ most, weigh adapters by their energy there,
    erase minorities.

    sum e_k eta_k D_k / sum e_k eta_k over the selected entries, eta_k = w_k ||D_k||^2 / sum_j
    ||D_j||^2 of the selected updates, e_k = 1 where D_k has the sign of sum_j w_j D_j.

    Args:
        density: the fraction of entries selected (0.1 in FuseChat, 1.0 in FuseO1).

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.sce())

    Source: Wan et al., "FuseChat: knowledge fusion of chat models",
    https://arxiv.org/abs/2408.07990. This is the text of the paper, and mergekit; the authors'
    code, which made their models, selects for eta alone and merges whole updates:
    Chain(WeighByEnergy(of=Select(density)), DisjointMean()).
    """
    return Chain(Select(density), WeighByEnergy(ElectSign()), DisjointMean())


def _drop(density: float, seed: int) -> Prune:
    check_density(density)
    return Prune(Random(seed), Threshold(1 - density), Divide(density))
