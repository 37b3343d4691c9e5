"""An inspection as a page of pictures."""

from __future__ import annotations

from sapmerge.display.axis import LayerAxis
from sapmerge.display.charts import bars, heat_map, legend, row_labels
from sapmerge.display.colours import amounts
from sapmerge.display.data import InspectionData
from sapmerge.display.markup import Markup, element, join
from sapmerge.display.page import Page, numbers, said, section, tracks
from sapmerge.display.pairs import pair_figures
from sapmerge.display.summary import in_shown_order, percent, values_of

__all__ = ["inspection_page"]


def inspection_page(found: InspectionData) -> Page:
    """The page of adapters that nobody has merged yet."""
    count = len(found.adapters)
    title = f"{count} adapters" if count != 1 else f"Adapter {found.adapters[0].label}"
    pairs = pair_figures(found.cosine, found.sign_conflict, "all entries that both change")
    return Page(title, join([_answer(found), _adapters(found), _layers(found), pairs]))


def _answer(found: InspectionData) -> Markup:
    lines = [
        element("p", element("strong", a.label), f" is refused: {a.problem}", css="bad")
        for a in found.adapters
        if a.problem is not None
    ]
    if len(found.adapters) > 1 and found.problem is None:
        lines.append(element("p", "They can be merged as they are."))
    elif len(found.adapters) > 1:
        lines.append(element("p", f"They cannot be merged as they are: {found.problem}", css="bad"))
    return join(lines)


def _adapters(found: InspectionData) -> Markup:
    head = ["adapter", "base", "kind", "layers", "ranks", "alphas", "scaling", "dtype", "norm"]
    rows = [
        [
            a.label,
            a.base_model or "-",
            a.kinds,
            a.layers,
            a.ranks,
            a.alphas,
            a.scalings,
            a.dtype,
            "-" if a.norm is None else f"{a.norm:.4g}",
            ", ".join(a.modules_to_save) or "-",
        ]
        for a in found.adapters
    ]
    return section("Adapters", numbers([*head, "saved modules"], rows))


def _layers(found: InspectionData) -> Markup:
    if not found.layers:
        return Markup("")
    axis = LayerAxis.of(layer.name for layer in found.layers)
    labels = [adapter.label for adapter in found.adapters if adapter.problem is None]
    energies = {layer.name: layer.energies for layer in found.layers}
    ranks = {layer.name: dict(layer.ranks) for layer in found.layers}
    energy = amounts(values_of(energies), "energy ‖D‖²", _short)
    rank = amounts(values_of(ranks), "rank", lambda value: f"{value:.0f}")
    rows: list[tuple[object, object]] = [
        ("", legend(energy)),
        ("", axis.headings()),
        (row_labels(labels), heat_map(axis, labels, energies, energy)),
    ]
    if len(set(values_of(ranks))) > 1:
        rows.append(("", legend(rank)))
        rows.append((row_labels(labels), heat_map(axis, labels, ranks, rank)))
    if len(labels) > 1:
        cosine = {layer.name: layer.cosine for layer in found.layers}
        known = [value for value in cosine.values() if value is not None]
        low, top = min([0.0, *known]), max([0.0, *known])
        head = said("mean cosine", f"{_short(low)} to {_short(top)}")
        rows.append((head, bars(axis, cosine, top, _short)))
        conflict = {layer.name: layer.sign_conflict for layer in found.layers}
        rows.append((said("sign conflict", "0 to 100 %"), bars(axis, conflict, 1.0, percent)))
    listed = [
        [
            layer.name,
            f"{layer.shape[0]} × {layer.shape[1]}",
            "-" if layer.cosine is None else f"{layer.cosine:+.3f}",
            percent(layer.sign_conflict),
            ", ".join(label for label in labels if label not in layer.adapters) or "-",
        ]
        for layer in in_shown_order(found.layers)
    ]
    head = ["layer", "shape", "cosine", "sign conflict", "missing in"]
    return section(
        "Layers",
        element(
            "p",
            "One column per layer, by module type and depth; the pointer shows names and values. "
            "Hatched: the adapter has no such layer.",
            css="soft",
        ),
        tracks([*rows, ("", axis.ticks())]),
        numbers(head, listed, "Every layer"),
    )


def _short(value: float) -> str:
    return f"{value:.3g}"
