"""How federated learning averages LoRA: rules on the factors, and robust PCA of the updates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapmerge.contrib.lorm import shared
from sapmerge.core.layer import Layer
from sapmerge.core.linalg import norm, svd
from sapmerge.core.part import part
from sapmerge.core.protocols import Method
from sapmerge.core.updates import Dense, LowRank, Update, zero_of
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.linear import total_weight
from sapmerge.parts.wrappers import Chain

__all__ = [
    "FactorPCA",
    "PaddedFactorMean",
    "RobustPCA",
    "SharedFactorMean",
    "fedrpca",
    "ffa",
    "hetlora",
    "yoco",
]


@part
class SharedFactorMean:
    """(sum_k p_k B_k) A with the A that all adapters share, p = w / sum w:
    the mean of the updates, of rank r.

    An adapter without the layer counts with a B of zero.

    Raises:
        MethodError: the adapters do not share A, an update is dense, or the weights sum to zero.
    """

    def __call__(self, layer: Layer) -> Update:
        A, total = shared(layer, "A"), total_weight(layer, "")
        if A is None:
            return zero_of(layer.updates[0])
        B = sum(w / total * u.B for u, w in _low(layer))
        return (
            LowRank(B, A.to(layer.updates[0].dtype))
            if isinstance(B, Tensor)
            else zero_of(layer.updates[0])
        )


@part
class PaddedFactorMean:
    """(sum_k p_k B_k)(sum_k p_k A_k), factors padded with zeros to the largest rank,
    p_k ~ w_k ||D_k||.

    Not the mean of the updates, and it depends on how each is split into factors. The rows that
    only large ranks have are diluted by the zeros of the others.

    Raises:
        MethodError: an update is dense.
    """

    def __call__(self, layer: Layer) -> Update:
        present = _low(layer)
        norms = [w * u.norm() for u, w in present]
        total = sum(norms)
        if not total:
            return zero_of(layer.updates[0])
        rank = max(u.rank for u, _ in present)
        m, n = layer.shape
        B, A = present[0][0].B.new_zeros(m, rank), present[0][0].A.new_zeros(rank, n)
        for (update, _), size in zip(present, norms, strict=True):
            B[:, : update.rank] += size / total * update.B
            A[: update.rank] += size / total * update.A
        return LowRank(B, A)


@part
class FactorPCA:
    """(sum_k p_k B_k) A', A' the p-weighted mean of the As in their first principal components,
    p = w / sum w.

    The As are points; their principal components are those around the unweighted mean.

    Args:
        components: how many; K - 1 or more leave the mean of the As as it is (`FactorMean`).

    Raises:
        MethodError: unequal ranks, a dense update, or weights that sum to zero.
    """

    components: int = 2

    def __post_init__(self) -> None:
        if self.components < 1:
            raise MethodError(f"components is a number from 1 on; got {self.components!r}")

    def __call__(self, layer: Layer) -> Update:
        present, total = _low(layer), total_weight(layer, "")
        if not present:
            return zero_of(layer.updates[0])
        if len({update.rank for update, _ in present}) > 1:
            ranks = sorted({update.rank for update, _ in present})
            raise MethodError(
                f"layer {layer.name!r}: factors can only be averaged at one rank; got {ranks}; use "
                "mean()"
            )
        shape, dtype = present[0][0].A.shape, present[0][0].dtype
        points = torch.stack([update.A.double().flatten() for update, _ in present])
        shares = torch.tensor(
            [w / total for _, w in present], dtype=torch.float64, device=points.device
        )
        center = points.mean(0)
        axes = svd(points - center)[2][: self.components]
        # Adapters without the layer are points at zero, which take part in the mean but shape no
        # component.
        A = shares.sum() * center + ((shares @ (points - center)) @ axes.T) @ axes
        B = torch.stack(
            [share * update.B.double() for share, (update, _) in zip(shares, present)]
        ).sum(0)
        return LowRank(B.to(dtype), A.reshape(shape).to(dtype))


@part
class RobustPCA:
    """Split the stacked updates into low rank + sparse, M = L + S, and take mean(L) + beta mean(S).

        min ||L||_* + ||S||_1 / sqrt(max(m n, K))   subject to   L + S = [vec D_1 ... vec D_K]

    What the updates have in common is in L, entries of single adapters in S.
    The result is dense; M, L and S are held.

    Args:
        beta: of the sparse part; 1 is the plain mean, 0 leaves it out.
        iterations: of ADMM at most; it stops at a residual of 1e-7.

    Raises:
        MethodError: the weights sum to zero.
    """

    beta: float = 1.0
    iterations: int = 200

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise MethodError(f"beta is a number; got {self.beta!r}")

    def __call__(self, layer: Layer) -> Update:
        total = total_weight(layer, "")
        counted = [(m.update, m.weight / total) for m in layer.members if m.weight]
        shares = torch.tensor(
            [share for _, share in counted], dtype=torch.float64, device=layer.updates[0].device
        )
        stacked = torch.stack([update.dense().double().flatten() for update, _ in counted], dim=1)
        # One adapter has nothing in common with others: all of it is low rank.
        sparse = (
            _sparse_part(stacked, self.iterations)
            if len(counted) > 1
            else torch.zeros_like(stacked)
        )
        mean = (stacked - sparse) @ shares + self.beta * (sparse @ shares)
        return Dense(mean.reshape(layer.shape).to(layer.updates[0].dtype))


def _sparse_part(stacked: Tensor, iterations: int) -> Tensor:
    """S of principal component pursuit, by ADMM (Candes et al., section 5)."""
    size = norm(stacked)
    sparse, dual = torch.zeros_like(stacked), torch.zeros_like(stacked)
    if size == 0:
        return sparse
    step = stacked.numel() / (4 * stacked.abs().sum())
    price = 1 / math.sqrt(max(stacked.shape))
    for _ in range(iterations):
        U, sigma, Vh = svd(stacked - sparse + dual / step)
        low = (U * (sigma - 1 / step).clamp_min(0)) @ Vh
        rest = stacked - low + dual / step
        sparse = rest.sign() * (rest.abs() - price / step).clamp_min(0)
        gap = stacked - low - sparse
        dual = dual + step * gap
        if norm(gap) <= 1e-7 * size:
            break
    return sparse


def _low(layer: Layer) -> list[tuple[LowRank, float]]:
    """Factors and weights of the adapters that have the layer."""
    present = [(member.update, member.weight) for member in layer.members if member.counts]
    low = [(update, weight) for update, weight in present if isinstance(update, LowRank)]
    if len(low) < len(present):
        raise MethodError(
            f"layer {layer.name!r}: an update is dense and has no factors to average; use mean()"
        )
    return low


def ffa() -> Method:
    """FFA-LoRA: all clients have trained B alone on one shared, frozen A;
    the mean of the Bs is then exact.

        D = (sum p_k B_k) A,   p = w / sum w

    It equals `mean()` at the rank of one adapter. Adapters whose As differ are refused: clients who
    initialised on their own were not trained this way.

    Example:
        >>> import sapmerge as sm
        >>> sm.ffa()
        Chain(SharedFactorMean())

    Source: Sun et al., "Improving LoRA in privacy-preserving federated learning",
    https://arxiv.org/abs/2403.12313
    """
    return Chain(SharedFactorMean())


def hetlora() -> Method:
    """HetLoRA: factors of different ranks, padded with zeros and averaged with weights ||B_k
    A_k||; not exact.

        D = (sum p_k B_k)(sum p_k A_k),   p_k ~ w_k ||B_k A_k||

    Weights are per layer. Take the first r rows for a client of rank r,
    or `mean()` for what the clients really sent.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.hetlora())

    Source: Cho et al., "Heterogeneous LoRA for federated fine-tuning of on-device foundation
    models", https://arxiv.org/abs/2401.06432
    """
    return Chain(PaddedFactorMean())


def yoco(components: int = 2) -> Method:
    """YOCO's server: the mean of the Bs, times the mean of the As in their first principal
    components; not exact.

    Args:
        components: of the PCA of the As; K - 1 or more give `factor_average()`.

    Clients of YOCO train with a shared initialisation, a sign penalty on B and an L1 penalty on A,
    which no server can add afterwards. The centring of the PCA (on the unweighted mean) is ours:
    no public code has the server's part.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.yoco())

    Source: "You only communicate once: one-shot federated low-rank adaptation of
    MLLM" (NeurIPS 2025)
    """
    return Chain(FactorPCA(components))


def fedrpca(beta: float = 1.0, iterations: int = 200) -> Method:
    """FedRPCA: robust PCA of the stacked updates; the mean of the low-rank part + beta times that
    of the sparse part.

    Args:
        beta: how much single adapters' entries count; 1, the default, is the plain mean: the
            paper's rule for it is in nothing public that we found, so it is an argument.
        iterations: of the decomposition at most.

    Dense: K m n numbers per layer are held three times.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.fedrpca())

    Source: "FedRPCA: enhancing federated LoRA aggregation using robust PCA",
    https://arxiv.org/abs/2506.01194
    """
    return Chain(RobustPCA(beta, iterations))
