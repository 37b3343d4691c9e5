"""The tasks, who does them, and the table that sets them side by side."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tables import table

from speed.accuracy import References, largest
from speed.adapters import extract, write_adapters
from speed.child import Updates, read_updates
from speed.jobs import Job, Outcome, measure
from speed.shapes import Shapes, sample

__all__ = ["HEADER", "PEERS", "Comparison", "Inputs", "Peer", "compare", "has_mergekit"]


@dataclass(frozen=True)
class Peer:
    """Another program for a task: what the table calls it, its module, its name for the method."""

    label: str
    module: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Task:
    """A method, and the rank at which its result is stored (0: that of the inputs; None: exact)."""

    title: str
    method: str
    rank: int | None
    reference: str
    peers: tuple[Peer, ...]


def _peft(
    kind: str, *, density: float | None = None, mean: bool = False, full: bool = True
) -> Peer:
    options = {"density": density, "mean": mean, "full_matrices": full}
    return Peer(
        f"PEFT {kind}" + ("" if full else ", svd_full_matrices=False"), "peft_peer", kind, options
    )


def _dense(method: str) -> Peer:
    return Peer("dense torch", "dense", method)


def _mergekit(method: str, density: float) -> Peer:
    return Peer(f"mergekit {method}, stored dense", "mergekit_peer", method, {"density": density})


PEERS = (
    Task(
        "mean",
        "mean()",
        0,
        "mean",
        (_peft("svd", mean=True), _peft("svd", mean=True, full=False), _dense("mean")),
    ),
    Task("mean, exact", "mean()", None, "mean", (_peft("cat", mean=True),)),
    Task(
        "ties",
        "ties(0.2)",
        0,
        "ties",
        (
            _peft("ties_svd", density=0.2),
            _peft("ties_svd", density=0.2, full=False),
            _dense("ties"),
            _mergekit("ties", 0.2),
        ),
    ),
    Task(
        "dare_ties",
        "dare_ties(0.5)",
        0,
        "",
        (
            _peft("dare_ties_svd", density=0.5),
            _peft("dare_ties_svd", density=0.5, full=False),
            _mergekit("dare_ties", 0.5),
        ),
    ),
    Task("tsv", "tsv()", None, "tsv", (_dense("tsv"),)),
    Task("iso_c", "iso_c()", None, "iso_c", (_dense("iso_c"),)),
    Task("knots", "In(SharedBasis(), ties(0.2))", None, "knots", (_dense("knots"),)),
)


@dataclass(frozen=True)
class Inputs:
    """Adapters of one model on disk, and adapters of its sampled layers alone."""

    folder: Path
    adapters: tuple[str, ...]
    samples: Mapping[str, Mapping[str, Any]]
    rank: int

    @staticmethod
    def write(
        folder: Path, shapes: Shapes, rank: int, count: int, dtype: torch.dtype, whole: bool
    ) -> Inputs:
        """Make them. `whole`: peers merge every layer, not one of each shape."""
        paths = write_adapters(folder / "adapters", shapes, rank, count, dtype)
        chosen = dict.fromkeys(shapes, 1) if whole else sample(shapes)
        samples = {
            name: {
                "times": times,
                "adapters": [
                    str(extract(p, name, folder / "only" / name / str(k)))
                    for k, p in enumerate(paths)
                ],
            }
            for name, times in chosen.items()
        }
        return Inputs(folder, tuple(map(str, paths)), samples, rank)


@dataclass(frozen=True)
class Row:
    """One line of the table: what one program needed for a task."""

    task: str
    who: str
    outcome: Outcome
    ratio: float
    merge_ratio: float
    errors: tuple[float, float] | None

    def cells(self) -> list[object]:
        if self.outcome.failed:
            return [
                self.task,
                self.who,
                "failed",
                "-",
                "-",
                "-",
                "-",
                self.outcome.failed.replace("|", "/"),
            ]
        error, excess = ("-", "-") if self.errors is None else (f"{e:.1e}" for e in self.errors)
        times = [f"{self.outcome.seconds:.2f}", f"{self.ratio:.3g} x", f"{self.merge_ratio:.3g} x"]
        return [self.task, self.who, *times, f"{self.outcome.peak:.0f}", error, excess]


HEADER = [
    "task",
    "who",
    "seconds",
    "time / ours",
    "merge alone / ours",
    "peak MB",
    "error",
    "excess loss",
]


@dataclass(frozen=True)
class Comparison:
    """All rows of one model and one number of adapters."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return table(HEADER, [row.cells() for row in self.rows])

    def ratio(self, task: str, who: str) -> float:
        """How many times as long a peer takes; 0 if it was not measured."""
        return next((row.ratio for row in self.rows if (row.task, row.who) == (task, who)), 0.0)

    def errors(self, task: str, who: str) -> tuple[float, float] | None:
        return next((row.errors for row in self.rows if (row.task, row.who) == (task, who)), None)


def has_mergekit() -> bool:
    """Whether it is installed beside us; its rows are left out otherwise."""
    return importlib.util.find_spec("mergekit") is not None


def compare(
    inputs: Inputs, tasks: Sequence[Task], repeats: int, device: str | None = None
) -> Comparison:
    """Measure sapmerge and its peers on every task, taking turns,
    and the error of what each of them stored.
    """
    updates: Updates = {}
    for sampled in inputs.samples.values():
        updates |= read_updates(list(sampled["adapters"]))
    references = References(largest(updates))
    return Comparison(
        tuple(row for task in tasks for row in _rows(task, inputs, references, repeats, device))
    )


def _rows(
    task: Task, inputs: Inputs, references: References, repeats: int, device: str | None
) -> Iterator[Row]:
    rank = inputs.rank if task.rank == 0 else task.rank
    out = inputs.folder / "out" / task.title
    peers = [peer for peer in task.peers if has_mergekit() or peer.module != "mergekit_peer"]
    common = {"adapters": inputs.adapters, "rank": rank}
    jobs = [Job("ours", task.method, out=str(out / "ours"), options={"device": device}, **common)]
    for place, peer in enumerate(peers):
        samples = {} if peer.method == "cat" else inputs.samples
        where = str(out / f"{peer.module}{place}")
        jobs.append(
            Job(
                peer.module, peer.method, out=where, samples=samples, options=peer.options, **common
            )
        )
    outcomes = measure(jobs, repeats)
    ours = outcomes[0]
    for job, who, outcome in zip(
        jobs, ["sapmerge", *(peer.label for peer in peers)], outcomes, strict=True
    ):
        errors = None
        if task.reference and not outcome.failed:
            dense = job.peer == "mergekit_peer"
            errors = references.errors(task.reference, None if dense else rank, Path(job.out))
        merge, own = (
            found.parts.get("merge", found.parts.get("merge and save", 0.0))
            for found in (outcome, ours)
        )
        yield Row(
            task.title,
            who,
            outcome,
            outcome.seconds / (ours.seconds or 1),
            merge / (own or 1),
            errors,
        )
