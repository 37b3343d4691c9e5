"""What the demo teaches of SAP: one sentence and one picture per step, from its own adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sapmerge.methods as library
from sapmerge.demo import drawing
from sapmerge.merging.inspection import inspect
from sapmerge.merging.merge import merge
from sapmerge.parts.mergers.linear import Mean
from sapmerge.parts.outliers import ExcludeOutliers
from sapmerge.parts.scaling import ScaleByAnchors
from sapmerge.parts.wrappers import Chain

__all__ = ["DENSITIES", "PICTURES", "Lesson", "lessons"]

DENSITIES = (0.1, 0.25, 0.5, 0.75)
"""At which the kept saliency is looked at."""
PICTURES = ("1-adapters.png", "2-anchors.png", "3-saliency.png", "4-pruned.png", "5-scaling.png")


@dataclass(frozen=True)
class Lesson:
    """One step.

    Args:
        sentence: what is seen, in numbers of this run.
        picture: where it is drawn.
    """

    sentence: str
    picture: Path


def lessons(
    adapters: Mapping[str, Path], bad: str, anchors: Sequence[Any], base: Any, folder: Path
) -> list[Lesson]:
    """Draw and say the steps of SAP.

    Args:
        adapters: label -> folder; the bad client's is one of them.
        bad: its label.
        anchors: batches of image-text pairs.
        base: the model.
        folder: for the pictures.
    """
    places = [folder / name for name in PICTURES]
    good = {label: path for label, path in adapters.items() if label != bad}
    name = str(folder / "base")

    def merged(some: Mapping[str, Path], method: Any) -> Any:
        return merge(
            some, anchors, base, method=method, rank="exact", base_model=name, progress=False
        )

    return [
        _disagree(adapters, bad, good, places[0]),
        _judged(merged(adapters, ExcludeOutliers(Chain(Mean()))), bad, places[1]),
        _salient(merged(good, library.sap_original(0.5)), places[2]),
        _pruned(
            {d: merged(good, library.sap_original(d)).report for d in DENSITIES},
            places[3],
        ),
        _scaled(merged(good, ScaleByAnchors(Chain(Mean()))), len(good), places[4]),
    ]


def _disagree(
    adapters: Mapping[str, Path], bad: str, good: Mapping[str, Path], picture: Path
) -> Lesson:
    cosines = inspect({label: str(path) for label, path in adapters.items()}).cosine
    among = [cosines[a][b] for a in good for b in good if a < b]
    with_bad = [cosines[a][bad] for a in good]
    drawing.matrix(picture, cosines, "Cosine of two adapters' updates")
    return Lesson(
        f"Adapters disagree: two good ones have a cosine of {_span(among)}, "
        f"and the client with wrong labels has one of {_span(with_bad)} "
        "with them.",
        picture,
    )


def _span(values: Sequence[float]) -> str:
    return f"{min(values):+.2f} to {max(values):+.2f}"


def _judged(merged: Any, bad: str, picture: Path) -> Lesson:
    report = merged.report
    losses = {k: v for k, v in report.notes["anchor loss"].items() if k != "merged adapter"}
    drawing.dots(picture, losses, bad, "Loss on the anchors at base + adapter (lower is better)")
    out = [label for label, weight in report.weights.items() if weight == 0]
    said = f"and leaves out {', '.join(out)}" if out else "and leaves nobody out here"
    return Lesson(
        f"The anchors judge: SAP looks at each adapter's loss ({losses[bad]:.2f} for the bad one) "
        f"and at its cosines with those of low loss, {said}.",
        picture,
    )


def _salient(merged: Any, picture: Path) -> Lesson:
    layers = merged.report.layers
    saliency = {layer.name: layer.notes["saliency"] for layer in layers}
    whole = sum(value for row in saliency.values() for value in row.values())
    first = max(saliency, key=lambda name: sum(saliency[name].values()))
    share = sum(saliency[first].values()) / whole
    drawing.saliency(picture, saliency, "Saliency |w ∂L/∂w| of each layer, in %")
    short = ".".join(first.split(".")[-4:])
    return Lesson(
        f"Saliency: of {len(saliency)} layers, {short} alone has {share:.0%} of what the anchors' "
        f"loss depends on ({1 / len(saliency):.0%} would be an equal share).",
        picture,
    )


def _pruned(reports: Mapping[float, Any], picture: Path) -> Lesson:
    kept = {d: report.notes["score_kept"] for d, report in reports.items()}
    labels = list(next(iter(kept.values())))
    lines = {label: {d: kept[d][label] for d in kept} for label in labels}
    drawing.curves(
        picture,
        lines,
        "Share of the saliency that is kept",
        "density: share of the LoRA parameters that is kept",
    )
    half = [kept[0.5][label] for label in labels]
    return Lesson(
        f"Pruning (`sap_original`): half of the LoRA parameters hold {min(half):.0%} to "
        f"{max(half):.0%} of the saliency. The default, `sap`, prunes nothing: it won no accuracy.",
        picture,
    )


def _scaled(merged: Any, count: int, picture: Path) -> Lesson:
    notes = merged.report.notes
    losses, factor = notes["losses_by_length"], notes["energy_factor"]
    best = min(losses, key=losses.__getitem__)
    drawing.lengths(
        picture,
        losses,
        {"the mean": 1 / factor, "its inputs (SAP)": 1.0},
        "Loss on the anchors at base + s times the merge",
    )
    return Lesson(
        f"Scaling: the mean of {count} is {factor:.1f} times shorter than its inputs (of unrelated "
        f"ones {math.sqrt(count):.1f}); SAP gives that back, and of the lengths that were tried "
        f"the anchors' loss is lowest at {best:.2g}.",
        picture,
    )
