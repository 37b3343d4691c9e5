"""Differences between two methods, with intervals over families of domains.

A hierarchical bootstrap: families are drawn with replacement, in each of them seeds, and images of
each domain. A family counts once, however many domains it has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from bed.trial import unpack

__all__ = ["Gain", "Paired", "gain", "paired"]

DRAWS = 2000

Row = Mapping[str, object]
Place = tuple[str, int, str]
"""Family, seed, and the rest of a trial."""
Paired = Mapping[Place, np.ndarray]
"""Trial -> for every test image 1, 0 or -1: right with the one method, with both or neither,
with the other alone.
"""


@dataclass(frozen=True)
class Gain:
    """A mean difference in points.

    Args:
        mean: over families.
        low: the interval's lower end, 95 %.
        high: its upper end.
        worst: the lowest family.
        trials: how many there are.
    """

    mean: float
    low: float
    high: float
    worst: float
    trials: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def rights(rows: Iterable[Row], method: str, length: str) -> dict[Place, np.ndarray]:
    """Trial -> which images one method names rightly."""
    return {
        (
            str(r["family"]),
            int(str(r["seed"])),
            f"{r['target']} {r['regime']} {r['init']} {r['setting']}",
        ): np.array(unpack(str(r["right"]), int(str(r["images"]))), dtype=np.int8)
        for r in rows
        if r["method"] == method and r["length"] == length
    }


def paired(one: Mapping[Place, np.ndarray], other: Mapping[Place, np.ndarray]) -> Paired:
    """Over the trials that both have."""
    return {place: one[place] - other[place] for place in one.keys() & other.keys()}


def gain(differences: Paired, draws: int = DRAWS, seed: int = 0) -> Gain:
    """The mean over families of the mean over their seeds of the mean over their trials,
    and its interval.
    """
    tree: dict[str, dict[int, dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for family, number, rest in sorted(differences):
        tree[family][number][rest] = 100 * differences[family, number, rest]
    families = [_Family(seeds) for seeds in tree.values()]
    generator = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for k in range(draws):
        some = generator.integers(len(families), size=len(families))
        drawn[k] = np.mean([families[i].draw(generator) for i in some])
    means = [family.mean for family in families]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Gain(
        float(np.mean(means)), float(low), float(high), float(np.min(means)), len(differences)
    )


class _Family:
    """The differences of one family. All seeds of a domain are tested with the same images, so
    these are drawn once for all of them; the mean of some hundred images is as good as normal."""

    def __init__(self, seeds: Mapping[int, Mapping[str, np.ndarray]]) -> None:
        self.mean = float(
            np.mean([np.mean([x.mean() for x in trials.values()]) for trials in seeds.values()])
        )
        self.number = len(seeds)
        self.targets: dict[str, list[tuple[int, float, np.ndarray]]] = defaultdict(list)
        for place, trials in enumerate(seeds.values()):
            for rest, values in trials.items():
                self.targets[rest.split(" ")[0]].append((place, 1 / len(trials), values))

    def draw(self, generator: np.random.Generator) -> float:
        counts = np.bincount(
            generator.integers(self.number, size=self.number), minlength=self.number
        )
        total = 0.0
        for trials in self.targets.values():
            per_image = sum(counts[place] * share * values for place, share, values in trials)
            total += (
                per_image.mean()
                + per_image.std() / len(per_image) ** 0.5 * generator.standard_normal()
            )
        return total / self.number


def of_family(differences: Paired) -> dict[str, float]:
    """Family -> its mean difference in points."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (family, seed, _), values in differences.items():
        found[family][seed].append(100 * float(values.mean()))
    return {
        family: float(np.mean([np.mean(v) for v in seeds.values()]))
        for family, seeds in sorted(found.items())
    }
