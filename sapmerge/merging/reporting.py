"""The report of a run, made before its effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sapmerge.core.part import recipe
from sapmerge.errors import AnchorError, NonFiniteError, warn
from sapmerge.merging.anchored import DECISIONS
from sapmerge.merging.meaning import say_of_result
from sapmerge.merging.report import (
    LayerReport,
    Report,
    describe_adapters,
    describe_pairs,
    findings_of,
    notes_of,
)
from sapmerge.merging.run import Run

__all__ = ["WHOLE", "report_of", "with_notes"]

WHOLE = (
    "weights",
    *DECISIONS,
    "fit_loss",
    "search_loss",
    "tuned",
)
"""What parts record in every layer and may decide once, for whole adapters."""


def report_of(run: Run, layers: tuple[LayerReport, ...]) -> Report:
    """The report, before the effect: it may warn, and so raise."""
    labels = [adapter.label for adapter in run.adapters]
    layers, cosine, sign_conflict = describe_pairs(labels, layers)
    layers, notes = _of_the_whole(layers)
    given = dict(zip(labels, run.weights, strict=True))
    report = Report(
        method=recipe(run.method),
        base_model=run.base.name,
        scale=run.scale,
        rank=run.rank,
        adapters=describe_adapters(
            run.adapters, run.weights, layers, {**given, **notes.pop("weights", {})}
        ),
        layers=layers,
        modules_to_save=run.heads.modules,
        dropped_modules=run.heads.dropped,
        notes=notes,
        cosine=cosine,
        sign_conflict=sign_conflict,
    )
    if report.energy_kept < 0.9:
        warn(
            f"the stored adapter keeps {report.energy_kept:.0%} of the merged update's energy: "
            f"the result is not low-rank, or too small for {run.dtype}. Use apply_to(model), "
            "which is lossless, or a larger rank, e.g. rank=0.95"
        )
    say_of_result(run.adapters, run.weights, run.method, run.scale, layers, run.said)
    return report


def _of_the_whole(
    layers: Sequence[LayerReport],
) -> tuple[tuple[LayerReport, ...], dict[str, Any]]:
    """The layers without what is the same in all of them, and that, told once. Where modules have
    methods of their own (`ByModule`), it stays with the layers.
    """
    found: dict[str, Any] = {}
    for key in WHOLE:
        values = [layer.notes.get(key) for layer in layers]
        if values and values[0] is not None and all(value == values[0] for value in values):
            found[key] = values[0]
    rest = tuple(
        replace(layer, notes={key: v for key, v in layer.notes.items() if key not in found})
        if found
        else layer
        for layer in layers
    )
    return rest, {**found, **_saliency_kept(layers)}


def _saliency_kept(layers: Sequence[LayerReport]) -> Mapping[str, Any]:
    """Per adapter the share of its saliency, over all layers, that pruning kept."""
    kept, whole = dict[str, float](), dict[str, float]()
    for layer in layers:
        shares: Mapping[str, float] = layer.notes.get("score_kept", {})
        for label, saliency in layer.notes.get("saliency", {}).items():
            kept[label] = kept.get(label, 0.0) + saliency * shares.get(label, 0.0)
            whole[label] = whole.get(label, 0.0) + saliency
    shares = {label: kept[label] / total for label, total in whole.items() if total}
    return {"score_kept": shares} if shares else {}


def with_notes(report: Report, run: Run, notes: Mapping[str, Any] | None, applied: bool) -> Report:
    """The report with the anchors' losses and with what the method found.

    The loss of the merged adapter is None if the model overflows with it, or is another one by now.

    Args:
        notes: of the anchors, if they were measured before.
        applied: whether the model has the merged update.
    """
    anchors, found = run.stream.anchors, {**report.notes, **findings_of(run.prepared)}
    if anchors is None:
        return replace(report, notes={**run.vectors.notes(), **found})
    measured = dict(notes or notes_of(anchors))
    if applied or len(run.kept) == len(report.layers):
        try:
            merged = anchors.loss_of({} if applied else run.kept)
        except (AnchorError, NonFiniteError):
            merged = None
        measured["anchor loss"] = {**measured["anchor loss"], "merged adapter": merged}
    return replace(report, notes={**run.vectors.notes(), **measured, **found})
