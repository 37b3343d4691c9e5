"""Scorers that keep by chance, with chances that grow with magnitude (DELLA).

    Prune(Flip(RankChance(density=0.7, window=0.14), seed=0), Reciprocal())

`RankChance` and `MagnitudeChance` give the chance p of every value; `Flip` draws, and scores p
where the value is kept and 0 where it is not, so that the mask `Reciprocal` divides what is
kept by its chance.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sapmerge.core.part import part
from sapmerge.core.protocols import Scorer, Stats
from sapmerge.errors import MethodError
from sapmerge.parts.masks import check_density, descending_ranks

__all__ = ["Flip", "MagnitudeChance", "RankChance"]


@part
class RankChance:
    """The chance grows with the rank of |w|: p = density - window/2 + window (rank - 1)/(n - 1),
    rank 1 the smallest.

    A row of one value has p = density; density 1 means p = 1.

    Args:
        density: the mean chance, in (0, 1].
        window: the chance of the largest minus that of the smallest. The authors' `window_size`;
            mergekit's `epsilon` is half of it.
        scope: "row" ranks within every row (the paper), "layer" within the tensor.

    Source: Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617
    """

    density: float
    window: float = 0.14
    scope: Literal["row", "layer"] = "row"
    reads_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_window(self.density, self.window)

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        if values.numel() == 0:
            return torch.zeros(values.shape, dtype=torch.float64, device=values.device)
        rows = values.abs() if self.scope == "row" else values.abs().reshape(1, -1)
        above, total = descending_ranks(rows), rows.shape[-1]
        place = (
            1 - above.double() / (total - 1)
            if total > 1
            else torch.full_like(above, 0.5, dtype=torch.float64)
        )
        return _chance(place, self.density, self.window).reshape(values.shape)


@part
class MagnitudeChance:
    """The chance grows with |w| itself: p = density - window/2 + window (|w| - min)/(max - min),
    over every row.

    Where all magnitudes of a row are equal, p = density.

    Args:
        density: the middle of the range of chances, in (0, 1].
        window: the chance of the largest minus that of the smallest.

    Source: `magnitude_sample` of the DELLA authors' code, a variant that the paper compares with.
    """

    density: float
    window: float = 0.14
    reads_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_window(self.density, self.window)

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        if values.numel() == 0:
            return torch.zeros(values.shape, dtype=torch.float64, device=values.device)
        size = values.abs().double()
        low, high = size.amin(-1, keepdim=True), size.amax(-1, keepdim=True)
        span = high - low
        place = torch.where(span > 0, (size - low) / torch.where(span > 0, span, 1.0), 0.5)
        return _chance(place, self.density, self.window)


@part
class Flip:
    """Keep every value with its chance: the score is p where it is kept, else 0.

    Drawn as `Random` draws: seeded by (seed, content of the adapter, name of the layer, part).

    Args:
        chance: a scorer that gives p in (0, 1].
        seed: any integer.
    """

    chance: Scorer
    seed: int = 0
    reads_gradients: ClassVar[bool] = False

    def __call__(self, values: Tensor, stats: Stats) -> Tensor:
        chance = self.chance(values, stats)
        drawn = torch.rand(values.shape, generator=stats.generator(self.seed), dtype=torch.float64)
        return torch.where(drawn.to(chance.device) < chance, chance, 0.0).to(values.dtype)


def _check_window(density: float, window: float) -> None:
    check_density(density)
    if window < 0:
        raise MethodError(f"window is the range of chances, at least 0; got {window!r}")
    if density < 1 and not (density - window / 2 > 0 and density + window / 2 <= 1 + 1e-9):
        widest = 2 * min(density, 1 - density)
        raise MethodError(
            f"density {density:g} with window {window:g} asks for chances from "
            f"{density - window / 2:g} to "
            f"{density + window / 2:g}; they must lie in (0, 1]: write a window below {widest:g}"
        )


def _chance(place: Tensor, density: float, window: float) -> Tensor:
    """p for places in [0, 1]."""
    if density == 1:
        return torch.ones_like(place)
    return (density - window / 2 + window * place).clamp(max=1.0)
