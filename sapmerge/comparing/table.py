"""The leaderboard: what is better, and what cannot be told apart."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sapmerge.comparing.metric import Score
from sapmerge.comparing.plot import Point, draw
from sapmerge.display.tables import table
from sapmerge.errors import MethodError
from sapmerge.evaluation import Interval

__all__ = ["BASE", "Comparison", "MethodResult"]

BASE = "base model"


@dataclass(frozen=True, eq=False)
class MethodResult:
    """One method of a comparison.

    Args:
        name: as it was given, or the recipe.
        length: "own" as the method makes it, "matched" for `MatchEnergy` of it; "" for the base.
        recipe: that `parse` reads back; "" for the base model.
        scores: metric -> what the model got.
        norm: of the merged update, ||D||.
        seconds: that merging and evaluating took.
        kept: whether it was found in the folder of an earlier run.
        problem: why there is no score: what the merge refused.
    """

    name: str
    length: str
    recipe: str
    scores: Mapping[str, Score] = field(default_factory=dict[str, Score])
    norm: float = 0.0
    seconds: float = 0.0
    kept: bool = False
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every method with its scores. `print` gives the leaderboard.

    Args:
        results: in the order in which they were made; the first one is the base model.
        metric: the one that the leaderboard goes by.
        maximize: whether more is better.
    """

    results: tuple[MethodResult, ...]
    metric: str
    maximize: bool = True

    @cached_property
    def rows(self) -> tuple[MethodResult, ...]:
        """The merges, the best first; what was refused is left out."""
        scored = [one for one in self.results if one.scores and one.name != BASE]
        return tuple(sorted(scored, key=self._place))

    @property
    def best(self) -> MethodResult:
        """The merge with the best score. `within_noise` says what it cannot be told apart from.

        Raises:
            MethodError: none has a score.
        """
        if not self.rows:
            reasons = "; ".join(sorted({one.problem for one in self.results if one.problem}))
            raise MethodError(f"no method of the comparison has a score: {reasons}")
        return self.rows[0]

    @property
    def within_noise(self) -> tuple[MethodResult, ...]:
        """The merges that the samples do not tell apart from the best one, itself first; only the
        best one where the metric gives no samples.
        """
        near = [one for one in self.rows[1:] if self._same(one)]
        return (self.best, *near)

    def behind(self, result: MethodResult) -> Interval | None:
        """Score of the best one minus that of `result` on the same samples, in the direction of
        better. None without samples.

        The intervals of all merges hold together: 95 % / (their number - 1), Bonferroni's. The best
        one was chosen on these very samples, so its own score is a little flattering.
        """
        level = 1 - 0.05 / max(1, len(self.rows) - 1)
        one, other = self.best.scores[self.metric], result.scores[self.metric]
        return one.ahead_of(other, level) if self.maximize else other.ahead_of(one, level)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings."""
        return {
            "metric": self.metric,
            "maximize": self.maximize,
            "results": [self._data(one) for one in self.results],
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write the leaderboard as a picture. Needs matplotlib: the extra `plot`.

        Args:
            path: of the file; its ending says the format (.png, .svg, .pdf).

        Raises:
            MethodError: matplotlib is not installed.
        """
        points = [
            Point(
                self._called(one),
                one.scores[self.metric].value,
                one.scores[self.metric].interval,
                one.length == "own",
            )
            for one in self.rows
        ]
        base = [one.scores[self.metric].value for one in self.results if one.name == BASE]
        draw(path, points, self.metric, base[0] if base else None)

    def __str__(self) -> str:
        lines = [table(["", "method", "length", *self._head()], self._cells())]
        lines += [
            f"{one.name} ({one.length}): {one.problem}" for one in self.results if one.problem
        ]
        if self.rows:
            lines += ["", self._verdict()]
        return "\n".join(lines)

    def _place(self, result: MethodResult) -> float:
        value = result.scores[self.metric].value
        return -value if self.maximize else value

    def _same(self, result: MethodResult) -> bool:
        gap = self.behind(result)
        return gap is not None and gap.low <= 0

    def _head(self) -> list[str]:
        others = [name for name in self.best.scores if name != self.metric] if self.rows else []
        return [self.metric, "95 % interval", "behind the best", "norm", *others]

    def _cells(self) -> list[list[object]]:
        base = [one for one in self.results if one.name == BASE]
        rows = [*enumerate(self.rows, 1), *((0, one) for one in base)]
        return [self._row(place, one) for place, one in rows]

    def _row(self, place: int, result: MethodResult) -> list[object]:
        score = result.scores[self.metric]
        span = score.interval
        gap = self.behind(result) if place > 1 else None
        near = "" if gap is None or gap.low > 0 else " ~"
        others = [f"{one.value:.4g}" for name, one in result.scores.items() if name != self.metric]
        return [
            place or "",
            result.name,
            result.length,
            f"{score.value:.4g}",
            "" if span is None else f"[{span.low:.3f}, {span.high:.3f}]",
            "" if gap is None else f"{gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]{near}",
            f"{result.norm:.3g}" if place else "",
            *others,
        ]

    def _verdict(self) -> str:
        if self.best.scores[self.metric].samples is None:
            return (
                f"{self._called(self.best)} has the best {self.metric}. How much of that is noise "
                "cannot be told: return one number per sample from evaluate (1 right, 0 wrong)"
            )
        if len(self.rows) == 1:
            return f"{self._called(self.best)} is the only method"
        near = [self._called(one) for one in self.within_noise[1:]]
        if not near:
            return f"{self._called(self.best)} is better than all others, beyond noise"
        return f"{self._called(self.best)} is first; within noise of it (~): {', '.join(near)}"

    def _called(self, result: MethodResult) -> str:
        return f"{result.name} ({result.length})"

    def _data(self, result: MethodResult) -> dict[str, Any]:
        scores = {
            name: {
                "value": score.value,
                "samples": None if score.samples is None else np.asarray(score.samples).tolist(),
            }
            for name, score in result.scores.items()
        }
        return {**vars(result), "scores": scores}
