"""Looking before merging: what adapters are, whether they fit together,
and how they lie to each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import nn

from sapmerge.core.geometry import Geometry, geometry, off_diagonal_mean
from sapmerge.core.torch_state import pinned
from sapmerge.display.data import Pairs
from sapmerge.display.inspection_page import inspection_page
from sapmerge.display.inspection_text import inspection_text
from sapmerge.display.order import natural
from sapmerge.display.page import Page
from sapmerge.display.tables import Look
from sapmerge.errors import IncompatibleAdaptersError, MethodError, SapmergeError
from sapmerge.io.adapter import Adapter
from sapmerge.io.description import Described, describe_config
from sapmerge.merging.copies import check_copies
from sapmerge.merging.heads import plan_heads
from sapmerge.merging.inputs import Adapters, check_mergeable, load_adapters, with_base
from sapmerge.merging.report import by_label
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
        energies: adapter -> ||D||^2.
        ranks: adapter -> rank.
    """

    name: str
    shape: tuple[int, int]
    adapters: tuple[str, ...]
    cosine: float | None
    sign_conflict: float | None
    energies: Mapping[str, float] = field(default_factory=dict[str, float])
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Inspection:
    """The answer of `inspect`. `print` gives a page, `plot` one of pictures, `to_dict` the data.

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
    cosine: Pairs
    sign_conflict: Pairs

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings."""
        return asdict(self)

    def plot(self) -> Page:
        """A page of pictures for the browser: `inspection.plot().save("report.html")`. In a
        notebook `inspection.plot()` shows it.
        """
        return inspection_page(self)

    def to_text(self, look: Look | None = None) -> str:
        """What `print` shows, as wide as a terminal and in its colours if `look` says so."""
        return inspection_text(self, look or Look())

    def __str__(self) -> str:
        return self.to_text()


@pinned
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
    if not opened:
        return Inspection(tuple(refused), (), problem, {}, {})
    opened = one_spelling(opened)
    try:
        check_mergeable(opened)
        plan_heads(opened, [1.0] * len(opened), "first")  # any policy: what none can join
        opened = with_base(opened, model)
        check_copies(opened, None)
    except (IncompatibleAdaptersError, MethodError) as error:
        problem = problem or str(error)
    if problem is None:
        layers, overall, norms = _compare(opened)
    else:
        known = needing is None or isinstance(model, nn.Module)
        layers, overall = (), None
        norms = {adapter.label: _norm(adapter) if known else None for adapter in opened}
    labels = [adapter.label for adapter in opened]
    return Inspection(
        adapters=(*[_summary(adapter, norms[adapter.label]) for adapter in opened], *refused),
        layers=layers,
        problem=problem,
        cosine={} if overall is None else by_label(labels, overall.cosine),
        sign_conflict={} if overall is None else by_label(labels, overall.sign_conflict),
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
    overall, layers = Geometry.nothing(count), list[LayerSummary]()
    for name in sorted({name for adapter in adapters for name in adapter.modules}, key=natural):
        owners = [k for k, adapter in enumerate(adapters) if name in adapter.modules]
        labels = tuple(adapters[k].label for k in owners)
        updates = [adapters[k].update(name) for k in owners]
        compared = geometry(updates)
        overall.add(compared, owners)
        layers.append(
            LayerSummary(
                name=name,
                shape=updates[0].shape,
                adapters=labels,
                cosine=off_diagonal_mean(compared.cosine),
                sign_conflict=off_diagonal_mean(compared.sign_conflict),
                energies={label: float(e) for label, e in zip(labels, compared.inner.diagonal())},
                ranks={adapters[k].label: adapters[k].modules[name].rank for k in owners},
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
