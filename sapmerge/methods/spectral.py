"""Methods that merge singular vectors: TSV, Iso-C, Iso-CTS, CART, DC-Merge, Subspace Boosting.

Weights multiply the updates. On low-rank updates they run in the core of the factors, and what the
papers' codes draw from the null space is left out; see `sapmerge.spectral`.
Inside `core_space`, min(m, n) is the side of the core.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from sapmerge.core.core_space import check_fraction, in_form_of, rank_of
from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import size_of
from sapmerge.core.part import part, prepare
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.updates import Update, zero_of
from sapmerge.parts.masks import TopWithTies
from sapmerge.parts.mergers.cover_space import InCoverSpace
from sapmerge.parts.mergers.linear import DisjointMean, Sum
from sapmerge.parts.mergers.spectral import CART, Decorrelate, Isotropic, IsotropicCommonSpecific
from sapmerge.parts.prune import Prune
from sapmerge.parts.scorers import Magnitude
from sapmerge.parts.transforms import ElectSign, RoundOff, SmoothSpectrum
from sapmerge.parts.wrappers import Chain

__all__ = ["BoostSpectrum", "cart", "dc_merge", "iso_c", "iso_cts", "subspace_boosting", "tsv"]


def tsv() -> Method:
    """TSV-M: cut every update to its share of directions, decorrelate the singular
    vectors of all, sum.

    D = polar([U_1 | ... | U_K]) diag(S_1, ..., S_K) polar([V_1 | ... | V_K])^T, of floor(min(m, n)
    / K) components per adapter, at most its rank. The result's rank is the number of all
    components. Adapters that are zero, absent or of weight zero are not among the K;
    copies of one adapter count once, so K copies with enough components give it back.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.tsv())

    Source: Gargiulo et al., "Task Singular Vectors", https://arxiv.org/abs/2412.00081. The code
    fills every share of a LoRA adapter of lower rank with null-space vectors, which take directions
    from the real ones (40 to 120 % between float32 and float64); ours has none, and equals the code
    where every share is filled. The authors' alpha (1 in the paper, searched in [0, 3] by the code)
    is `scale=` of `merge`. `Decorrelate(rank)` sets the share.
    """
    return Chain(Decorrelate(), Sum())


def iso_c() -> Method:
    """Iso-C: the sum of the updates with all singular values equal,
    mean(S) U V^T for sum w D = U S V^T.

    Rank: that of the sum. One adapter does not come back: its spectrum is flattened too.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.iso_c())

    Source: Marczak et al., "No task left behind", https://arxiv.org/abs/2502.04959. The mean runs
    over the rank of the sum (as in the core space of Panariello et al.), which keeps the sum of the
    singular values. The authors' runs over min(m, n): `Isotropic(over="full")`, rank / min(m, n)
    times ours, plus arbitrary null-space directions that we drop.
    Their published LoRA numbers have those, with alpha (here `scale=` of `merge`)
    searched in (0, 3].
    """
    return Isotropic(Sum())


def iso_cts(common_fraction: float = 0.8) -> Method:
    """Iso-CTS: Iso-C in which the last directions of the sum make room for directions of
    single adapters.

    Args:
        common_fraction: the share of directions that the sum keeps, in [0, 1] (0.8 in the paper).

    Rank: at most that of the sum. `IsotropicCommonSpecific(over="full")` divides min(m, n)
    directions as the authors' code does, ours the rank of the sum;
    they agree where the sum has full rank. See `iso_c` for alpha.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.iso_cts())

    Source: Marczak et al., "No task left behind", https://arxiv.org/abs/2502.04959
    """
    return IsotropicCommonSpecific(common_fraction)


def cart(rank_fraction: float = 0.04, scale: float = 0.1) -> Method:
    """CART: the mean plus scale times the sum of the main components of every update's
    distance from it.

    Args:
        rank_fraction: ceil(rank_fraction min(m, n)) components are kept.
        scale: of the centred sum; 1 with rank_fraction 1 is the mean again,
            as the distances sum to zero.

    Rank: that of all updates together. The defaults are those of the core-space code.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.cart())

    Source: Choi et al., "Revisiting weight averaging for model merging",
    https://arxiv.org/abs/2412.12153
    """
    return CART(rank_fraction, scale)


def dc_merge(smoothing: Literal["avg", "linear", "none"] = "avg", density: float = 0.001) -> Method:
    """DC-Merge: even out the singular values, keep the largest entries in the common cover space,
    elect signs, average.

    1. Every update is cut to its rank or floor(min(m, n) / K), and written in the cover space (see
    `InCoverSpace`). 2. Its singular values are smoothed and the largest entries kept.
    3. The entries are merged as TIES does; only those inside one adapter's block remain.

    Args:
        smoothing: "avg" (all singular values equal), "linear" (ratio at most 5) or "none" (the code
            for full fine-tuning).
        density: the fraction of entries of the cover space kept per adapter, at least one;
            0.1 % in the authors' code.

    Rank: at most the number of all components. The code takes 16 components of every LoRA adapter,
    whatever its rank: `InCoverSpace(..., rank=16)`, less the null space.
    The authors' scale on MM-MergeBench is 2: `scale=` of `merge`.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.dc_merge())

    Source: "DC-Merge" (CVPR 2026), https://github.com/Tobeginwith/DC-Merge
    """
    prune = Prune(Magnitude(), TopWithTies(density))
    smooth = () if smoothing == "none" else (SmoothSpectrum(smoothing),)
    return InCoverSpace(Chain(*smooth, RoundOff(), prune, ElectSign(), DisjointMean()))


@part
class BoostSpectrum:
    """Raise the small singular values of a method's result: s' = max(s, s_k).

    k is the first with s_1 + ... + s_k >= beta (s_1 + ... + s_r).

    Args:
        method: any method.
        beta: the share of the sum of singular values that stays as it is, in [0, 1]: 0 makes all of
            them the largest, 1 changes nothing.

    Only directions that the result has are raised;
    those of the null space are arbitrary, so its rank stays.
    """

    method: Method = Sum()
    beta: float = 0.01

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)

    def prepare(self, layers: LayerStream) -> BoostSpectrum:
        return replace(self, method=prepare(self.method, layers))

    def __call__(self, layer: Layer) -> Update:
        merged = self.method(layer)
        U, sigma, Vh = merged.svd()
        keep = rank_of(sigma, size_of(merged))
        if keep == 0:
            return zero_of(merged)
        sigma = sigma[:keep]
        reached = torch.cumsum(sigma, 0) >= self.beta * sigma.sum() * (1 - 1e-12)
        floor = sigma[int(reached.to(torch.int8).argmax())]
        return in_form_of(U[:, :keep] * sigma.clamp(min=float(floor)), Vh[:keep], merged)


def subspace_boosting(method: Method = Sum(), beta: float = 0.01) -> Method:
    """Subspace Boosting: of the few large and many small directions of a sum, raise the small ones.

        s'_j = max(s_j, s_k),   k the first with s_1 + ... + s_k >= beta (s_1 + ... + s_r)

    Args:
        method: whose result is boosted: a sum (task arithmetic), `ties()`, `consensus_ta()`, ...
        beta: 0.00 to 0.02 in the paper, 0.01 in its code.

    With the small betas of the paper all singular values become nearly the largest, so the result
    is several times longer than the method's own: compare at matched length (`MatchEnergy`).
    One adapter does not come back.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.subspace_boosting())

    Source: Skorobogat et al., "Subspace-Boosted Model Merging", https://arxiv.org/abs/2506.16506.
    The authors raise all min(m, n) singular values, also of the null space of a low-rank sum,
    whose directions are arbitrary; we do not.
    """
    return BoostSpectrum(method, beta)
