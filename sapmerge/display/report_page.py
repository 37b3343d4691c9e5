"""A report as a page of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sapmerge.display.axis import LayerAxis
from sapmerge.display.charts import bars, curve, dots, heat_map, legend, row_labels
from sapmerge.display.colours import Scale, amounts, shares
from sapmerge.display.data import LayerData, ReportData
from sapmerge.display.markup import Markup, element, join
from sapmerge.display.page import Page, facts, figure, numbers, said, section, tracks
from sapmerge.display.pairs import pair_figures
from sapmerge.display.summary import Decided, decided, mean, percent, rows_by_type, span, values_of
from sapmerge.display.words import form_of, sentence_of, title_of

__all__ = ["report_page"]


def report_page(report: ReportData) -> Page:
    """The page of a merge. Every layer is a column, at the same place in every picture."""
    found = decided(report)
    count = len(report.adapters)
    return Page(
        f"Merge of {count} adapter{'s' if count != 1 else ''}",
        join(
            [
                _head(report),
                section("Adapters", _adapters(report)),
                _anchors(report, found),
                _layers(report, found),
                pair_figures(report.cosine, report.sign_conflict, "up to 64 rows of each layer"),
            ]
        ),
    )


def _head(report: ReportData) -> Markup:
    ranks = span(layer.rank for layer in report.layers)
    listed: dict[str, object] = {
        "method": element("code", report.method),
        "base": report.base_model or "not named",
        "result": f"{len(report.layers)} layers, rank {ranks}",
        "energy kept": percent(report.energy_kept),
    }
    if report.modules_to_save:
        listed["modules saved"] = ", ".join(report.modules_to_save)
    if report.dropped_modules:
        listed["modules left out"] = ", ".join(report.dropped_modules)
    warning = (
        element(
            "p",
            "The stored adapter keeps less than 90 % of the merged update's energy: the result is "
            "not low-rank. apply_to(model) is lossless; a larger rank, e.g. rank=0.95, keeps more.",
            css="bad",
        )
        if report.energy_kept < 0.9
        else ""
    )
    return join([facts(listed), warning])


def _adapters(report: ReportData) -> Markup:
    given = ["given"] if any(a.used_weight != a.weight for a in report.adapters) else []
    rows = [
        [
            a.label,
            *([f"{a.used_weight:.3g}", f"{a.weight:g}"] if given else [f"{a.weight:g}"]),
            a.layers,
            a.ranks,
            percent(a.energy_share),
            f"× {a.relative_norm:.2g}"
            if a.outlier is None or abs(a.outlier) <= 5
            else element("span", f"× {a.relative_norm:.2g} outlier", css="bad"),
            element("code", a.digest[:12]),
        ]
        for a in report.adapters
    ]
    head = ["adapter", "weight", *given, "layers", "ranks", "energy share", "relative norm"]
    head.append("sha256")
    return numbers(head, rows)


def _anchors(report: ReportData, found: Decided) -> Markup:
    """What was measured or decided for whole adapters."""
    figures: list[Markup] = []
    losses = report.notes.get("anchor loss")
    if isinstance(losses, Mapping):
        shown = dict(cast("Mapping[str, float | None]", losses))
        caption = "Loss on the anchors; the line is the base model's. Lower is better."
        figures.append(figure(caption, dots(shown, lambda v: f"{v:.4f}", "base model")))
    figures += [
        figure(_caption(key), curve(points, lambda v: f"{v:.4g}", "length s"))
        for key, points in found.curves.items()
    ]
    figures += [figure(_caption(key), dots(v, form_of(key))) for key, v in found.adapters.items()]
    listed = {title_of(key): _plain(value) for key, value in found.others.items()}
    if not figures and not listed:
        return Markup("")
    title = "Anchors and what the method decided" if losses else "What the method decided"
    return section(title, facts(listed) if listed else "", *figures)


def _caption(key: str) -> Markup:
    return join(
        [element("strong", title_of(key)), f": {sentence_of(key)}" * bool(sentence_of(key))]
    )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value)
        return ", ".join(f"{key}: {_plain(entry)}" for key, entry in entries.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(entry) for entry in cast("list[Any]", value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _layers(report: ReportData, found: Decided) -> Markup:
    if not report.layers:
        return Markup("")
    axis = LayerAxis.of(layer.name for layer in report.layers)
    labels = [adapter.label for adapter in report.adapters]
    energies = {
        layer.name: {label: layer.energies[label] for label in layer.adapters}
        for layer in report.layers
    }
    energy = amounts(values_of(energies), "energy (w‖D‖)²", _short)
    rows: list[tuple[object, object]] = [
        ("", legend(energy)),
        ("", axis.headings()),
        (row_labels(labels), heat_map(axis, labels, energies, energy)),
    ]
    maps: list[tuple[object, object]] = []
    for key, cells in found.cells.items():
        values, scale = values_of(cells), _scale(key, cells)
        if max(values) - min(values) < 1e-3 * abs(max(values)):
            continue  # the same everywhere: the bars say it
        maps += [
            ("", element("div", _caption(key), legend(scale), css="caption")),
            (row_labels(labels), heat_map(axis, labels, cells, scale)),
        ]
    rows += [row for line in _LINES for row in _bars(axis, report, line)]
    for key, values in found.layers.items():
        top = max([0.0, *values.values()]) or 1.0
        head = said(title_of(key), f"to {form_of(key)(top)}")
        rows.append((head, bars(axis, values, top, form_of(key))))
    rows += [*maps, ("", axis.ticks())]
    return section(
        "Layers",
        element(
            "p",
            "One column per layer, by module type and depth; the pointer shows names and values. "
            "Hatched: the adapter has no such layer.",
            css="soft",
        ),
        tracks(rows),
        element("h3", "By module type"),
        _types(report, found),
        _every_layer(report),
    )


@dataclass(frozen=True)
class _Line:
    """A number per layer, as bars.

    Args:
        share: whether it is a share, shown up to 100 %.
    """

    title: str
    value: Callable[[LayerData], float | None]
    share: bool = False


_LINES = (
    _Line("stored rank", lambda layer: layer.rank),
    _Line("density", lambda layer: layer.density, share=True),
    _Line("energy kept", lambda layer: layer.energy_kept, share=True),
    _Line("norm ‖D‖", lambda layer: layer.norm),
    _Line("mean cosine", lambda layer: layer.cosine),
    _Line("sign conflict", lambda layer: layer.sign_conflict, share=True),
)


def _bars(axis: LayerAxis, report: ReportData, line: _Line) -> list[tuple[object, object]]:
    values = {layer.name: line.value(layer) for layer in report.layers}
    known = [value for value in values.values() if value is not None]
    if not known:
        return []
    low, top = min([0.0, *known]), 1.0 if line.share else max([0.0, *known])
    form = percent if line.share else _short
    return [(said(line.title, f"{form(low)} to {form(top)}"), bars(axis, values, top, form))]


def _scale(key: str, cells: Mapping[str, Mapping[str, float]]) -> Scale:
    form = form_of(key)
    if form(0.5).endswith("%"):
        return shares(title_of(key).lower(), form)
    return amounts(values_of(cells), title_of(key).lower(), form)


def _types(report: ReportData, found: Decided) -> Markup:
    saliency = {name: sum(row.values()) for name, row in found.cells.get("saliency", {}).items()}
    energy = sum(layer.norm**2 for layer in report.layers)
    head = ["module type", "blocks", "layers", "rank", "density", "energy", "energy kept", "cosine"]
    head += ["sign conflict", *(["saliency"] if saliency else [])]
    rows: list[list[object]] = []
    for row in rows_by_type(report.layers):
        cosine = mean(layer.cosine for layer in row.layers)
        cells: list[object] = [
            element("span", row.title, title=row.kind),
            row.blocks or "-",
            len(row.layers),
            span(layer.rank for layer in row.layers),
            percent(mean(layer.density for layer in row.layers)),
            percent(row.energy / energy if energy else None),
            percent(row.energy_kept),
            "-" if cosine is None else f"{cosine:+.3f}",
            percent(mean(layer.sign_conflict for layer in row.layers)),
        ]
        if saliency:
            whole = sum(saliency.values()) or 1.0
            part = sum(saliency.get(layer.name, 0.0) for layer in row.layers)
            cells.append(percent(part / whole))
        rows.append(cells)
    return numbers(head, rows)


def _every_layer(report: ReportData) -> Markup:
    head = ["layer", "shape", "adapters", "rank", "density", "energy kept", "norm", "cosine"]
    layers = [layer for row in rows_by_type(report.layers) for layer in row.layers]
    return numbers([*head, "sign conflict"], [_row(layer) for layer in layers], "Every layer")


def _row(layer: LayerData) -> list[object]:
    return [
        layer.name,
        f"{layer.shape[0]} × {layer.shape[1]}",
        len(layer.adapters),
        layer.rank,
        percent(layer.density),
        percent(layer.energy_kept),
        f"{layer.norm:.3g}",
        "-" if layer.cosine is None else f"{layer.cosine:+.3f}",
        percent(layer.sign_conflict),
    ]


def _short(value: float) -> str:
    return f"{value:.3g}"
