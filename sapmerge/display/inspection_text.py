"""An inspection as text: adapters, whether they can be merged, how they lie to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sapmerge.display.data import InspectedAdapter, InspectedLayer, InspectionData, Pairs
from sapmerge.display.order import grouped
from sapmerge.display.summary import MOST_LAYERS, in_shown_order, mean, percent
from sapmerge.display.tables import Look, table

__all__ = ["inspection_text"]

_COLUMNS: dict[str, Callable[[InspectedAdapter], object]] = {
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


def inspection_text(found: InspectionData, look: Look) -> str:
    """The page that `print(inspection)` shows."""
    rows = [[show(a) for show in _COLUMNS.values()] for a in found.adapters]
    blocks = [table(list(_COLUMNS), rows, look)]
    blocks += [f"{a.label} is refused: {a.problem}" for a in found.adapters if a.problem]
    if len(found.adapters) > 1:
        answer = "yes" if found.problem is None else look.red("no") + f": {found.problem}"
        heads = sorted({name for a in found.adapters for name in a.modules_to_save})
        if heads and found.problem is None:
            answer += f", with modules_to_save ({', '.join(heads)})"
        blocks.append(f"mergeable: {answer}")
    if found.cosine:
        blocks.append(_pairs("cosine", found.cosine, lambda value: f"{value:+.3f}", look))
        blocks.append(_pairs("sign conflict", found.sign_conflict, percent, look))
        blocks.append(_layers(found, look))
    return "\n\n".join(blocks)


def _layers(found: InspectionData, look: Look) -> str:
    """Every layer; module types where there are many."""
    head = ["shape", "cosine", "sign conflict", "missing in"]
    if len(found.layers) <= MOST_LAYERS:
        rows = [[layer.name, *_row(found, [layer])] for layer in in_shown_order(found.layers)]
        return table(["layer", *head], rows, look)
    named = {layer.name: layer for layer in found.layers}
    rows = [
        [
            group.title,
            group.blocks,
            len(group.names),
            *_row(found, [named[name] for name in group.names]),
        ]
        for group in grouped(named)
    ]
    return table(["module type", "blocks", "layers", *head], rows, look)


def _row(found: InspectionData, layers: Sequence[InspectedLayer]) -> list[object]:
    """What a layer, or the layers of a type, have in common."""
    cosine = mean(layer.cosine for layer in layers)
    missing = [
        adapter.label
        for adapter in found.adapters
        if any(adapter.label not in layer.adapters for layer in layers)
    ]
    return [
        ", ".join(sorted({f"{layer.shape[0]}x{layer.shape[1]}" for layer in layers})),
        "-" if cosine is None else f"{cosine:+.3f}",
        percent(mean(layer.sign_conflict for layer in layers)),
        ", ".join(missing) or "-",
    ]


def _pairs(title: str, matrix: Pairs, form: Callable[[float], str], look: Look) -> str:
    labels = list(matrix)
    rows = [[row, *[form(matrix[row][column]) for column in labels]] for row in labels]
    return table([title, *labels], rows, look)
