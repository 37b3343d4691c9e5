"""Results for single clients: a weight matrix W, and for every row of it a merge;
all rows from one pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import cast

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.protocols import Method
from sapmerge.core.updates import Update
from sapmerge.errors import IncompatibleAdaptersError, MethodError, OutputError
from sapmerge.io.adapter import Adapter
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.files import shown
from sapmerge.io.outputs import ADAPTERS, check_apart
from sapmerge.merging import sinks
from sapmerge.merging.heads import HeadPolicy
from sapmerge.merging.inputs import Adapters, load_adapters, resolve_weights
from sapmerge.merging.merge import Merged, merge
from sapmerge.merging.report import Report
from sapmerge.merging.stream import AdapterLayers
from sapmerge.methods.averaging import mean

__all__ = ["Personal", "by_task", "personalize", "pilot"]

_TOGETHER = 200
"""Checkpoints that are open at the same time: three files each."""


class Personal(Mapping[str, Merged]):
    """Label -> merge. `save_pretrained(parent)` writes all of them,
    reading every layer of every adapter once.
    """

    def __init__(self, rows: Mapping[str, Merged]) -> None:
        self._rows = {
            label: Merged(replace(merged.run, stream=_OneByOne.of_stream(merged.run.stream)))
            for label, merged in rows.items()
        }

    @staticmethod
    def sharing(adapters: Sequence[Adapter]) -> list[Adapter]:
        """The adapters, for several merges that go through the layers side by side:
        each update is read once.
        """
        return [
            _ReadOnce(**{f.name: getattr(adapter, f.name) for f in fields(Adapter)}, last={})
            for adapter in adapters
        ]

    def __getitem__(self, label: str) -> Merged:
        return self._rows[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Personal({', '.join(self._rows)})"

    @property
    def report(self) -> dict[str, Report]:
        """Label -> what was merged."""
        return {label: merged.report for label, merged in self._rows.items()}

    def save_pretrained(self, parent: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a PEFT checkpoint per row, `parent/<label>`.
        The parent appears whole or not at all.

        Args:
            parent: the folder to write.
            overwrite: replace an earlier one, whole, if it holds nothing but adapters.

        Raises:
            OutputExistsError: the parent exists.
            OutputError: it is or holds one of the inputs, or holds more than adapters; or a label
                cannot be the name of a folder.
            NonFiniteError: a merged update is not finite, or overflows the output's dtype.
        """
        inputs = {a.folder for merged in self._rows.values() for a in merged.adapters}
        check_apart(parent, inputs)
        for label in self._rows:
            if label in ("", ".", "..") or set(label) & {"/", "\\", "\0"}:
                raise OutputError(
                    f"{shown(label)} cannot be the name of a folder in {os.fspath(parent)!r}; give "
                    "the clients or tasks other labels"
                )
        with StagedFolder(parent, overwrite=overwrite, kind=ADAPTERS) as folder:
            labels = list(self._rows)
            for start in range(0, len(labels), _TOGETHER):
                some = labels[start : start + _TOGETHER]
                sinks.save_together(
                    {os.path.join(folder.staged, label): self._rows[label].run for label in some}
                )
            folder.publish()


@dataclass(frozen=True, eq=False)
class _ReadOnce(Adapter):
    """An adapter that holds the update it has read last; copies under other labels share it."""

    last: dict[str, Update] = field(default_factory=dict[str, Update], repr=False)

    def update(self, name: str) -> Update:
        if name not in self.last:
            found = super().update(name)
            self.last.clear()
            self.last[name] = found
        return self.last[name]


@dataclass(frozen=True)
class _OneByOne(AdapterLayers):
    """A stream whose layers are never worked on together, so that several can go side by side."""

    @staticmethod
    def of_stream(stream: AdapterLayers) -> _OneByOne:
        return _OneByOne(**{f.name: getattr(stream, f.name) for f in fields(AdapterLayers)})

    def layers_at_once(self) -> int:
        return 1


