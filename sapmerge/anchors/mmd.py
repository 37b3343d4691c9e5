"""How different two samples are: the maximum mean discrepancy, with a permutation test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.anchors.transport import squared_distances
from sapmerge.errors import AnchorError

__all__ = ["MMD", "mmd"]


@dataclass(frozen=True)
class MMD:
    """A squared discrepancy.

    Args:
        value: its estimate; the unbiased one may be below 0.
        per_width: of every width of the kernel, whose sum it is.
        p: the share of random splits of all points that differ as much; None if none were made.
    """

    value: float
    per_width: tuple[float, ...]
    p: float | None


def mmd(
    x: Tensor,
    y: Tensor,
    widths: Sequence[float] = (0.05, 0.2, 0.9),
    weights: Tensor | None = None,
    unbiased: bool = True,
    permutations: int = 200,
    seed: int = 0,
) -> MMD:
    """The squared maximum mean discrepancy of two samples, under a sum of inverse multiquadrics.

        MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y),    k = sum_a a^2 / (a^2 + d^2)

    A number to report and not to select by: at widths below the distances between points the kernel
    sees only which points are equal, and a better chosen set of anchors does not score better
    (`docs/anchors.md`). Widths are in the unit of the points; for unit vectors, at most 2 apart,
    the default ones are fine.

    Args:
        x: (n, d) points.
        y: (m, d) points; n and m may differ.
        widths: of the kernel.
        weights: (n,) of the points of x; equal by default. Those of y are equal.
        unbiased: leave pairs of a point with itself out of the means.
        permutations: random splits of all points into n and m, for p; 0 for none. With weights the
            n drawn points take them over in their order.
        seed: of the splits.

    Raises:
        AnchorError: points of different dimensions, fewer than two on a side where `unbiased`,
            widths or weights that are not positive.

    Example:
        >>> import torch
        >>> found = mmd(torch.eye(4), torch.eye(4), widths=(1.0,), unbiased=False)
        >>> round(found.value, 6), found.p
        (0.0, 1.0)

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012. The kernel is that of invertible
    networks' code (Ardizzone et al., https://arxiv.org/abs/1808.04730), which takes samples of
    equal size and the biased form.
    """
    _check(x, y, widths, weights, unbiased, permutations)
    points = torch.cat([x, y]).double()
    squares = squared_distances(points, points)
    mass = torch.full((len(x),), 1.0, dtype=torch.float64) if weights is None else weights.double()
    others = points.new_full((len(y),), -1 / len(y))
    signs = torch.cat([(mass / mass.sum()).to(points.device), others])
    kernels = [width**2 / (width**2 + squares) for width in widths]
    found = tuple(_split(kernel, signs, len(x), unbiased) for kernel in kernels)
    value, p = sum(found), None
    if permutations:
        kernel, at_least = torch.stack(kernels).sum(0), 1
        generator = torch.Generator().manual_seed(seed)
        for _ in range(permutations):
            order = torch.randperm(len(points), generator=generator).to(points.device)
            drawn = _split(kernel[order][:, order], signs, len(x), unbiased)
            at_least += drawn >= value - 1e-12
        p = at_least / (permutations + 1)
    return MMD(value, found, p)


def _split(kernel: Tensor, signs: Tensor, first: int, unbiased: bool) -> float:
    """s^T K s; unbiased: with the blocks' diagonals left out and their weights of sum 1 again."""
    if not unbiased:
        return float(signs @ kernel @ signs)
    total = 0.0
    for block in (slice(0, first), slice(first, None)):
        mass, inside = signs[block], kernel[block, block]
        pairs = mass.sum() ** 2 - mass.square().sum()
        total += float((mass @ inside @ mass - mass.square() @ inside.diagonal()) / pairs)
    return total + 2 * float(signs[:first] @ kernel[:first, first:] @ signs[first:])


def _check(
    x: Tensor,
    y: Tensor,
    widths: Sequence[float],
    weights: Tensor | None,
    unbiased: bool,
    permutations: int,
) -> None:
    least = 2 if unbiased else 1
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise AnchorError(
            f"mmd takes points (n, d) and (m, d), at least {least} of each; got {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise AnchorError("mmd: a point is NaN or infinite")
    if not widths or min(widths) <= 0:
        raise AnchorError(f"widths are distances above 0; got {widths!r}")
    if permutations < 0:
        raise AnchorError(f"permutations is a number of splits, at least 0; got {permutations!r}")
    if weights is not None and (weights.shape != x.shape[:1] or not bool((weights >= 0).all())):
        raise AnchorError(f"weights are {len(x)} numbers, at least 0; got {tuple(weights.shape)}")
    if weights is not None and int((weights > 0).sum()) < least:
        raise AnchorError(f"at least {least} of the weights must be above 0")
