"""Accuracies -> tables: leave-one-out means, and 95 % intervals of the paired difference to the
mean of the updates.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tables

from dg.trial import AS_IS, MATCHED
from sapmerge.evaluation import over_seeds

__all__ = ["label", "write"]

BASELINE = ("mean", AS_IS)
FAIR = ("mean", MATCHED)

Row = Mapping[str, object]
Key = tuple[str, str]


def label(row: Row) -> str:
    """The name of a row's line: single adapters are averaged."""
    method = str(row["method"])
    return "single adapter" if method.startswith("single adapter") else method


def per_seed(rows: Iterable[Row]) -> dict[Key, dict[int, float]]:
    """(method, length) -> seed -> accuracy in per cent, averaged over the domains left out."""
    found: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[label(row), str(row["length"])][int(str(row["seed"]))].append(
            100 * float(str(row["accuracy"]))
        )
    return {
        key: {seed: statistics.fmean(all_) for seed, all_ in seeds.items()}
        for key, seeds in found.items()
    }


def difference(found: Mapping[Key, Mapping[int, float]], key: Key, to: Key) -> str:
    """The paired difference of two lines over the seeds that both have."""
    if key == to or to not in found:
        return "-"
    seeds = sorted(found[key].keys() & found[to].keys())
    gap = over_seeds([found[key][seed] - found[to][seed] for seed in seeds])
    return f"{gap.value:+.1f}" + (f" ± {gap.width / 2:.1f}" if len(seeds) > 1 else "")


def overview(groups: Mapping[str, Mapping[Key, Mapping[int, float]]]) -> str:
    """One line per method, one column per table: the differences to the energy-matched mean,
    and their mean.
    """
    keys = [
        key for key in next(iter(groups.values())) if all(key in found for found in groups.values())
    ]
    lines = []
    for key in keys:
        gaps = [
            [found[key][seed] - found[FAIR][seed] for seed in found[key]]
            for found in groups.values()
        ]
        centre = statistics.fmean(statistics.fmean(gap) for gap in gaps)
        lines.append(
            (*key, *(difference(found, key, FAIR) for found in groups.values()), f"{centre:+.1f}")
        )
    return tables.table(
        ("method", "length", *groups, "mean of all"),
        sorted(lines, key=lambda line: -float(line[-1])),
    )


def write(name: str, rows: Sequence[Row], folder: Path = tables.RESULTS) -> None:
    """Print and keep one table per task, regime and setting;
    the numbers of every seed go to a JSON file beside it.
    """
    split: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        split[f"{row['task']} {row['regime']}, {row['setting']}"].append(row)
    groups = {title: per_seed(group) for title, group in split.items()}
    blocks = []
    for title, found in groups.items():
        seeds = sorted({seed for values in found.values() for seed in values})
        domains = sorted({str(row["target"]) for row in split[title]})
        header = ("method", "length", "accuracy", "Δ mean", "Δ mean, energy matched", "seeds")
        lines = [
            (
                *key,
                f"{statistics.fmean(found[key].values()):.1f}",
                difference(found, key, BASELINE),
                difference(found, key, FAIR),
                len(found[key]),
            )
            for key in found
        ]
        blocks += [
            f"## {title}\n\nLeft out in turn: {', '.join(domains)}. Seeds {seeds}.",
            tables.table(header, lines),
        ]
    if len(groups) > 1 and all(FAIR in found for found in groups.values()):
        blocks[:0] = ["## Differences to the energy-matched mean", overview(groups)]
    kept = {
        title: {" / ".join(key): values for key, values in found.items()}
        for title, found in groups.items()
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    reading = (
        "Accuracy in per cent. Δ: paired difference over seeds, in points, with its 95 % interval "
        "(Student). Energy matched: the merged update scaled to the mean norm of the adapters."
    )
    title = "Accuracy on a domain nobody trained on"
    tables.write(
        name, title, tables.provenance("peft", "transformers"), reading, *blocks, folder=folder
    )
