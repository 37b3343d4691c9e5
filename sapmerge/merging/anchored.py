"""What an output says of its anchors: which they were, what they measured, what was decided.

Digests tell whether other anchors or another model are these; the rest is for people. Its numbers
have four digits, so that the last bits of a forward pass are no bits of the output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from sapmerge.anchors.anchors import Anchors
from sapmerge.merging.report import Report

__all__ = ["DECISIONS", "anchored", "says_the_same"]

DECISIONS = (
    "agreement",
    "anchor_weights",
    "excluded",
    "clipped",
    "energy_factor",
    "length",
    "losses_by_length",
    "coefficients",
)
"""What parts decide about whole adapters, by the names of their notes."""


def anchored(anchors: Anchors | None, report: Report) -> dict[str, Any] | None:
    """Digests, losses and decisions of a merge with anchors, as plain data; None for others.

    Args:
        anchors: of the merge.
        report: with what they measured.
    """
    if anchors is None:
        return None
    notes = report.notes
    # That of the output itself is left to its report: a merge from a cache alone runs no model, and
    # writes the same bytes.
    losses = {who: loss for who, loss in notes["anchor loss"].items() if who != "merged adapter"}
    decided = {key: _short(notes[key]) for key in (*DECISIONS, "score_kept") if key in notes}
    return {
        "anchors": notes["digests"]["anchors"],
        "model": notes["digests"]["model"],
        "count": notes["anchors"],
        "batches": len(anchors.batches),
        "losses": _short(losses),
        "decided": {"weights": _short(report.weights), **decided},
    }


def says_the_same(one: object, other: object) -> bool:
    """Whether two of them agree: in text exactly, in numbers to a per cent."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        first, second = cast("Mapping[Any, Any]", one), cast("Mapping[Any, Any]", other)
        return first.keys() == second.keys() and all(
            says_the_same(value, second[key]) for key, value in first.items()
        )
    if isinstance(one, float) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=0.01, abs_tol=1e-6)
    return one == other


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return {str(key): _short(entry) for key, entry in entries.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
