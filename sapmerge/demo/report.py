"""What the demo found: a table in text, and a bar chart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sapmerge.demo.extras import extra

__all__ = ["DemoResult", "draw"]

Accuracies = Mapping[str, float]
"""Accuracy by domain, in [0, 1]."""


@dataclass(frozen=True)
class DemoResult:
    """Accuracies, and where the files are. `str(result)` is the table.

    Args:
        output: the folder with everything that was written.
        generic: accuracy of the base model on unseen digits in the style it was trained on.
        zero_shot: of the base model on each domain.
        own: of each domain's adapter on its own domain.
        single: of one adapter of another domain, the mean over the three.
        merged: method -> accuracy of its merge of the three other adapters, on the domain left out.
        anchors: how many image-text pairs the methods that read anchors saw.
        tested: how many digits each accuracy is measured on.
        seconds: of each phase.
        quick: trained for a few steps only.
    """

    output: Path
    generic: float
    zero_shot: Accuracies
    own: Accuracies
    single: Accuracies
    merged: Mapping[str, Accuracies]
    anchors: int
    tested: int
    seconds: Accuracies
    quick: bool = False

    @property
    def chart(self) -> Path:
        return self.output / "accuracy.png"

    @property
    def base(self) -> Path:
        """The base model's folder, for `CLIPModel.from_pretrained`."""
        return self.output / "base"

    @property
    def adapters(self) -> Mapping[str, Path]:
        """The folder of each domain's adapter."""
        return {domain: self.output / "adapters" / domain for domain in self.own}

    def merged_adapter(self, method: str, left_out: str) -> Path:
        """The folder of a merged adapter."""
        return self.output / "merged" / method / f"without-{left_out}"

    def __str__(self) -> str:
        domains = list(self.zero_shot)
        wide = max(map(len, ("adapter of one other domain", *self.merged)))

        def row(label: str, accuracies: Accuracies) -> str:
            cells = [*(accuracies[domain] for domain in domains), average(accuracies)]
            return f"  {label:<{wide}}" + "".join(f"{100 * cell:>10.1f}" for cell in cells)

        phases = ", ".join(f"{phase} {taken:.0f}" for phase, taken in self.seconds.items())
        error = 196 * math.sqrt(0.25 / self.tested)
        return "\n".join(
            [
                f"Accuracy in % on {self.tested} unseen handwritten digits; base model, generic "
                f"style: {100 * self.generic:.1f}",
                "",
                f"  {'':<{wide}}" + "".join(f"{name:>10}" for name in (*domains, "average")),
                row("zero-shot", self.zero_shot),
                row("adapter of the domain", self.own),
                row("adapter of one other domain", self.single),
                "merged from the three other domains:",
                *(row(name, accuracies) for name, accuracies in self.merged.items()),
                "",
                f"Every method runs with its defaults; {self.anchors} generic image-text pairs are "
                "the anchors.",
                "This demonstrates the pipeline. It is no evidence for or against any method: one "
                "tiny model, four",
                f"made-up domains, and every number is good to about {error:.0f} points.",
                *(["Quick mode: nothing here is trained to the end."] if self.quick else []),
                "",
                f"{self.output}: chart in {self.chart.name}, adapters in adapters/ and merged/, "
                "base model in base/",
                f"{sum(self.seconds.values()):.0f} seconds ({phases})",
            ]
        )


def average(accuracies: Accuracies) -> float:
    """The mean over the domains."""
    return sum(accuracies.values()) / len(accuracies)


def draw(result: DemoResult, examples: Mapping[str, Tensor]) -> None:
    """Draw examples of the styles above a bar chart of the averages,
    with a mark per domain left out.

    Args:
        result: what to draw; the chart goes to `result.chart`.
        examples: style -> images (n, 3, h, w) in [-1, 1].
    """
    figure = extra("matplotlib.figure").Figure(figsize=(10, 7), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, len(examples), height_ratios=(1, 2.6))
    for column, (style, images) in enumerate(examples.items()):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(_tiles(images).numpy())
        axes.set_title("generic (base model)" if style == "generic" else style, fontsize=11)
        axes.axis("off")
    _bars(figure.add_subplot(grid[1, :]), result)
    figure.savefig(result.chart)


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


def _bars(plot: Any, result: DemoResult) -> None:
    rows = {
        "zero-shot": result.zero_shot,
        "one other\nadapter": result.single,
        **{name.replace("_", "\n"): accuracies for name, accuracies in result.merged.items()},
        "adapter of\nthe domain": result.own,
    }
    reference, merged = "#b8bec6", "#4c78a8"
    colours = [reference, reference, *(merged for _ in result.merged), reference]
    heights = [100 * average(accuracies) for accuracies in rows.values()]
    plot.bar(range(len(rows)), heights, width=0.7, color=colours, zorder=2)
    for k, height in enumerate(heights):
        ink = "white" if colours[k] == merged else "#222222"
        plot.text(
            k, 1.5, f"{height:.0f}", ha="center", va="bottom", color=ink, fontsize=11, zorder=4
        )
    for domain, marker in zip(result.zero_shot, "osD^"):
        values = [100 * accuracies[domain] for accuracies in rows.values()]
        look = {"s": 42, "marker": marker, "color": "#222222", "edgecolor": "white", "zorder": 3}
        plot.scatter(range(len(rows)), values, label=domain, **look)
    plot.axhline(heights[0], color="#666666", linewidth=1, linestyle="--", zorder=1)
    plot.set_xticks(range(len(rows)), rows)
    plot.set_ylim(0, 100)
    plot.set_ylabel("accuracy, %")
    plot.set_title(
        "Accuracy by domain, and the mean as a bar. Blue: merged from the other three adapters",
        fontsize=11,
    )
    plot.grid(axis="y", color="#e6e6e6", zorder=0)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(ncols=4, loc="upper left", frameon=False, fontsize=10)
