"""Rescalers: (pruned, original) -> update. They give back what pruning took.

A plain function is a rescaler too: `lambda pruned, original: pruned.scaled(2.0)`.
"""

from __future__ import annotations

from sapmerge.core.linalg import norm
from sapmerge.core.part import part
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError
from sapmerge.parts.masks import check_density

__all__ = ["Divide", "Keep", "MatchNorm"]


@part
class Keep:
    """Leave the pruned update as it is."""

    def __call__(self, pruned: Update, original: Update) -> Update:
        return pruned


@part
class Divide:
    """pruned / density: unbiased when every unit is kept with probability `density` (DARE,
    arXiv 2311.03099).
    """

    density: float

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, pruned: Update, original: Update) -> Update:
        return pruned.scaled(1.0 / self.density)


@part
class MatchNorm:
    """pruned * ||original||_p / ||pruned||_p, on the product B @ A.

    For p = 2 the norms come from Gram matrices of the factors; p = 1 forms the matrices. (Matching
    the norm of each factor instead would leave the product's norm off.) A pruned update of
    zero stays zero.

    Args:
        p: 2 (Frobenius norm) or 1 (sum of magnitudes).
    """

    p: int = 2

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise MethodError(f"MatchNorm takes p=1 or p=2; got {self.p!r}")

    def __call__(self, pruned: Update, original: Update) -> Update:
        have, want = (_norm(update, self.p) for update in (pruned, original))
        return pruned.scaled(want / have) if have > 0 else pruned


def _norm(update: Update, p: int) -> float:
    if p == 2:
        return update.norm()
    return norm(update.dense(), p=1)
