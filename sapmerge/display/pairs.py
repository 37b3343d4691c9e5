"""How adapters lie to each other: a matrix of cosines and one of signs that conflict."""

from __future__ import annotations

from collections.abc import Callable

from sapmerge.display.charts import legend, matrix
from sapmerge.display.colours import signed
from sapmerge.display.data import Pairs
from sapmerge.display.markup import Markup, element
from sapmerge.display.page import figure, section
from sapmerge.display.summary import percent

__all__ = ["pair_figures"]


def pair_figures(cosine: Pairs, sign_conflict: Pairs, counted: str) -> Markup:
    """Both matrices; nothing for a single adapter.

    Args:
        counted: which entries the signs were counted on.
    """
    if not cosine:
        return Markup("")
    return section(
        "How the adapters lie to each other",
        element("p", "Blue: they agree. Orange: they work against each other.", css="soft"),
        element(
            "div",
            _matrix(
                "Cosine of the whole updates; 0 is unrelated.",
                cosine, 0.0, -1.0, lambda value: f"{value:+.2f}", "cosine",
            ),
            _matrix(
                f"Sign conflict: the share of entries with opposite signs, on {counted}; 50 % is "
                "unrelated.",
                sign_conflict, 0.5, 0.5, percent, "sign conflict",
            ),
            css="matrices",
        ),
    )  # fmt: skip


def _matrix(
    caption: str,
    values: Pairs,
    middle: float,
    most: float,
    form: Callable[[float], str],
    label: str,
) -> Markup:
    labels = list(values)
    off = [values[a][b] for a in labels for b in labels if a != b]
    scale = signed(off, middle, label, form, most)
    return figure(caption, matrix(labels, values, scale), legend(scale))
