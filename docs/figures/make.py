"""Draws docs/figures/sap.png, the three stages of SAP, from real numbers:
python docs/figures/make.py

Three small random adapters of one layer (B 8 x 3, A 3 x 10) and one gradient of the anchors' loss
per adapter; scores, masks, norms and the mean are those of `sap_original(density=0.5)`,
and the script checks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

import sapmerge as sm

OUT = Path(__file__).parent / "sap.png"
ROWS, COLUMNS, RANK = 8, 10, 3
ADAPTERS = ("art", "sketch", "cartoon")
INK, SOFT, GRID = "#1f2933", "#66727f", "#d5dbe1"
WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#2c6fbb", "#f7f7f5", "#c8553d"])
SCORES = LinearSegmentedColormap.from_list("scores", ["#fbfaf5", "#f2c14e", "#a4511c"])
CELL = 0.155


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def cells(
    axes: Any,
    matrix: Tensor,
    x: float,
    y: float,
    colours: Any,
    top: float,
    kept: Tensor | None = None,
) -> None:
    """A matrix as coloured cells, (x, y) being its upper left corner;
    what is not kept is an empty cell with a dot.
    """
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            there = kept is None or bool(kept[i, j])
            face = colours(value / top) if there else "white"
            corner = (x + j * CELL, y - (i + 1) * CELL)
            axes.add_patch(
                Rectangle(corner, CELL, CELL, facecolor=face, edgecolor=GRID, linewidth=0.6)
            )
            if not there:
                axes.plot(
                    corner[0] + CELL / 2, corner[1] + CELL / 2, ".", color=GRID, markersize=2.4
                )


def factors(
    axes: Any,
    parts: dict[str, Tensor],
    x: float,
    y: float,
    colours: Any,
    top: float,
    kept: Any = None,
) -> None:
    """B, and A to the right of it, around the centre line y."""
    kept = kept or {}
    cells(axes, parts["B"], x, y + ROWS * CELL / 2, colours, top, kept.get("B"))
    cells(
        axes, parts["A"], x + (RANK + 0.8) * CELL, y + RANK * CELL / 2, colours, top, kept.get("A")
    )


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0
) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=SOFT,
            linewidth=1.3,
            connectionstyle=style,
        )
    )


def signed(value: float) -> Any:
    return WEIGHTS(0.5 + 0.5 * max(-1.0, min(1.0, value)))


def draw() -> Figure:
    generator = torch.Generator().manual_seed(5)
    updates = [
        sm.LowRank(normal(generator, ROWS, RANK), normal(generator, RANK, COLUMNS))
        for _ in ADAPTERS
    ]
    gradients = [normal(generator, ROWS, COLUMNS) for _ in ADAPTERS]
    keep, give_back = sm.TopFraction(0.5), sm.MatchNorm()

    figure = Figure(figsize=(11.4, 6.5), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11.4)
    axes.set_ylim(0, 6.5)
    axes.axis("off")
    x = {"adapter": 0.95, "scores": 3.6, "pruned": 6.25, "merged": 9.45}
    y = dict(zip(ADAPTERS, (3.85, 2.45, 1.05)))
    width = (RANK + 0.8 + COLUMNS) * CELL

    pruned: list[sm.Update] = []
    for name, update, gradient in zip(ADAPTERS, updates, gradients):
        coordinates = sm.Factors()(update)
        B, A = coordinates.values["B"], coordinates.values["A"]
        score = {"B": (B * (gradient @ A.T)).abs(), "A": (A * (B.T @ gradient)).abs()}
        kept = {part: keep(scores) for part, scores in score.items()}
        rest = give_back(coordinates.join({"B": B * kept["B"], "A": A * kept["A"]}), update)
        pruned.append(rest)
        # MatchNorm scales the product; in the picture both factors carry their share of it.
        ratio = (rest.norm() / sm.LowRank(B * kept["B"], A * kept["A"]).norm()) ** 0.5

        axes.text(0.12, y[name], name, ha="left", va="center", fontsize=11, color=INK)
        factors(axes, {"B": B, "A": A}, x["adapter"], y[name], signed, 1.8)
        high = max(float(scores.max()) for scores in score.values())
        factors(axes, score, x["scores"], y[name], lambda v: SCORES(min(1.0, v) ** 0.6), high)
        factors(axes, {"B": B * ratio, "A": A * ratio}, x["pruned"], y[name], signed, 1.8, kept)
        arrow(axes, (x["adapter"] + width + 0.08, y[name]), (x["scores"] - 0.1, y[name]))
        arrow(axes, (x["scores"] + width + 0.08, y[name]), (x["pruned"] - 0.1, y[name]))
        arrow(
            axes,
            (x["pruned"] + width + 0.08, y[name]),
            (x["merged"] - 0.12, 2.45 + 0.35 * (y[name] - 2.45)),
        )

    merged = sum((update.dense() for update in pruned), torch.zeros(ROWS, COLUMNS)) / len(pruned)
    check(updates, gradients, merged)
    cells(
        axes, merged, x["merged"], 2.45 + ROWS * CELL / 2, signed, float(merged.abs().max()) * 0.8
    )

    first = y["art"] + ROWS * CELL / 2
    axes.text(x["adapter"] + 1.5 * CELL, first + 0.08, "B", ha="center", fontsize=10, color=SOFT)
    axes.text(
        x["adapter"] + (RANK + 0.8 + COLUMNS / 2) * CELL,
        y["art"] + 0.33,
        "A",
        ha="center",
        fontsize=10,
        color=SOFT,
    )
    titles = {
        "adapter": ("One adapter per client", "LoRA factors, balanced"),
        "scores": ("1  Score", r"$S = |\, w \;\partial L / \partial w \,|$ at base + adapter"),
        "pruned": ("2  Prune, give back", r"lowest share set to 0, then $\|BA\|$ restored"),
        "merged": ("3  Average", "of the updates BA"),
    }
    for place, (title, below) in titles.items():
        centre = x[place] + (COLUMNS * CELL if place == "merged" else width) / 2
        axes.text(centre, 5.2, title, ha="center", fontsize=13, color=INK, fontweight="bold")
        axes.text(centre, 4.93, below, ha="center", fontsize=9.5, color=SOFT)

    box = (x["scores"] - 0.45, 5.72, width + 0.9, 0.6)
    axes.add_patch(
        FancyBboxPatch(
            box[:2],
            *box[2:],
            boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor="#fdf6e3",
            edgecolor="#d9a441",
        )
    )
    centre = box[0] + box[2] / 2
    axes.text(
        centre,
        6.12,
        "Anchors: 16 to 32 public image-text pairs",
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
    )
    axes.text(
        centre,
        5.87,
        r"$L$ = mean of $1 - \cos(V, T)$",
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
    )
    arrow(axes, (centre, 5.7), (centre, 5.44))

    below = 2.45 - ROWS * CELL / 2 - 0.22
    axes.text(
        x["merged"] + COLUMNS * CELL / 2,
        below,
        "one adapter, rank ≤ Σ r",
        ha="center",
        fontsize=9.5,
        color=SOFT,
    )
    legend(axes)
    return figure


def legend(axes: Any) -> None:
    for place, colours, low, high in (
        (0.95, lambda v: signed(2 * v - 1), "negative", "positive"),
        (3.6, SCORES, "low saliency", "high"),
    ):
        axes.text(place, 0.2, low, ha="left", va="center", fontsize=8.5, color=SOFT)
        start = place + 0.072 * len(low) + 0.08 - 0.008 * max(0, len(low) - 8)
        for k in range(20):
            axes.add_patch(
                Rectangle(
                    (start + k * 0.03, 0.15),
                    0.031,
                    0.1,
                    facecolor=colours(k / 19),
                    edgecolor="none",
                )
            )
        axes.text(start + 0.68, 0.2, high, ha="left", va="center", fontsize=8.5, color=SOFT)
    axes.add_patch(
        Rectangle(
            (6.25, 0.14), CELL * 0.8, CELL * 0.8, facecolor="white", edgecolor=GRID, linewidth=0.8
        )
    )
    axes.plot(6.25 + CELL * 0.4, 0.14 + CELL * 0.4, ".", color=GRID, markersize=2.4)
    axes.text(
        6.45,
        0.2,
        "dropped (density 0.5: half of A, half of B)",
        ha="left",
        va="center",
        fontsize=8.5,
        color=SOFT,
    )


def check(updates: list[sm.LowRank], gradients: list[Tensor], merged: Tensor) -> None:
    """What was drawn is what the library does."""

    class Seen:
        def moment(
            self, layer: str, k: int, part: str, statistic: str, at: str
        ) -> tuple[Tensor, Tensor]:
            coordinates = sm.Factors()(updates[k])
            found = {
                "A": coordinates.values["B"].T @ gradients[k],
                "B": gradients[k] @ coordinates.values["A"].T,
            }[part]
            return found, found

    class Anchors:
        def in_turn(self, layers: object, units: object) -> Iterator[tuple[Sequence[int], Seen]]:
            yield range(len(updates)), Seen()

    layer = sm.Layer("layer", updates, adapters=ADAPTERS)
    anchors: Any = Anchors()
    method = sm.prepare(sm.sap_original(density=0.5), sm.Stream((layer,), anchors))
    torch.testing.assert_close(method(layer).dense(), merged)


if __name__ == "__main__":
    draw().savefig(OUT)
