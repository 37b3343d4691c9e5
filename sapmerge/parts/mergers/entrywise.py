"""Robust mergers that look at every entry of the updates by itself. Their results are dense."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.part import part
from sapmerge.core.updates import Dense, Update
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.robust import members

__all__ = ["CoordinateMedian", "TrimmedMean"]

_ENTRIES = 1 << 20  # of all members together, that are looked at at a time


@part
class CoordinateMedian:
    """The median of every entry; between two middle ones, their mean.
    With weights, the weighted median.

    Source: Yin et al., "Byzantine-robust distributed learning", https://arxiv.org/abs/1803.01498
    """

    def __call__(self, layer: Layer) -> Update:
        return Dense(torch.cat([_median(*block) for block in _blocks(layer)]))


@part
class TrimmedMean:
    """The mean of every entry without its extremes:
    at each end, adapters are dropped up to a share of the weight.

    With equal weights floor(trim K) adapters at each end:
    none for K < 1 / trim (the report says what was trimmed).

    Args:
        trim: the share dropped at each end, in [0, 0.5).

    Source: Yin et al., "Byzantine-robust distributed learning", https://arxiv.org/abs/1803.01498
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            hint = f"; for {self.trim:g} % write {self.trim / 100:g}" if 1 <= self.trim < 50 else ""
            raise MethodError(
                f"trim is the share dropped at each end, in [0, 0.5); got {self.trim!r}{hint}"
            )

    def __call__(self, layer: Layer) -> Update:
        means, kept_of_all = list[Tensor](), 0.0
        for stack, shares in _blocks(layer):
            kept = ~(_lowest(stack, shares, self.trim) | _lowest(-stack, shares, self.trim))
            kept_of_all += float(kept.double().mean()) * stack.shape[1] / layer.shape[0]
            mass = (shares[:, None, None] * kept).to(stack.dtype)
            means.append((mass * stack).sum(0) / mass.sum(0))
        layer.record("trimmed", 1.0 - kept_of_all)
        return Dense(torch.cat(means))


def _blocks(layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of the members' updates as (K, rows, n), and the members' shares of the weight:
    of factors no matrix is made.
    """
    index, signs, weights = members(layer)
    updates = [layer.updates[k] for k in index]
    shares = (weights / weights.sum()).to(updates[0].device)
    (m, n), count = layer.shape, len(updates)
    rows = max(1, _ENTRIES // (count * n))
    for start in range(0, m, rows):
        some = torch.arange(start, min(start + rows, m), device=updates[0].device)
        yield torch.stack([u.rows(some) * float(s) for u, s in zip(updates, signs)]), shares


def _median(stack: Tensor, shares: Tensor) -> Tensor:
    values, order = stack.sort(dim=0)
    share = shares[order].cumsum(0)
    low = (share < 0.5 - 1e-9).sum(0, keepdim=True)
    high = (share <= 0.5 + 1e-9).sum(0, keepdim=True).clamp(max=len(stack) - 1)
    return ((values.gather(0, low) + values.gather(0, high)) / 2)[0]


def _lowest(stack: Tensor, shares: Tensor, trim: float) -> Tensor:
    """Which adapters are dropped at the low end of each entry;
    of equal values the lighter ones first.
    """
    lighter = torch.argsort(shares, stable=True)
    order = lighter[torch.argsort(stack[lighter], dim=0, stable=True)]
    dropped = shares[order].cumsum(0) <= trim + 1e-9
    return torch.zeros_like(dropped).scatter_(0, order, dropped)
