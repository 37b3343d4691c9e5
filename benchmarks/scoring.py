"""What scoring costs: gradients of K adapters on 32 anchors,
beside K passes that nobody can do without.

    python benchmarks/scoring.py            # three quarters of an hour on two cores, 16 GB
    python benchmarks/scoring.py --quick    # minutes, small models; overheads weigh more

The floor is K times one forward and one backward pass that computes only the LoRA gradients: plain
PEFT, adapters loaded, the same loss and the same batches. Times are CPU seconds, the floor's
measured before and after each of ours; memory is the peak beyond model, adapters and anchors,
each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cost.measuring import (
    Work,
    extra_memory,
    floor,
    gradients,
    in_fresh_process,
    interleaved,
    merge,
)
from cost.setups import FULL, QUICK, RANK, Setup, Shape, setup
from tables import provenance, table, write

import sapmerge as sm

BUDGET = 2 << 30
"""Bytes that `Anchors` may hold of dense gradients."""


FACTORS = sm.Factors()


@dataclass(frozen=True)
class Row:
    """One way to score.

    Args:
        title: what the table calls it.
        where: which modules are adapted.
        units: of `sap`.
        statistic, at: of the gradients; None: it asks for none.
        aim: what the time should be, in floors, from K = `since` on; None: no aim was set.
        extra: a variant without an aim for time: only on models that are not slow, and for K = 4.
    """

    title: str
    where: str = "everywhere"
    units: Any = FACTORS
    statistic: str | None = "mean"
    at: str = "adapter"
    aim: float | None = None
    since: int = 1
    extra: bool = False

    @property
    def method(self) -> sm.Method:
        if self.statistic is None:
            return sm.sap()
        absolute = self.statistic == "absolute"
        scorer = sm.PerSampleTaylor() if absolute else sm.Taylor(at=self.at)
        return sm.sap(0.9, self.units, scorer)


ROWS = (
    Row("`sap()`: losses, no gradients", statistic=None),
    Row("`sap(0.9)`: Factors, at base + adapter", aim=1.1),
    Row("the tower without adapters is shared", "shared", aim=1.0, since=4),
    Row("adapters in the last half of the layers", "last half", aim=1.0, since=4),
    Row("`Taylor('base')`: one pass for all", at="base", aim=1.0, since=4),
    Row("units=Directions()", units=sm.Directions(), extra=True),
    Row("units=Entries()", units=sm.Entries(), extra=True),
    Row("PerSampleTaylor()", statistic="absolute", extra=True),
)


@dataclass(frozen=True)
class Result:
    """Ratios to the floor.

    Args:
        floor: seconds of one adapter's passes.
        time: of the gradients; None where there are none.
        whole: of the whole call of `merge`; None if not measured.
        memory: extra peak, of the gradients; and of the floor with one adapter's gradients more, or
            with the budget where they are dense.
    """

    row: Row
    count: int
    floor: float
    time: float | None
    whole: float | None
    memory: tuple[float, float] | None

    def cells(self) -> tuple[str, ...]:
        aim = self.row.aim if self.count >= self.row.since else None
        whole = "" if self.whole is None else f"{self.whole:.2f}"
        return (
            self.row.title,
            str(self.count),
            f"{self.count} x {self.floor:.1f} s",
            "" if self.time is None else f"{self.time:.2f}" + _verdict(self.time, aim),
            whole,
            "" if self.memory is None else f"{self.memory[0]:.2f}" + _verdict(*self.memory),
        )


def _verdict(found: float, aim: float | None) -> str:
    return "" if aim is None else f" (aim {aim:.2f}: {'met' if found <= aim else '**missed**'})"


def measure(shape: Shape, script: Path) -> list[Result]:
    """All rows of one model, for every number of adapters."""
    rows = [row for row in ROWS if not (shape.slow and row.extra)]
    found: list[Result] = []
    for where in dict.fromkeys(row.where for row in rows):
        least = in_fresh_process(script, _question(shape, rows[0], where, 1) | {"floor": True})
        for count in shape.adapters:
            made = setup(shape, where, count)
            for row in rows:
                if row.where != where or (row.extra and count != 4):
                    continue
                works = [] if row.statistic is None else [_work(made, row)]
                if row.statistic is None or (not (shape.slow or row.extra) and count == 4):
                    works.append(partial(merge, made, row.method))
                if not found:
                    floor(made)  # the first pass is slower than the next
                once, times = interleaved(partial(floor, made), works)
                ratios = [seconds / (count * once) for seconds in times]
                memory = None
                if count == 4:
                    peak = in_fresh_process(script, _question(shape, row, where, count))
                    more = BUDGET if isinstance(row.units, sm.Entries) else 4 * made.parameters
                    memory = peak / least, (least + more) / least
                time = None if row.statistic is None else ratios.pop(0)
                result = Result(row, count, once, time, ratios[0] if ratios else None, memory)
                print(*result.cells(), sep=" | ", file=sys.stderr, flush=True)
                found.append(result)
            del made
    return sorted(found, key=lambda result: rows.index(result.row))


def _question(shape: Shape, row: Row, where: str, count: int) -> dict[str, Any]:
    return {"model": shape.title, "row": row.title, "where": where, "count": count, "floor": False}


def _work(made: Setup, row: Row) -> Work:
    if row.statistic is None:
        return partial(merge, made, row.method)
    return partial(gradients, made, row.units, row.statistic, row.at)


def _answer(question: dict[str, Any]) -> int:
    """The extra memory of one piece of work, in this process."""
    shape = next(shape for shape in (*FULL, *QUICK) if shape.title == question["model"])
    row = next(row for row in ROWS if row.title == question["row"])
    made = setup(shape, question["where"], question["count"])
    return extra_memory(partial(floor, made) if question["floor"] else _work(made, row))


def _scaled(shape: Shape) -> str:
    said = [f"{shape.anchors} anchors in batches of {shape.size}, rank {RANK}, float32."]
    if shape.anchors < 32:
        said.append(
            f"Scaled: {shape.anchors} of 32 anchors on both sides. Passes grow linearly with "
            "them; what we do once per adapter or per model does not grow, and weighs more here."
        )
    if shape.adapters[-1] < 16:
        said.append(
            "Only K = 4: what is shared costs less with every further adapter, the rest as much."
        )
    return " ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What scoring costs, beside plain passes through a PeftModel."
    )
    parser.add_argument("--quick", action="store_true", help="small models, two minutes")
    parser.add_argument("--only", help="only models whose title contains this")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory:
        print(_answer(json.loads(options.memory)))
        return
    blocks = [provenance("peft", "transformers"), __doc__.split("\n\n")[2].strip()]
    for shape in QUICK if options.quick else FULL:
        if options.only and options.only not in shape.title:
            continue
        header = (
            "",
            "K",
            "floor",
            "gradients / floor",
            "whole `merge` / floor",
            "extra peak memory / floor's",
        )
        results = measure(shape, Path(__file__))
        blocks += [
            f"## {shape.title}",
            _scaled(shape),
            table(header, [result.cells() for result in results]),
        ]
    blocks.append(NOTES)
    write("scoring_quick" if options.quick else "scoring", "Cost of scoring", *blocks)


NOTES = """## Reading the tables

Gradients are statistics in two halves of the anchors (for `anchor_stability`), with everything
that is needed for them: checks of the loader and of the weights, singular vectors of the
adapters. The whole `merge` adds scores, masks and the energy of the result, and the losses at
base + every adapter, by which `sap` finds outliers, at the base and at the result: K + 2 forward
passes, which are all that `sap()` needs. Aims for time: 1.1 floors at base + adapter, below the
floor where something is shared (from K = 4: one adapter has nobody to share with). The aim for
memory is the floor's and one adapter's gradients; with dense gradients, the floor's and the
budget. What is kept of the unadapted prefix counts, and so do the statistics of a quarter of the
adapters, which are held together."""


if __name__ == "__main__":
    main()
