"""The pictures of the demo."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sapmerge.demo.extras import extra

__all__ = ["accuracies", "curves", "dots", "lengths", "matrix", "saliency"]

LOOKS = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#8a4a86", "X"), ("#333333", "D"))
"""A colour and a shape for each domain, told apart by either alone (Okabe and Ito's colours)."""
INK, SOFT, MERGED, REFERENCE = "#222222", "#6b7580", "#9ec3e6", "#d3d8dd"


def matrix(path: Path, values: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Adapters against adapters, the diagonal left out."""
    labels = list(values)
    figure, axes = _figure(1.2 + 0.75 * len(labels), 0.9 + 0.75 * len(labels))
    top = max(abs(values[a][b]) for a in labels for b in labels if a != b) or 1.0
    for i, row in enumerate(labels):
        for j, column in enumerate(labels):
            if i != j:
                value = values[row][column]
                face = _blend("#d55e00" if value < 0 else "#0072b2", abs(value) / top)
                axes.add_patch(_box(j - 0.5, i - 0.5, face))
                ink = "white" if abs(value) > 0.75 * top else INK
                axes.text(j, i, f"{value:+.2f}", ha="center", va="center", color=ink, fontsize=10)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0)
    _frame(axes, title, sides=())
    figure.savefig(path)


def dots(path: Path, values: Mapping[str, float], marked: str, title: str) -> None:
    """A number per adapter; one of them marked."""
    figure, axes = _figure(7, 0.9 + 0.4 * len(values))
    for place, (label, value) in enumerate(values.items()):
        colour = LOOKS[1][0] if label == marked else LOOKS[0][0]
        axes.plot([value], [place], "o", color=colour, markersize=9)
        axes.annotate(
            f"{value:.3f}", (value, place), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=10, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.grid(axis="x", color="#e6e6e6")
    _frame(axes, title, sides=("bottom",))
    figure.savefig(path)


def saliency(path: Path, values: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Layers against adapters, each adapter's saliency in per cent of its own."""
    labels, names = list(next(iter(values.values()))), list(values)
    totals = {label: sum(row[label] for row in values.values()) or 1.0 for label in labels}
    figure, axes = _figure(7, 1.0 + 0.26 * len(names))
    top = max(values[name][label] / totals[label] for name in names for label in labels)
    for i, name in enumerate(names):
        for j, label in enumerate(labels):
            share = values[name][label] / totals[label]
            axes.add_patch(_box(j - 0.5, i - 0.5, _blend("#0072b2", share / top)))
            ink = "white" if share > 0.75 * top else INK
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=8)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(labels)), labels)
    short = [".".join(name.split(".")[-3:]) for name in names]
    axes.set_yticks(range(len(names)), short, fontsize=8)
    axes.tick_params(length=0)
    _frame(axes, title, sides=())
    figure.savefig(path)


def curves(path: Path, lines: Mapping[str, Mapping[float, float]], title: str, below: str) -> None:
    """A line per adapter over [0, 1], and the diagonal that chance would be."""
    figure, axes = _figure(7, 4)
    axes.plot([0, 1], [0, 1], "--", color=SOFT, linewidth=1, label="by chance")
    for (label, points), (colour, marker) in zip(lines.items(), LOOKS):
        drawn = {0.0: 0.0, **points, 1.0: 1.0}
        axes.plot(
            list(drawn), list(drawn.values()), marker=marker, color=colour, label=label,
            markersize=6, linewidth=1.4,
        )  # fmt: skip
    axes.set_xlabel(below)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False, loc="lower right")
    _frame(axes, title)
    figure.savefig(path)


def lengths(
    path: Path, losses: Mapping[float, float], marks: Mapping[str, float], title: str
) -> None:
    """A loss over the length of the merge, in lengths of its inputs, some of them marked."""
    figure, axes = _figure(7, 4)
    axes.plot(list(losses), list(losses.values()), "o-", color=LOOKS[0][0], markersize=7)
    for row, ((name, place), (colour, _)) in enumerate(zip(marks.items(), LOOKS[1:])):
        axes.axvline(place, color=colour, linewidth=1.4, linestyle="--")
        axes.annotate(
            f"as long as {name}", (place, 1), xycoords=("data", "axes fraction"),
            xytext=(5, -14 - 16 * row), textcoords="offset points", color=colour, fontsize=10,
        )  # fmt: skip
    axes.set_xlabel("s, in lengths of the inputs")
    axes.margins(y=0.2)
    axes.grid(color="#e6e6e6")
    _frame(axes, title)
    figure.savefig(path)