def personalize(
    adapters: Adapters,
    W: Tensor | Sequence[Sequence[float]],
    method: Method | None = None,
    labels: Sequence[str] | None = None,
    rank: int | float | str | None = None,
    modules_to_save: HeadPolicy = None,
) -> Personal:
    """One result per row of W: for the mean, result k = sum_i W[k, i] D_i.

    Adapters of weight 0 take no part in a row, so its rank is at most that of those who do. Every
    update is read once for all rows of a rule that needs no pre-pass; another method is prepared
    once per row, which costs as much as so many merges.

    Args:
        adapters: as for `merge`, K of them.
        W: (rows, K), every row sums to 1: e.g. from `neighbours`.
        method: any method without anchors; `mean()` by default. Its weights are the row.
        labels: of the rows; the adapters' labels by default, if W is square.
        rank: as for `merge`.
        modules_to_save: as for `merge`.

    Raises:
        MethodError: W has another shape, a row does not sum to 1,
            or labels are missing or there twice.
    """
    opened = load_adapters(adapters)
    names = [str(label) for label in ([a.label for a in opened] if labels is None else labels)]
    if len(set(names)) < len(names):
        raise MethodError(f"the labels of the rows are not unique: {names}")
    table = _table(W, names, len(opened), "; give the labels of the rows" if labels is None else "")
    shared = Personal.sharing(opened)
    rows: dict[str, Merged] = {}
    for name, weights in zip(names, cast("list[list[float]]", table.tolist())):  # pyright: ignore[reportUnknownMemberType]
        used = [k for k, weight in enumerate(weights) if weight != 0]
        rows[name] = merge(
            [shared[k] for k in used],
            method=mean() if method is None else method,
            weights=[weights[k] for k in used],
            rank=rank,
            modules_to_save=modules_to_save,
            progress=False,
        )
    return Personal(rows)


def by_task(
    adapters: Adapters,
    tasks: Sequence[str] | Mapping[str, str],
    samples: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | float | str | None = None,
) -> Personal:
    """Task -> the mean of the clients with this task, modules saved whole (a
    connector, say) included.

    Args:
        adapters: as for `merge`.
        tasks: of every client, in the order of the adapters or by label.
        samples: per client.
        rank: as for `merge`.

    Raises:
        MethodError: a client without a task.
        IncompatibleAdaptersError: a client lacks a module that others of its task have.
    """
    opened = load_adapters(adapters)
    of = _tasks(opened, tasks)
    weights = resolve_weights(samples, opened)
    shared = Personal.sharing(opened)
    rows: dict[str, Merged] = {}
    for task in sorted(set(of)):
        mine = [k for k, other in enumerate(of) if other == task]
        _check_complete(task, [opened[k] for k in mine])
        rows[task] = merge(
            [shared[k] for k in mine],
            method=mean(),
            weights=[weights[k] for k in mine],
            rank=rank,
            modules_to_save="mean" if any(opened[k].saved for k in mine) else None,
            progress=False,
        )
    return Personal(rows)


