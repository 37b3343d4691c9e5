"""Averages and sums of whole updates."""

from __future__ import annotations

from sapmerge.compose import Chain
from sapmerge.layer import Method
from sapmerge.mergers import Mean, Sum

__all__ = ["mean", "task_arithmetic"]


def mean() -> Method:
    """The weighted mean of the updates: sum w D / sum w. Exact, of rank at most the sum of the ranks."""
    return Chain(Mean())


def task_arithmetic() -> Method:
    """The weighted sum of the updates: sum w D; negative weights forget.

    The paper's coefficient lambda (0.3 for eight tasks) is `scale=` of `merge`.

    Source: Ilharco et al., "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089
    """
    return Chain(Sum())
