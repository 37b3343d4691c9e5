"""Looking before merging: what adapters are, whether they fit together,
and how they lie to each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn

from sapmerge.core.geometry import Geometry, geometry, off_diagonal_mean
from sapmerge.core.torch_state import pinned_state
from sapmerge.errors import IncompatibleAdaptersError, MethodError, SapmergeError
from sapmerge.io.adapter import Adapter
from sapmerge.io.description import Described, describe_config
from sapmerge.merging.inputs import Adapters, check_mergeable, load_adapters, with_base
from sapmerge.merging.report import table
from sapmerge.merging.spelling import one_spelling

__all__ = ["AdapterSummary", "Inspection", "LayerSummary", "inspect"]


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter at a glance.

    Args:
        kinds: of its layers, and what it changes besides; of a refused adapter its `peft_type`.
        norm: of all updates together; None where they cannot be told without the base, or the
            adapter is refused.
        problem: why it is refused; None for one that can be read.
    """

    label: str
    source: str
    base_model: str | None
    kinds: str
    layers: int
    ranks: str
    alphas: str
    scalings: str
    dtype: str
    norm: float | None
    modules_to_save: tuple[str, ...]
    problem: str | None = None


@dataclass(frozen=True)
class LayerSummary:
    """One layer: who has it, and how those adapters lie to each other (None where
    there is only one).

    Args:
        cosine: mean pairwise cosine of the updates.
        sign_conflict: mean pairwise share of entries with opposite signs.
    """

    name: str
    shape: tuple[int, int]
    adapters: tuple[str, ...]
    cosine: float | None
    sign_conflict: float | None


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect`. `print` gives a page, `to_dict` the data.

    Args:
        adapters: one summary each.
        layers: every layer that any of them has.
        problem: why they cannot be merged as they are; None if they can.
        cosine: label -> label -> cosine of the whole updates.
        sign_conflict: label -> label -> share of entries with opposite signs.
    """

    adapters: tuple[AdapterSummary, ...]
    layers: tuple[LayerSummary, ...]
    problem: str | None
    cosine: Mapping[str, Mapping[str, float]]
    sign_conflict: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        columns: dict[str, Callable[[AdapterSummary], object]] = {
            "adapter": lambda a: a.label,
            "base": lambda a: a.base_model or "-",
            "kind": lambda a: a.kinds,
            "layers": lambda a: a.layers,
            "ranks": lambda a: a.ranks,
            "alphas": lambda a: a.alphas,
            "scaling": lambda a: a.scalings,
            "dtype": lambda a: a.dtype,
            "norm": lambda a: "-" if a.norm is None else f"{a.norm:.4g}",
            "saved modules": lambda a: ", ".join(a.modules_to_save) or "-",
        }
        rows = [[show(a) for show in columns.values()] for a in self.adapters]
        blocks = [table(list(columns), rows)]
        blocks += [
            f"{a.label} is refused: {a.problem}" for a in self.adapters if a.problem is not None
        ]
        if len(self.adapters) > 1:
            blocks.append(f"mergeable: {'yes' if self.problem is None else 'no: ' + self.problem}")
        if self.cosine:
            blocks += [
                _pairs("cosine", self.cosine, "+.3f"),
                _pairs("sign conflict", self.sign_conflict, ".1%"),
            ]
            labels = [adapter.label for adapter in self.adapters]
            blocks.append(
                table(
                    ["layer", "shape", "cosine", "sign conflict", "missing in"],
                    [
                        [
                            layer.name,
                            f"{layer.shape[0]}x{layer.shape[1]}",
                            "-" if layer.cosine is None else f"{layer.cosine:+.3f}",
                            "-" if layer.sign_conflict is None else f"{layer.sign_conflict:.1%}",
                            ", ".join(label for label in labels if label not in layer.adapters)
                            or "-",
                        ]
                        for layer in self.layers
                    ],
                )
            )
        return "\n\n".join(blocks)


@pinned_state()
def inspect(adapters: Adapters, model: Any = None) -> Inspection:
    """Describe adapters, and compare them if they fit together.

    Args:
        adapters: as `merge` takes them; one is enough.
        model: the PeftModel whose adapters are given by name.

    Returns:
        An `Inspection`. Cosines come from Gram products of the factors and sign conflicts from
        blocks of rows: no (m, n) matrix is formed.

    An adapter that `merge` refuses is described as far as its config goes, with the reason.

    Raises:
        SapmergeError: a folder that holds no adapter at all.

    Example:
        >>> import sapmerge as sm
        >>> print(sm.inspect(["art", "sketch"]))  # doctest: +ELLIPSIS
        adapter...
    """
    opened, refused = _readable(adapters, model)
    needing = next(
        (m for a in opened for m in a.modules.values() if m.needs_base is not None), None
    )
    problem = next((summary.problem for summary in refused), None)
    opened = one_spelling(opened)
    try:
        check_mergeable(opened)
        opened = with_base(opened, model)
    except (IncompatibleAdaptersError, MethodError) as error:
        problem = problem or str(error)
    if problem is None:
        layers, overall, norms = _compare(opened)
    else:
        known = needing is None or isinstance(model, nn.Module)
        layers, overall = (), None
        norms = {adapter.label: _norm(adapter) if known else None for adapter in opened}
    return Inspection(
        adapters=(*[_summary(adapter, norms[adapter.label]) for adapter in opened], *refused),
        layers=layers,
        problem=problem,
        cosine={} if overall is None else _by_label(opened, overall.cosine),
        sign_conflict={} if overall is None else _by_label(opened, overall.sign_conflict),
    )


def _readable(adapters: Adapters, model: Any) -> tuple[list[Adapter], list[AdapterSummary]]:
    """The adapters that can be read, and summaries of the others."""
    given: list[tuple[str | None, Any]] = (
        [(str(label), adapter) for label, adapter in adapters.items()]
        if isinstance(adapters, Mapping)
        else [(None, adapter) for adapter in adapters]
        if isinstance(adapters, (list, tuple))
        else []
    )
    fine, refused = list[Adapter](), list[AdapterSummary]()
    for label, adapter in given:
        try:
            fine += load_adapters([adapter] if label is None else {label: adapter}, model)
        except SapmergeError as error:
            described = (
                describe_config(cast("str | os.PathLike[str]", adapter))
                if isinstance(adapter, (str, os.PathLike))
                else None
            )
            if described is None:
                raise
            refused.append(_refused(label, described, str(error)))
    return (
        load_adapters(fine) if fine else [] if refused else load_adapters(adapters, model)
    ), refused


def _refused(label: str | None, described: Described, problem: str) -> AdapterSummary:
    return AdapterSummary(
        label=label or described.label,
        source=described.source,
        base_model=described.base_model,
        kinds=described.peft_type,
        layers=0,
        ranks=described.rank,
        alphas="-",
        scalings="-",
        dtype="-",
        norm=None,
        modules_to_save=(),
        problem=problem,
    )


def _compare(
    adapters: Sequence[Adapter],
) -> tuple[tuple[LayerSummary, ...], Geometry | None, dict[str, float | None]]:
    count = len(adapters)
    zeros = torch.zeros(count, count, dtype=torch.float64)
    overall, layers = Geometry(zeros, zeros.clone(), zeros.clone()), list[LayerSummary]()
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        owners = [k for k, adapter in enumerate(adapters) if name in adapter.modules]
        updates = [adapters[k].update(name) for k in owners]
        found = geometry(updates)
        where = torch.tensor(owners)
        for total, part in (
            (overall.inner, found.inner),
            (overall.both, found.both),
            (overall.opposed, found.opposed),
        ):
            total[where[:, None], where[None, :]] += part
        layers.append(
            LayerSummary(
                name=name,
                shape=updates[0].shape,
                adapters=tuple(adapters[k].label for k in owners),
                cosine=off_diagonal_mean(found.cosine),
                sign_conflict=off_diagonal_mean(found.sign_conflict),
            )
        )
    norms: dict[str, float | None] = {
        a.label: float(norm) for a, norm in zip(adapters, overall.norms, strict=True)
    }
    return tuple(layers), overall if count > 1 else None, norms


def _norm(adapter: Adapter) -> float:
    return sum(adapter.update(name).norm() ** 2 for name in adapter.modules) ** 0.5


def _summary(adapter: Adapter, norm: float | None) -> AdapterSummary:
    modules = list(adapter.modules.values())
    kinds = {module.kind for module in modules} | {
        vector.label for vector in adapter.vectors.values()
    }
    kinds |= {module.method for module in modules if module.method}
    return AdapterSummary(
        label=adapter.label,
        source=adapter.source,
        base_model=adapter.base_model,
        kinds=_listed(kinds),
        layers=len(modules),
        ranks=_listed({module.rank for module in modules}),
        alphas=_listed({module.alpha for module in modules}),
        scalings=_listed({module.scaling for module in modules}),
        dtype=_listed({str(module.dtype).removeprefix("torch.") for module in modules}),
        norm=norm,
        modules_to_save=tuple(sorted({tensor.rpartition(".")[0] for tensor in adapter.saved})),
    )


def _listed(values: set[Any]) -> str:
    return ", ".join(
        f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(values)
    )


def _by_label(adapters: Sequence[Adapter], matrix: torch.Tensor) -> dict[str, dict[str, float]]:
    return {
        row.label: {column.label: float(matrix[i, j]) for j, column in enumerate(adapters)}
        for i, row in enumerate(adapters)
    }


def _pairs(title: str, matrix: Mapping[str, Mapping[str, float]], form: str) -> str:
    labels = list(matrix)
    return table(
        [title, *labels],
        [[row, *[format(matrix[row][column], form) for column in labels]] for row in labels],
    )
