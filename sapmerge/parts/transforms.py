"""Transforms that compare adapters: Layer -> Layer.
(`Prune`, which looks at one adapter alone, is in compose.py.)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.core_space import in_form_of, rank_of
from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import size_of
from sapmerge.core.part import part
from sapmerge.core.protocols import Transform
from sapmerge.core.updates import Dense, Update, zero_of
from sapmerge.errors import MethodError
from sapmerge.parts.masks import check_density, count_kept, descending_ranks

__all__ = ["Consensus", "ElectSign", "RoundOff", "Select", "SmoothSpectrum", "WeighByEnergy"]


@part
class ElectSign:
    """Keep, in every entry, only the adapters that have the elected sign.

    The sign of an entry is that of sum_k w_k D_k ("total") or of sum_k sign(w_k D_k) ("frequency").
    Where that sum is 0, it is the sign of all sums of the layer together;
    if that is 0 too, the entry is dropped, so f(-u) = -f(u).

    Args:
        majority_sign_method: "total" or "frequency", the names that PEFT uses.

    Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708
    """

    majority_sign_method: Literal["total", "frequency"] = "total"

    def __call__(self, layer: Layer) -> Layer:
        voters = [(m.update.dense(), m.weight) for m in layer.members if not m.absent]
        if not voters:
            return layer
        total = torch.zeros_like(voters[0][0])
        for matrix, weight in voters:
            if self.majority_sign_method == "total":
                total.add_(matrix, alpha=weight)
            else:
                total += torch.sign(weight * matrix)
        sign = total.sign_()
        majority = float(torch.sign(sign.sum()))
        # majority where the sign is 0, else as it is
        sign.addcmul_(sign, sign, value=-majority).add_(majority)
        kept = iter([Dense(_agreeing(matrix, weight, sign)) for matrix, weight in voters])
        return layer.with_updates([update if update.absent else next(kept) for update in layer])


def _agreeing(matrix: Tensor, weight: float, sign: Tensor) -> Tensor:
    """The entries for which matrix * weight has the sign; the others are 0."""
    along = matrix * sign
    along = (
        along.clamp_min_(0) if weight > 0 else along.clamp_max_(0) if weight < 0 else along.zero_()
    )
    return along.mul_(sign)


@part
class Consensus:
    """Keep the entries that enough adapters care about:
    TALL masks |D_k| > ratio |sum_j D_j - D_k|, counted.

    An entry is kept, in all adapters, if it is in the masks of at least `count` of them (of all of
    them if fewer than `count` have the layer). D stands for w D: weights scale the updates.

    Args:
        ratio: lambda of the paper, which picks it per task from 0.2 ... 0.6 on validation data.
            Higher keeps less. Of K copies of one adapter nothing is kept where ratio (K - 1) >= 1:
            lower it for adapters that are alike.
        count: k of the paper, 2: what only one adapter cares about is dropped as selfish.

    Source: Wang et al., "Localizing task information for improved model merging and compression",
    https://arxiv.org/abs/2405.07813
    """

    ratio: float = 0.4
    count: int = 2

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise MethodError(
                f"Consensus' ratio is the lambda of TALL masks, at least 0; got {self.ratio!r}"
            )
        if self.count < 1:
            raise MethodError(
                f"Consensus' count is how many adapters must agree, at least 1; got {self.count!r}"
            )

    def __call__(self, layer: Layer) -> Layer:
        scaled = [m.update.dense() * m.weight for m in layer.members if m.counts]
        if not scaled:
            return layer
        total = torch.stack(scaled).sum(0)
        votes = torch.zeros_like(total, dtype=torch.int64)
        for matrix in scaled:
            votes += matrix.abs() > self.ratio * (total - matrix).abs()
        keep = votes >= min(self.count, len(scaled))
        layer.record("consensus_density", float(keep.double().mean()))
        return layer.with_updates([_masked(update, keep) for update in layer])


@part
class Select:
    """Keep, in all adapters, the entries in which they differ most:
    the top share by variance over the adapters (SCE).

    Entries without variance are not counted: floor(density * counted + 1e-9), at least 1, are kept;
    equal variances in index order. If no entry has variance (one adapter, or copies of one) there
    is nothing to choose by, and all are kept. Weights weigh the variance.
    An adapter without the layer is a member with an update of zero.

    Args:
        density: the fraction kept, in (0, 1].

    Source: Wan et al., "FuseChat", https://arxiv.org/abs/2408.07990. mergekit keeps int(density
    counted), and nothing if that is 0, so that it returns zero for identical adapters.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, layer: Layer) -> Layer:
        members = [
            (m.update.dense() * _sign(m.weight), abs(m.weight))
            for m in layer.members
            if m.weight != 0
        ]
        if not members or self.density == 1:
            return layer
        stack = torch.stack([matrix for matrix, _ in members]).double()
        weights = torch.tensor(
            [weight for _, weight in members], dtype=torch.float64, device=stack.device
        )
        weights = (weights / weights.sum())[:, None, None]
        mean = (weights * stack).sum(0)
        variance = (weights * (stack - mean).square()).sum(0)
        noise = 8 * torch.finfo(torch.float64).eps
        variance = torch.where(variance > noise**2 * stack.square().amax(0), variance, 0.0)
        counted = int((variance > 0).sum())
        if counted == 0:
            return layer
        ranks = descending_ranks(variance.reshape(1, -1)).reshape(variance.shape)
        keep = ranks < count_kept(self.density, counted)
        return layer.with_updates([_masked(update, keep) for update in layer])


