"""Pictures of `results/*.json`: every method against the energy-matched mean, with 95 % intervals.

python -m dg.pictures results/domain_generalization.json ../docs/figures/evidence.png
# in benchmarks/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from dg.summary import AS_IS, MATCHED
from sapmerge.evaluation import over_seeds

__all__ = ["draw"]

FAIR = f"mean / {MATCHED}"
OURS, OTHER = "#c0392b", "#34495e"
REFERENCES = (
    "zero-shot",
    "single adapter",
    "adapter of the domain itself",
    "all sources trained together",
)


def draw(source: Path, target: Path) -> None:
    """One panel per setting, task and regime; two in a row, to be read at the width of a page."""
    tables = json.loads(source.read_text(encoding="utf-8"))
    height = 1 + 0.24 * max(len(_best(table)) for table in tables.values())
    rows, columns = -(-len(tables) // 2), min(2, len(tables))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.4 * columns, height * rows), squeeze=False
    )
    for axis in axes.flat[len(tables) :]:
        axis.axis("off")
    for axis, (title, table) in zip(axes.flat, tables.items()):
        lines = sorted(_best(table).items(), key=lambda line: line[1][0])
        for place, (name, (centre, width)) in enumerate(lines):
            colour = OURS if name.startswith("sap") else OTHER
            axis.errorbar(centre, place, xerr=width, fmt="o", ms=4.5, lw=1.6, color=colour)
        axis.set_yticks(range(len(lines)), [_short(name) for name, _ in lines], fontsize=10)
        axis.axvline(0, color="grey", lw=1)
        axis.set_title(title, fontsize=11.5)
        axis.set_xlabel("points over the matched mean", fontsize=10)
        axis.tick_params(axis="x", labelsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def _short(name: str) -> str:
    return name.replace("mean weighed by", "mean by").replace("_", " ")


def _best(table: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Method -> its difference to the energy-matched mean,
    at the better of its own length and the matched one.
    """
    fair, found = table[FAIR], dict[str, tuple[float, float]]()
    for key, values in table.items():
        name, _, length = key.rpartition(" / ")
        if name in REFERENCES or length not in (AS_IS, MATCHED):
            continue
        gap = over_seeds([values[seed] - fair[seed] for seed in values if seed in fair])
        line = (gap.value, gap.width / 2)
        if name not in found or line[0] > found[name][0]:
            found[name] = line
    return found


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