def accuracies(
    path: Path,
    rows: Mapping[str, Mapping[str, float]],
    with_bad: Mapping[str, Mapping[str, float]],
    references: frozenset[str],
    examples: Mapping[str, Tensor],
) -> None:
    """Examples of the styles above a bar chart of the means, with a mark per domain.

    Args:
        path: where to draw.
        rows: name -> domain -> accuracy in [0, 1].
        with_bad: the same with a bad client among the merged, of some of them.
        references: names of rows that are no merge.
        examples: style -> images (n, 3, h, w) in [-1, 1].
    """
    figure = extra("matplotlib.figure").Figure(figsize=(10.5, 8), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, len(examples), height_ratios=(1, 2.9))
    for column, (style, images) in enumerate(examples.items()):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(_tiles(images).numpy())
        axes.set_title("generic (base model)" if style == "generic" else style, fontsize=11)
        axes.axis("off")
    _bars(figure.add_subplot(grid[1, :]), rows, with_bad, references)
    figure.savefig(path)


def _bars(
    plot: Any,
    rows: Mapping[str, Mapping[str, float]],
    with_bad: Mapping[str, Mapping[str, float]],
    references: frozenset[str],
) -> None:
    domains = list(next(iter(rows.values())))
    means = {name: 100 * _mean(row) for name, row in rows.items()}
    for place, (name, height) in enumerate(means.items()):
        colour = REFERENCE if name in references else MERGED
        plot.bar(place, height, width=0.8, color=colour, zorder=2)
        plot.text(place, 1.5, f"{height:.0f}", ha="center", va="bottom", fontsize=12, zorder=4)
        if name in with_bad:
            low = 100 * _mean(with_bad[name])
            plot.plot([place - 0.4, place + 0.4], [low, low], color="#b2182b", lw=2.5, zorder=3)
    for k, (domain, (colour, marker)) in enumerate(zip(domains, LOOKS)):
        shift = 0.56 * (k / (len(domains) - 1) - 0.5)
        plot.scatter(
            [place + shift for place in range(len(rows))],
            [100 * row[domain] for row in rows.values()],
            s=52, marker=marker, color=colour, edgecolor="white", linewidth=0.8, zorder=5,
            label=domain,
        )  # fmt: skip
    plot.plot([], [], color="#b2182b", lw=2.5, label="mean with a bad client among them")
    plot.axhline(next(iter(means.values())), color=SOFT, linewidth=1, linestyle="--", zorder=1)
    plot.set_xticks(range(len(rows)), [name.replace("_", "\n").replace(" ", "\n") for name in rows])
    plot.set_ylim(0, 112)
    plot.set_yticks(range(0, 101, 20))
    plot.set_ylabel("accuracy, %")
    title = "Accuracy on each domain left out, and the mean as a bar; blue: merges of the others"
    plot.grid(axis="y", color="#e6e6e6", zorder=0)
    plot.legend(ncols=5, loc="upper left", frameon=False, fontsize=10, columnspacing=1.2)
    _frame(plot, title, sides=("left", "bottom"))


def _mean(row: Mapping[str, float]) -> float:
    return sum(row.values()) / len(row)


def _tiles(images: Tensor, side: int = 3) -> Tensor:
    """The first side x side images as one, with white between them."""
    padded = ((images[: side * side] + 1) / 2).permute(0, 2, 3, 1)
    padded = F.pad(padded, (0, 0, 1, 1, 1, 1), value=1.0)
    _, height, width, _ = padded.shape
    return (
        padded.view(side, side, height, width, 3)
        .transpose(1, 2)
        .reshape(side * height, side * width, 3)
    )


def _figure(wide: float, tall: float) -> tuple[Any, Any]:
    figure = extra("matplotlib.figure").Figure(figsize=(wide, tall), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _frame(axes: Any, title: str, sides: tuple[str, ...] = ("left", "bottom")) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(side in sides)


def _box(x: float, y: float, face: object) -> Any:
    rectangle = extra("matplotlib.patches").Rectangle
    return rectangle((x, y), 1, 1, facecolor=face, edgecolor="white", linewidth=1.5)


def _blend(colour: str, share: float) -> tuple[float, ...]:
    """The colour on white."""
    rgb = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    return tuple(1 - share * (1 - part) for part in rgb)