def pilot(
    adapters: Adapters,
    tasks: Sequence[str] | Mapping[str, str],
    W: Tensor,
    samples: Sequence[float] | Mapping[str, float] | None = None,
    connector: str = "multi_modal_projector",
    rank: int | float | str | None = None,
) -> Personal:
    """Pilot's server: per client, the language model's LoRA from its neighbours and the
    connector from its task.

    Args:
        adapters: as for `merge`.
        tasks: of every client, in the order of the adapters or by label.
        W: (K, K) from `neighbours`, every row sums to 1: of everything but the connector.
        samples: per client, for the means over a task.
        connector: part of the names of the modules that are merged by task, LoRA or saved whole.
        rank: as for `merge`.

    Raises:
        MethodError: a client without a task, W of another shape, a row that does not sum to 1, or a
            task whose samples sum to zero.
        IncompatibleAdaptersError: a client lacks a part of the connector that others
            of its task have.

    Source: Xiong et al., "Pilot: building the federated multimodal instruction tuning framework"
    (AAAI 2025), https://arxiv.org/abs/2501.13985. The public code has no server;
    this is the paper's text.
    """
    opened = load_adapters(adapters)
    of, numbers = _tasks(opened, tasks), resolve_weights(samples, opened)
    table = _table(W, [adapter.label for adapter in opened], len(opened))
    for task in sorted(set(of)):
        _check_complete(task, [a for a, other in zip(opened, of) if other == task], connector)
    totals = {task: sum(n for n, other in zip(numbers, of) if other == task) for task in set(of)}
    empty = sorted(task for task, total in totals.items() if total == 0)
    if empty:
        raise MethodError(f"the samples of task {empty[0]!r} sum to zero, so it has no mean")
    shared = Personal.sharing(opened)
    rows: dict[str, Merged] = {}
    for k, adapter in enumerate(opened):
        total = totals[of[k]]
        by_task = [n / total if other == of[k] else 0.0 for n, other in zip(numbers, of)]
        used = [i for i in range(len(opened)) if by_task[i] or table[k, i]]
        labels = [opened[i].label for i in used]
        rule = _TwoSets(
            connector,
            dict(zip(labels, (by_task[i] for i in used))),
            dict(zip(labels, (float(table[k, i]) for i in used))),
        )
        rows[adapter.label] = merge(
            [shared[i] for i in used],
            method=rule,
            weights=[by_task[i] for i in used],
            rank=rank,
            modules_to_save="mean" if any(opened[i].saved for i in used) else None,
            progress=False,
        )
    return Personal(rows)


@dataclass(frozen=True)
class _TwoSets:
    """A merger: one set of weights for modules whose names contain a text, another for the rest."""

    connector: str
    within: Mapping[str, float]
    elsewhere: Mapping[str, float]

    def __call__(self, layer: Layer) -> Update:
        weights = self.within if self.connector in layer.name else self.elsewhere
        # Of weight 0: left out, not multiplied, so that the rank is that of those who take part.
        taking = [k for k, label in enumerate(layer.adapters) if weights[label] != 0]
        if not taking:
            return layer.updates[0].scaled(0.0)
        chosen = Layer(layer.name, tuple(layer.updates[k] for k in taking))
        return weighted_sum(chosen, tuple(weights[layer.adapters[k]] for k in taking))


def _table(W: object, names: Sequence[str], adapters: int, hint: str = "") -> Tensor:
    """W in float64, checked: (rows, adapters), finite, rows of sum 1."""
    try:
        table = torch.as_tensor(W, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MethodError(f"W is a matrix of numbers: {error}") from None
    if tuple(table.shape) != (len(names), adapters):
        raise MethodError(
            f"W is (rows, adapters) = ({len(names)}, {adapters}); got {tuple(table.shape)}{hint}"
        )
    wrong = [name for name, row in zip(names, table) if not abs(float(row.sum()) - 1) <= 1e-6]
    if wrong:  # NaN and infinities, too
        raise MethodError(f"the rows of W sum to 1; those of {wrong[:3]} do not")
    return table


def _tasks(opened: Sequence[Adapter], tasks: Sequence[str] | Mapping[str, str]) -> list[str]:
    labels = [adapter.label for adapter in opened]
    if isinstance(tasks, Mapping):
        lacking = [label for label in labels if label not in tasks]
        if lacking or set(tasks) - set(labels):
            raise MethodError(f"tasks name {sorted(tasks)}, the clients are {sorted(labels)}")
        return [str(tasks[label]) for label in labels]
    if isinstance(tasks, str) or len(tasks) != len(labels):
        raise MethodError(f"{len(labels)} clients need as many tasks; got {tasks!r}")
    return [str(task) for task in tasks]


def _check_complete(task: str, adapters: Sequence[Adapter], part: str = "") -> None:
    """Whether all clients of a task have the same modules, as far as their names contain `part`."""
    for what in ("modules", "saved"):
        names = {name for adapter in adapters for name in getattr(adapter, what) if part in name}
        for adapter in adapters:
            lacking = sorted(names - set(getattr(adapter, what)))
            if lacking:
                raise IncompatibleAdaptersError(
                    f"task {task!r}: client {adapter.label!r} lacks {lacking[0]!r}, which others "
                    "of the task have; it would count as zero"
                )
