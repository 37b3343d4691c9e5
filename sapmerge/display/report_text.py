"""A report as text: head, adapters, layers; module types instead of layers where there are many."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from sapmerge.display.data import AdapterData, LayerData, ReportData
from sapmerge.display.summary import MOST_LAYERS, TypeRow, mean, percent, rows_by_type, span
from sapmerge.display.tables import Bad, Look, table
from sapmerge.errors import printable

__all__ = ["report_text"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_COLUMNS = ["rank", "density", "energy kept", "norm", "cosine", "sign conflict"]


def report_text(report: ReportData, look: Look) -> str:
    """The page that `print(report)` shows."""
    ranks = span(layer.rank for layer in report.layers)
    kept = f"energy kept {report.energy_kept:.1%}"
    lines = [
        f"method     {printable(report.method)}",
        f"base       {printable(report.base_model or 'not named')}",
        f"result     {len(report.layers)} layers, rank {ranks}, "
        f"{kept if report.energy_kept >= 0.9 else look.red(kept)}",
    ]
    if report.modules_to_save or report.dropped_modules:
        saved, dropped = list(report.modules_to_save), list(report.dropped_modules)
        lines.append(printable(f"modules    saved {saved}, left out {dropped}"))
    lines += [f"{key:<10} {printable(_short(value))}" for key, value in report.notes.items()]
    given = ["given"] if any(a.used_weight != a.weight for a in report.adapters) else []
    head = ["adapter", "weight", *given, "layers", "ranks", "energy share", "relative norm", "from"]
    lines += ["", table(head, [_adapter(a, given) for a in report.adapters], look), ""]
    types = rows_by_type(report.layers)
    if len(report.layers) <= MOST_LAYERS:
        rows = [_layer(layer) for row in types for layer in row.layers]
        return "\n".join([*lines, table(["layer", "adapters", *_COLUMNS], rows, look)])
    head = ["module type", "blocks", "layers", *_COLUMNS]
    lines.append(table(head, [_type(row) for row in types], look))
    lines.append("every layer: report.plot(), or report.to_dict()['layers']")
    return "\n".join(lines)


def _adapter(a: AdapterData, given: list[str]) -> list[object]:
    loud: str = f"x {a.relative_norm:.2g}"
    if a.outlier is not None and abs(a.outlier) > 5:
        loud = Bad(f"{loud} outlier")
    weights = [f"{a.used_weight:.3g}", f"{a.weight:g}"] if given else [f"{a.weight:g}"]
    return [a.label, *weights, a.layers, a.ranks, percent(a.energy_share), loud, a.source]


def _layer(layer: LayerData) -> list[object]:
    return [
        layer.name,
        len(layer.adapters),
        layer.rank,
        percent(layer.density),
        _kept(layer.energy_kept),
        f"{layer.norm:.3g}",
        _sign(layer.cosine),
        percent(layer.sign_conflict),
    ]


def _type(row: TypeRow) -> list[object]:
    return [
        row.title,
        row.blocks,
        len(row.layers),
        span(layer.rank for layer in row.layers),
        percent(mean(layer.density for layer in row.layers)),
        _kept(row.energy_kept),
        f"{row.energy**0.5:.3g}",
        _sign(mean(layer.cosine for layer in row.layers)),
        percent(mean(layer.sign_conflict for layer in row.layers)),
    ]


def _kept(share: float) -> str:
    return percent(share) if share >= 0.9 else Bad(percent(share))


def _sign(cosine: float | None) -> str:
    return "-" if cosine is None else f"{cosine:+.3f}"


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return ", ".join(f"{key}: {_short(entry)}" for key, entry in entries.items())
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