@part
class WeighByEnergy:
    """Multiply the weight of every adapter by the energy of its update,
    ||D_k||^2 / sum_j ||D_j||^2 (SCE's Calculate).

    Args:
        then: a transform that is run as if the weights were the old ones (SCE's Erase votes without
            energies).
        of: take the energies of `of(layer)` and leave the updates alone;
            by default those of the layer itself.

    Source: Wan et al., "FuseChat", https://arxiv.org/abs/2408.07990
    """

    then: Transform = ElectSign()
    of: Transform | None = None

    def __call__(self, layer: Layer) -> Layer:
        seen = layer if self.of is None else self.of(layer)
        energies = [m.update.norm() ** 2 if m.weight != 0 else 0.0 for m in seen.members]
        total = sum(energies)
        if total == 0:
            return self.then(layer)
        weights = [
            weight * energy / total for weight, energy in zip(layer.weights, energies, strict=True)
        ]
        return self.then(layer).with_weights(weights)


def _sign(weight: float) -> float:
    return 1.0 if weight > 0 else -1.0


def _masked(update: Update, keep: Tensor) -> Update:
    """The update where `keep` holds; an absent one stays absent."""
    return update if update.absent else Dense(torch.where(keep, update.dense(), 0.0))


@part
class SmoothSpectrum:
    """Even out the singular values of every update and keep their sum:
    the energy smoothing of DC-Merge.

    Args:
        smoothing: "avg": all equal; "linear": falling in equal steps from rho to 1, rho =
            min(ratio, s_1 / s_r).
        ratio: the largest ratio of the first to the last singular value, for "linear"; at least 1.

    Source: see `sapmerge.dc_merge`.
    """

    smoothing: Literal["avg", "linear"] = "avg"
    ratio: float = 5.0

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise MethodError(f"ratio is at least 1; got {self.ratio!r}")

    def __call__(self, layer: Layer) -> Layer:
        return layer.with_updates([self._smooth(update) for update in layer])

    def _smooth(self, update: Update) -> Update:
        U, sigma, Vh = update.svd()
        keep = rank_of(sigma, size_of(update))
        if keep == 0:
            return zero_of(update)
        top = 1.0 if self.smoothing == "avg" else min(self.ratio, float(sigma[0] / sigma[keep - 1]))
        share = torch.linspace(top, 1.0, keep, dtype=sigma.dtype, device=sigma.device)
        return in_form_of(
            U[:, :keep] * (share * (sigma[:keep].sum() / share.sum())), Vh[:keep], update
        )


@part
class RoundOff:
    """Round all entries to multiples of 2^-34 of the largest entry of the layer,
    so that what is opposite cancels.

    Before a sign election in coordinates that were computed: the sum of opposites is else their
    rounding error, and the election follows its sign.
    """

    def __call__(self, layer: Layer) -> Layer:
        entries = {k: update.dense() for k, update in enumerate(layer) if not update.absent}
        step = (
            max((float(matrix.abs().max()) for matrix in entries.values()), default=0.0) * 2.0**-34
        )
        if step == 0:
            return layer
        rounded = {k: Dense(torch.round(matrix / step) * step) for k, matrix in entries.items()}
        return layer.with_updates([rounded.get(k, update) for k, update in enumerate(layer)])
