"""Mask builders: (scores) -> what to keep, as bool or as a float multiplier of the same shape.

A plain function is a mask builder too: `lambda scores: scores > scores.mean()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sapmerge.errors import MethodError
from sapmerge.recipe import part

__all__ = ["Threshold", "TopFraction"]


def check_density(density: float) -> None:
    """A density is the fraction kept, in (0, 1]."""
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        hint = ""
        if isinstance(density, (int, float)) and 1 < density <= 100:  # pyright: ignore[reportUnnecessaryIsInstance]
            hint = f"; for {density:g} % write {density / 100:g}"
        raise MethodError(f"density is the fraction kept, in (0, 1]; got {density!r}{hint}")


def count_kept(density: float, total: int) -> int:
    """The count rule: floor(density * total + 1e-9), at least 1 of a non-empty tensor."""
    return min(total, max(1, math.floor(density * total + 1e-9)))


@part
class TopFraction:
    """Keep the `density` share of highest scores.

    Args:
        density: the fraction kept, in (0, 1].
        scope: "layer": that share of every tensor; equal scores at the cut are kept in index order, so the count is
            floor(density * n + 1e-9), at least 1. "adapter": one threshold for all layers of an adapter (as in the TIES
            paper); equal scores at the cut are all kept.

    Example:
        >>> import torch, sapmerge as sm
        >>> sm.TopFraction(0.5)(torch.tensor([3.0, 1.0, 2.0, 0.0]))
        tensor([ True, False,  True, False])
    """

    density: float
    scope: str = "layer"

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.scope not in ("layer", "adapter"):
            raise MethodError(f"TopFraction's scope is 'layer' or 'adapter'; got {self.scope!r}")

    def __call__(self, scores: Tensor) -> Tensor:
        total = scores.numel()
        if total == 0 or self.density == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        flat = scores.flatten()
        kept = count_kept(self.density, total)
        cut = torch.kthvalue(flat, total - kept + 1).values
        if self.scope == "adapter":
            return scores >= cut
        above = flat > cut
        tied = (flat == cut).nonzero().flatten()[: kept - int(above.sum())]
        above[tied] = True
        return above.view(scores.shape)

    def fit(self, scores: Callable[[], Iterable[tuple[str, Tensor]]]) -> Mapping[str, Threshold] | None:
        """For scope "adapter": the exact threshold of each adapter, from two streamed passes over its scores.

        Args:
            scores: call it to iterate over (adapter, scores of one tensor); it is called twice.

        Returns:
            A mask builder per adapter; None for scope "layer", which needs no pass.
        """
        if self.scope == "layer" or self.density == 1:
            return None
        high: dict[str, Tensor] = {}
        for adapter, values in scores():
            counts = torch.bincount(_ordered_bits(values) >> 16, minlength=1 << 16)
            high[adapter] = high[adapter] + counts if adapter in high else counts
        wanted = {
            adapter: _bin_of(counts, count_kept(self.density, int(counts.sum()))) for adapter, counts in high.items()
        }
        low = {adapter: torch.zeros(1 << 16, dtype=torch.int64) for adapter in wanted}
        for adapter, values in scores():
            bits = _ordered_bits(values)
            inside = bits[(bits >> 16) == wanted[adapter][0]] & 0xFFFF
            low[adapter] += torch.bincount(inside, minlength=1 << 16)
        return {
            adapter: Threshold(_value_of((top << 16) | _bin_of(low[adapter], rest)[0]))
            for adapter, (top, rest) in wanted.items()
        }


@part
class Threshold:
    """Keep scores >= minimum (compared in float32).

    Args:
        minimum: a score.
    """

    minimum: float

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.float() >= self.minimum


def _ordered_bits(values: Tensor) -> Tensor:
    """float32 -> integers in [0, 2^32) in the same order: the bit pattern, with negative numbers reversed."""
    bits = values.detach().flatten().float().cpu().add(0.0).contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits + (1 << 31), -1 - bits)


def _value_of(order: int) -> float:
    """The float32 whose `_ordered_bits` is `order`."""
    bits = order - (1 << 31) if order >= 1 << 31 else -1 - order
    return float(torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32))


def _bin_of(counts: Tensor, kept: int) -> tuple[int, int]:
    """The highest bin at or above which at least `kept` values lie, and how many of them must come from that bin."""
    from_top = torch.cumsum(counts.flip(0), 0)
    position = int(torch.searchsorted(from_top, torch.tensor(kept)))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, kept - above
