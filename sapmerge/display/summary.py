"""Layers in the order in which they are shown, and module types in one row each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sapmerge.display.data import InspectedLayer, LayerData, ReportData
from sapmerge.display.order import grouped

__all__ = [
    "MOST_LAYERS",
    "Decided",
    "TypeRow",
    "decided",
    "in_shown_order",
    "mean",
    "percent",
    "rows_by_type",
    "span",
    "values_of",
]


MOST_LAYERS = 40
"""So many layers are listed one by one in a terminal."""


@dataclass(frozen=True)
class TypeRow:
    """The layers of one module type of a report.

    Args:
        kind: the name with * for every number.
        title: what tells it apart from the other types.
        blocks: the first and the last number.
        layers: its layers, by depth.
    """

    kind: str
    title: str
    blocks: str
    layers: tuple[LayerData, ...]

    @property
    def energy(self) -> float:
        """Of the merged update."""
        return sum(layer.norm**2 for layer in self.layers)

    @property
    def energy_kept(self) -> float:
        kept = sum(layer.energy_kept * layer.norm**2 for layer in self.layers)
        return kept / self.energy if self.energy else 1.0


def rows_by_type(layers: Sequence[LayerData]) -> list[TypeRow]:
    """A row per module type."""
    named = {layer.name: layer for layer in layers}
    return [
        TypeRow(g.kind, g.title, g.blocks, tuple(named[name] for name in g.names))
        for g in grouped(named)
    ]


def in_shown_order(layers: Sequence[InspectedLayer]) -> list[InspectedLayer]:
    """Layers by module type and depth."""
    named = {layer.name: layer for layer in layers}
    return [named[name] for group in grouped(named) for name in group.names]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def values_of(cells: Mapping[str, Mapping[str, float]]) -> list[float]:
    """All values of a heat map."""
    return [value for row in cells.values() for value in row.values()]


def span(numbers: Iterable[int]) -> str:
    """From the least to the largest."""
    found = sorted(set(numbers))
    if not found:
        return "-"
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def percent(share: float | None) -> str:
    """A share in percent; one that is not known is a hyphen."""
    return "-" if share is None else f"{share:.1%}"


@dataclass(frozen=True)
class Decided:
    """What the parts of a method recorded, by its form.

    Args:
        adapters: what -> adapter -> number, the same in every layer.
        curves: what -> number -> number.
        cells: what -> layer -> adapter -> number.
        layers: what -> layer -> number.
        others: what is the same in every layer, and none of these.
    """

    adapters: dict[str, dict[str, float]]
    curves: dict[str, dict[float, float]]
    cells: dict[str, dict[str, dict[str, float]]]
    layers: dict[str, dict[str, float]]
    others: dict[str, object]


def decided(report: ReportData) -> Decided:
    """Sort what was recorded: per layer, or once for the whole adapter."""
    labels = {adapter.label for adapter in report.adapters}
    found = Decided({}, {}, {}, {}, {})
    for key, value in report.notes.items():
        if key != "anchor loss":
            _whole(found, key, value, labels)
    keys = {key: None for layer in report.layers for key in layer.notes}
    for key in keys:
        by_layer = {layer.name: layer.notes[key] for layer in report.layers if key in layer.notes}
        first = next(iter(by_layer.values()))
        everywhere = len(by_layer) == len(report.layers) > 1
        if everywhere and all(value == first for value in by_layer.values()):
            _whole(found, key, first, labels)
        elif all(_numbers_of(value, labels) for value in by_layer.values()):
            found.cells[key] = {name: dict(value) for name, value in by_layer.items()}
        elif all(_is_number(value) for value in by_layer.values()):
            found.layers[key] = {name: float(value) for name, value in by_layer.items()}
    return found


def _whole(found: Decided, key: str, value: Any, labels: set[str]) -> None:
    if _numbers_of(value, labels):
        found.adapters[key] = dict(value)
    elif isinstance(value, Mapping) and value and all(map(_is_number, cast("Any", value))):
        points = cast("Mapping[float, float]", value)
        if all(map(_is_number, points.values())):
            found.curves[key] = dict(points)
    else:
        found.others[key] = value


def _numbers_of(value: Any, labels: set[str]) -> bool:
    """Whether it is a number per adapter."""
    if not isinstance(value, Mapping) or not value:
        return False
    entries = cast("Mapping[Any, Any]", value)
    return all(key in labels and _is_number(entry) for key, entry in entries.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
