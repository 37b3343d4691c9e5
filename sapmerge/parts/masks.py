"""Mask builders: (scores) -> what to keep, as bool or as a float multiplier of the same shape.

A plain function is a mask builder too: `lambda scores: scores > scores.mean()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.part import part
from sapmerge.core.selection import at_least_kth, count_true, streamed_kth
from sapmerge.errors import MethodError

__all__ = [
    "DropOutliers",
    "NtoM",
    "PerRow",
    "Reciprocal",
    "Threshold",
    "TopFraction",
    "TopWithTies",
]


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
        scope: "layer": that share of every tensor; equal scores at the cut are kept in index order,
            so the count is floor(density * n + 1e-9), at least 1. "adapter": one threshold for all
            layers of an adapter (as in the TIES paper); equal scores at the cut are all kept.

    Example:
        >>> import torch, sapmerge as sm
        >>> sm.TopFraction(0.5)(torch.tensor([3.0, 1.0, 2.0, 0.0]))
        tensor([ True, False,  True, False])
    """

    density: float
    scope: Literal["layer", "adapter"] = "layer"

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, scores: Tensor) -> Tensor:
        total = scores.numel()
        if total == 0 or self.density == 1:
            return torch.ones_like(scores, dtype=torch.bool)
        flat = scores.flatten()
        kept = count_kept(self.density, total)
        cut, keep = at_least_kth(flat, total - kept)
        surplus = count_true(keep) - kept
        if self.scope == "layer" and surplus:
            keep[(flat == cut).nonzero().flatten()[-surplus:]] = False
        return keep.view(scores.shape)

    @property
    def needs_fit(self) -> bool:
        """Whether a merge has to show it the scores of the whole adapter first."""
        return self.scope == "adapter" and self.density < 1

    def fit(
        self, scores: Callable[[], Iterable[tuple[str, Tensor]]]
    ) -> Mapping[str, Threshold] | None:
        """For scope "adapter": the exact threshold of each adapter,
        from two streamed passes over its scores.

        Args:
            scores: call it to iterate over (adapter, scores of one tensor); it is called twice.

        Returns:
            A mask builder per adapter; None for scope "layer", which needs no pass.
        """
        if not self.needs_fit:
            return None
        cuts = streamed_kth(scores, partial(count_kept, self.density))
        return {adapter: Threshold(cut.value) for adapter, cut in cuts.items()}


@part
class Threshold:
    """Keep scores >= minimum (compared in float32).

    Args:
        minimum: a score.
    """

    minimum: float

    def __call__(self, scores: Tensor) -> Tensor:
        return scores.float() >= self.minimum


@part
class PerRow:
    """Keep the `density` share of highest scores of every row:
    floor(density * n + 1e-9) of n, at least 1.

    Equal scores at the cut are kept in index order.

    Args:
        density: the fraction kept of each row, in (0, 1].

    Source: Sun et al. (Wanda), https://arxiv.org/abs/2306.11695
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.numel() == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        return descending_ranks(scores) < count_kept(self.density, scores.shape[-1])


@part
class NtoM:
    """Keep the n highest of every m consecutive scores of a row (2:4 runs fast on
    sparse tensor cores).

    The last group of a row is shorter where m does not divide it;
    min(n, its length) of it are kept.

    Args:
        n: how many are kept, 1 <= n <= m.
        m: the length of a group.

    Source: Mishra et al., "Accelerating sparse deep neural networks",
    https://arxiv.org/abs/2104.08378
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise MethodError(
                f"NtoM keeps n of every m, 1 <= n <= m, e.g. NtoM(2, 4); got n={self.n}, m={self.m}"
            )

    def __call__(self, scores: Tensor) -> Tensor:
        starts = range(0, scores.shape[-1], self.m)
        groups = [
            descending_ranks(scores[..., start : start + self.m]) < self.n for start in starts
        ]
        return torch.cat(groups, dim=-1) if groups else torch.ones_like(scores, dtype=torch.bool)


@part
class DropOutliers:
    """Model Breadcrumbs: drop the `gamma` share of highest scores,
    then keep the `density` share of the rest.

    Of n scores floor(gamma n + 1e-9) are dropped (none of a short row) and the next floor(density n
    + 1e-9), at least 1, are kept; both shares are of n. With first="keep" the `density` share is
    kept first and the outliers are dropped from it, so fewer are left.
    Equal scores are taken in index order.

    Args:
        density: the fraction kept; the paper's beta is 1 - gamma - density.
        gamma: the fraction dropped at the top, in [0, 1).
        scope: "layer" ranks a whole tensor (the paper; mergekit), "row" every row (the authors'
            code).
        first: "drop" (the default of the authors' code) or "keep".

    Source: Davari & Belilovsky, "Model breadcrumbs", https://arxiv.org/abs/2312.06795. Their code
    keeps nothing of a row with density n < 1; mergekit's empties the tensor where gamma n < 1 (a
    slice that ends at -0).
    """

    density: float
    gamma: float = 0.01
    scope: Literal["layer", "row"] = "layer"
    first: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        check_density(self.density)
        if not 0 <= self.gamma < 1:
            hint = (
                f"; for {self.gamma:g} % write {self.gamma / 100:g}"
                if 1 <= self.gamma < 100
                else ""
            )
            raise MethodError(
                f"DropOutliers' gamma is the fraction dropped, in [0, 1); got {self.gamma!r}{hint}"
            )

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.numel() == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        rows = scores if self.scope == "row" else scores.reshape(1, -1)
        ranks, total = descending_ranks(rows), rows.shape[-1]
        dropped, kept = math.floor(self.gamma * total + 1e-9), count_kept(self.density, total)
        if self.first == "drop":
            keep = (ranks >= dropped) & (ranks < dropped + kept)
        else:
            keep = (ranks >= min(dropped, kept - 1)) & (ranks < kept)
        return keep.reshape(scores.shape)


@part
class Reciprocal:
    """1 / score where the score is positive, else 0: what `Flip` kept is divided by its chance.

    So the expectation of the pruned update is the update (Horvitz-Thompson);
    the rescaling of DELLA.
    """

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.where(scores > 0, 1 / torch.where(scores > 0, scores, 1.0), 0.0)


def descending_ranks(scores: Tensor) -> Tensor:
    """0 for the highest score of every row, 1 for the next; equal scores in index order."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    return torch.empty_like(order).scatter_(-1, order, places)


@part
class TopWithTies:
    """Keep the `density` share of highest scores, and every score that equals the lowest of
    them within 1e-5.

    `TopFraction` picks among equal scores by position. In coordinates that a method has made equal
    (a smoothed spectrum has equal singular values) such a pick would be decided by rounding.

    Args:
        density: the fraction kept, in (0, 1]; at least one score.
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.numel() == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        cut = torch.topk(scores.flatten(), count_kept(self.density, scores.numel())).values[-1]
        return scores >= cut - 1e-5 * cut.abs()
