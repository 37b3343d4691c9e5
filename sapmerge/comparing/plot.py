"""The leaderboard as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sapmerge.errors import MethodError
from sapmerge.evaluation import Interval

__all__ = ["Point", "draw"]

_OWN, _MATCHED, _BASE = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's: safe for all eyes


@dataclass(frozen=True)
class Point:
    """One merge.

    Args:
        label: beside it.
        value: its score.
        interval: of the score.
        own: whether it has the method's own length.
    """

    label: str
    value: float
    interval: Interval | None
    own: bool


def draw(
    path: str | os.PathLike[str], points: Sequence[Point], metric: str, base: float | None
) -> None:
    """One row per merge, the best on top; the base model is a line.

    Raises:
        MethodError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MethodError(
            'a picture needs matplotlib: pip install "sapmerge[plot]" (or pip install matplotlib)'
        ) from None
    figure: Any = Figure(figsize=(7, 1.2 + 0.28 * len(points)), layout="constrained")
    axes = figure.subplots()
    for row, point in enumerate(points):
        colour = _OWN if point.own else _MATCHED
        if point.interval is not None:
            axes.plot([point.interval.low, point.interval.high], [row, row], color=colour, lw=1.5)
        axes.plot(point.value, row, "o" if point.own else "D", color=colour, ms=6)
    if base is not None:
        axes.axvline(base, color=_BASE, ls="--", lw=1)
        axes.annotate("base model", (base, -0.6), color=_BASE, fontsize=8, ha="center")
    axes.set_yticks(range(len(points)), [point.label for point in points], fontsize=9)
    axes.set_ylim(len(points) - 0.4, -0.9)
    axes.set_xlabel(metric + (" and its 95 % interval" if points[0].interval else ""))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
