"""Rows of trials -> tables: differences to the energy-matched mean,
with intervals over families.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tables
from dg.trial import MATCHED

from bed.bootstrap import gain, of_family, paired, rights

__all__ = ["write"]

FAIR = ("mean", MATCHED)
READING = (
    "Differences to the mean of all clients with its energy matched, in points of accuracy on the "
    "domain left out: the mean over families, and its 95 % interval (hierarchical bootstrap: "
    "families, seeds, images). Worst: the family with the lowest difference. Energy matched, or a "
    "number: the merged update scaled to that multiple of the mean norm of its inputs. Only "
    "trials that have the row are counted."
)

Row = Mapping[str, object]


def write(name: str, rows: Sequence[Row], folder: Path = tables.RESULTS) -> None:
    """One table per setting; the numbers behind them go to a JSON file beside it."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[str(row["setting"])].append(row)
    if len(groups) > 1:
        odd = [row for setting, some in groups.items() if setting != "equal" for row in some]
        if len(groups) - ("equal" in groups) > 1:
            groups["all unequal"] = odd
    blocks, kept = list[str](), dict[str, object]()
    for setting, some in groups.items():
        lines, numbers = _lines(some)
        families = sorted({str(row["family"]) for row in some})
        trials = {
            json.dumps([row[k] for k in ("family", "target", "seed", "regime", "init", "setting")])
            for row in some
        }
        header = ("method", "length", "difference", "worst", *families)
        blocks.append(f"## {setting}\n\n{len(trials)} trials. {_cells(some)}")
        blocks.append(tables.table(header, lines))
        kept[setting] = numbers
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    title = "Accuracy on a domain nobody trained on, over families of domains"
    tables.write(
        name, title, tables.provenance("peft", "transformers"), READING, *blocks, folder=folder
    )


def _cells(rows: Sequence[Row]) -> str:
    """How many trials there are in each pair of regime and initialisation."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[f"{row['regime']}, {row['init']}"].add(
            str([row[k] for k in ("family", "target", "seed", "setting")])
        )
    return "; ".join(f"{cell}: {len(some)}" for cell, some in sorted(found.items())) + "."


def _lines(rows: Sequence[Row]) -> tuple[list[tuple[object, ...]], dict[str, object]]:
    """The lines of one table, the best method first; and the same as numbers."""
    keys = dict.fromkeys((str(row["method"]), str(row["length"])) for row in rows if "right" in row)
    fair, families = rights(rows, *FAIR), sorted({str(row["family"]) for row in rows})
    lines, numbers = list[tuple[float, tuple[object, ...]]](), dict[str, object]()
    level = {family: 100 * share for family, share in _levels(fair).items()}
    for key in keys:
        differences = paired(rights(rows, *key), fair)
        if not differences:
            continue
        found, each = gain(differences), of_family(differences)
        numbers[" / ".join(key)] = {**vars(found), "families": each}
        cells = [f"{each[f]:+.1f}" if f in each else "-" for f in families]
        lines.append(
            (found.mean, (*key, "-" if key == FAIR else str(found), f"{found.worst:+.1f}", *cells))
        )
    lines.sort(key=lambda line: -line[0])
    base = (
        "mean, accuracy",
        MATCHED,
        "-",
        "-",
        *(f"{level[f]:.1f}" if f in level else "-" for f in families),
    )
    return [line for _, line in lines] + [base], numbers


def _levels(found: Mapping[tuple[str, int, str], np.ndarray]) -> dict[str, float]:
    """Family -> the share of images that are right."""
    each: dict[str, list[float]] = defaultdict(list)
    for (family, _, _), right in found.items():
        each[family].append(float(right.mean()))
    return {family: sum(values) / len(values) for family, values in each.items()}
