"""What was merged: per adapter and per layer, as a page to read and as data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sapmerge.anchors.anchors import Anchors
from sapmerge.anchors.loading import batch_size
from sapmerge.core.geometry import (
    SAMPLED_ROWS,
    Crowd,
    Geometry,
    geometry,
    off_diagonal_mean,
)
from sapmerge.core.layer import Layer
from sapmerge.core.part import parts
from sapmerge.core.updates import Update
from sapmerge.display.data import Pairs
from sapmerge.display.page import Page
from sapmerge.display.report_page import report_page
from sapmerge.display.report_text import report_text
from sapmerge.display.tables import Look
from sapmerge.errors import AnchorError, NonFiniteError
from sapmerge.io.adapter import Adapter
from sapmerge.losses import loss_name

__all__ = [
    "AdapterReport",
    "LayerReport",
    "PAIRED",
    "Report",
    "by_label",
    "describe",
    "digests_of",
    "energies_of",
    "findings_of",
    "notes_of",
]

PAIRED = 128
"""Of more adapters the report has means over all pairs only: (K, K) matrices per layer would be
what a merge of thousands holds most of.
"""


@dataclass(frozen=True)
class AdapterReport:
    """One input: its part in the merge.

    Args:
        weight: as it was given.
        energy_share: of sum_k ||w_k D_k||^2 over all layers, w the weights that were used.
        relative_norm: ||w D|| over the median of all adapters.
        outlier: robust z-score of log ||w D||, from median and MAD (None for fewer than three
            non-zero adapters). Beyond 5 the adapter is marked in the table: look at it, or bound it
            with `CapShare`.
        used_weight: after what the method made of the given one: 0 for an adapter that was left
            out. Where that differs from layer to layer, it is the given one.
    """

    label: str
    source: str
    digest: str
    weight: float
    layers: int
    ranks: str
    energy_share: float
    relative_norm: float
    outlier: float | None
    used_weight: float


@dataclass(frozen=True)
class LayerReport:
    """One layer of the result.

    Args:
        name: the module.
        shape: (m, n).
        adapters: the labels that have the layer.
        rank: of the stored update.
        energy_kept: the share of the update's energy that its stored form keeps.
        norm: Frobenius norm of the merged update.
        cosine: mean pairwise cosine of the inputs; None for a single one.
        sign_conflict: mean pairwise share of entries with opposite signs, on at most 64 rows.
        energies: per adapter (w ||D||)^2, what it brings in.
        notes: what the parts of the method recorded, e.g.
            the density that `Prune` kept per adapter.
        pairs: how its inputs lie to each other, until the report has added them up; then None.
    """

    name: str
    shape: tuple[int, int]
    adapters: tuple[str, ...]
    rank: int
    energy_kept: float
    norm: float
    cosine: float | None
    sign_conflict: float | None
    energies: Mapping[str, float]
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    pairs: Geometry | None = field(default=None, repr=False, compare=False)

    @property
    def density(self) -> float | None:
        """The mean share of units that pruning kept; None when nothing was pruned."""
        kept = self.notes.get("density")
        return sum(kept.values()) / len(kept) if kept else None


def describe(
    layer: Layer,
    merged: Update,
    notes: Mapping[str, Any],
    known: dict[str, Geometry] | None = None,
) -> LayerReport:
    """The report of one layer, stored as it is.

    Args:
        known: how the inputs of layers lie to each other, as far as they were looked at before.
    """
    there = [k for k, present in enumerate(layer.present) if present] or list(range(len(layer)))
    inputs = [layer.updates[k] for k in there]
    pairs = None
    if len(inputs) > PAIRED:
        crowd = Crowd(layer.shape)
        crowd.add(inputs)
        cosine, sign_conflict = crowd.cosine(), crowd.sign_conflict()
    else:
        seen = {} if known is None else known
        pairs = seen.get(layer.name) or geometry(inputs, SAMPLED_ROWS)
        seen[layer.name] = pairs
        cosine = off_diagonal_mean(pairs.cosine)
        sign_conflict = off_diagonal_mean(pairs.sign_conflict)
    return LayerReport(
        name=layer.name,
        shape=layer.shape,
        adapters=tuple(
            label for label, there in zip(layer.adapters, layer.present, strict=True) if there
        ),
        rank=merged.rank,
        energy_kept=1.0,
        norm=merged.norm(),
        cosine=cosine,
        sign_conflict=sign_conflict,
        energies=energies_of(layer),
        notes=notes,
        pairs=pairs,
    )


def energies_of(layer: Layer) -> dict[str, float]:
    """Adapter -> (w ||D||)^2; 0 where it lacks the layer."""
    norms = {m.label: 0.0 if m.absent else m.weight * m.update.norm() for m in layer.members}
    return {label: norm * norm for label, norm in norms.items()}


def describe_pairs(
    labels: Sequence[str], layers: Sequence[LayerReport]
) -> tuple[tuple[LayerReport, ...], Pairs, Pairs]:
    """The layers without their pairs, and of whole adapters the cosines and the shares of entries
    with opposite signs (on the rows that were looked at). Both are empty for a single adapter, and
    for more than `PAIRED`.
    """
    total, place = Geometry.nothing(len(labels)), {label: k for k, label in enumerate(labels)}
    for layer in layers:
        if layer.pairs is not None:
            total.add(layer.pairs, [place[label] for label in layer.adapters])
    bare = tuple(replace(layer, pairs=None) for layer in layers)
    if not 2 <= len(labels) <= PAIRED:
        return bare, {}, {}
    return bare, by_label(labels, total.cosine), by_label(labels, total.sign_conflict)


def by_label(labels: Sequence[str], matrix: torch.Tensor) -> Pairs:
    """A (K, K) matrix as label -> label -> value."""
    return {
        row: {column: float(matrix[i, j]) for j, column in enumerate(labels)}
        for i, row in enumerate(labels)
    }


def describe_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    layers: Sequence[LayerReport],
    used: Mapping[str, float],
) -> tuple[AdapterReport, ...]:
    """The report of every adapter.

    Args:
        used: label -> the weight that the method gave it.
    """
    energies = {
        adapter.label: sum(layer.energies[adapter.label] for layer in layers)
        for adapter in adapters
    }
    given = {a.label: weight for a, weight in zip(adapters, weights, strict=True)}
    brought = {
        label: energy * (used[label] / given[label]) ** 2 if given[label] else 0.0
        for label, energy in energies.items()
    }
    total = sum(brought.values())
    return tuple(
        AdapterReport(
            label=adapter.label,
            source=adapter.source,
            digest=adapter.digest,
            weight=weight,
            layers=len(adapter.modules),
            ranks=_span([module.rank for module in adapter.modules.values()]),
            energy_share=brought[adapter.label] / total if total else 0.0,
            relative_norm=relative_norm,
            outlier=outlier,
            used_weight=used[adapter.label],
        )
        for adapter, weight, (relative_norm, outlier) in zip(
            adapters, weights, _relative_norm(list(energies.values()))
        )
    )


def _relative_norm(energies: Sequence[float]) -> list[tuple[float, float | None]]:
    """Norm over the median norm, and the robust z-score of its logarithm.
    Plain z-scores cannot exceed sqrt(K - 1).
    """
    logs = [0.5 * math.log(energy) for energy in energies if energy > 0]
    if not logs:
        return [(0.0, None) for _ in energies]
    middle = statistics.median(logs)
    spread = max(1.4826 * statistics.median([abs(value - middle) for value in logs]), 0.1)

    def place(energy: float) -> tuple[float, float | None]:
        if energy <= 0:  # a weight or an update of zero is no outlier
            return 0.0, None
        distance = 0.5 * math.log(energy) - middle
        return math.exp(distance), distance / spread if len(logs) >= 3 else None

    return [place(energy) for energy in energies]


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return str(low) if low == high else f"{low}-{high}"


@dataclass(frozen=True)
class Report:
    """What `merge` did. `print` gives a page, `plot` one of pictures, `to_dict` the data.

    Args:
        cosine: adapter -> adapter -> cosine of the whole updates; empty for one adapter.
        sign_conflict: the same with the share of entries that have opposite signs, on at most 64
            rows of a layer.
        notes: of the whole merge: what the anchors measured, with the digests of anchors and
            model, and what the method decided for whole adapters (weights, agreement, scaling).
    """

    method: str
    base_model: str | None
    scale: float
    rank: int | float | str | None
    adapters: tuple[AdapterReport, ...]
    layers: tuple[LayerReport, ...]
    modules_to_save: tuple[str, ...]
    dropped_modules: tuple[str, ...]
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    cosine: Pairs = field(default_factory=dict[str, Mapping[str, float]])
    sign_conflict: Pairs = field(default_factory=dict[str, Mapping[str, float]])

    @property
    def weights(self) -> dict[str, float]:
        """Adapter -> the weight that it had in the merge."""
        return {adapter.label: adapter.used_weight for adapter in self.adapters}

    @property
    def energy_kept(self) -> float:
        """The share of the merged update's energy in the stored form, over all layers."""
        total = sum(layer.norm**2 for layer in self.layers)
        return (
            sum(layer.energy_kept * layer.norm**2 for layer in self.layers) / total
            if total
            else 1.0
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings."""
        data: dict[str, Any] = {**asdict(self), "energy_kept": self.energy_kept}
        for layer in data["layers"]:
            del layer["pairs"]
        return data

    def plot(self) -> Page:
        """A page of pictures for the browser: `report.plot().save("report.html")`. In a notebook
        `report.plot()` shows it.
        """
        return report_page(self)

    def to_text(self, look: Look | None = None) -> str:
        """What `print` shows, as wide as a terminal and in its colours if `look` says so."""
        return report_text(self, look or Look())

    def __str__(self) -> str:
        return self.to_text()


def notes_of(anchors: Anchors) -> dict[str, Any]:
    """How many there are, the loss, its mean at the base and at base + each adapter
    as it was read, and the digests of anchors and model.

    A loss is None where the model overflows (a method may have shortened the adapter),
    or is not the base any more.
    """
    losses = {label: _loss(anchors, k) for k, (label, _) in enumerate(anchors.adapters)}
    notes: dict[str, Any] = {
        "anchors": sum(batch_size(batch) for batch in anchors.batches),
        "loss": loss_name(anchors.loss),
        "anchor loss": {"base model": _loss(anchors, None), **losses},
        "digests": digests_of(anchors),
    }
    return notes | ({"layers without gradient": sorted(anchors.unused)} if anchors.unused else {})


def digests_of(anchors: Anchors) -> dict[str, str | None]:
    """sha256 of the anchors and of the model's weights; None for a model that is another by now."""
    try:
        model = anchors.model_digest
    except AnchorError:
        model = None
    return {"anchors": anchors.batches.content, "model": model}


def findings_of(method: object) -> dict[str, Any]:
    """What the parts of a prepared method have found out about whole adapters."""
    findings: dict[str, Any] = {}
    for step in parts(method):
        findings |= getattr(step, "findings", {})
    return findings


def _loss(anchors: Anchors, adapter: int | None) -> float | None:
    try:
        return anchors.loss_at(adapter)
    except (AnchorError, NonFiniteError):
        return None
