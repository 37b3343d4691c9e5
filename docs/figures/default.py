"""Draws docs/figures/sap_default.png, what `sap()` does, from real numbers:
python docs/figures/default.py

Four random adapters of six layers, of which the first is drawn: three that have learned the same
change, one of them three times as long, and one with the sign flipped. The loss of an adapter is
its distance from that change. Factors, weights and the result are those of `sap()`, and the script
checks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make import CELL, INK, SOFT, arrow, cells, signed
from matplotlib.figure import Figure
from torch import Tensor

import sapmerge as sm

OUT = Path(__file__).parent / "sap_default.png"
ROWS, COLUMNS, DEPTH = 6, 9, 6
BAD = "#b2182b"
CLIENTS = {"art": (1.0, 1.0), "sketch": (1.0, 1.0), "cartoon": (1.0, 3.0), "flipped": (-1.0, 1.0)}
"""Label -> sign of what all have learned, and length."""


def matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(DEPTH)]


@dataclass(frozen=True)
class Anchors:
    """Anchors whose loss is the distance from what was to be learned, per entry."""

    layers: Sequence[sm.Layer]
    wanted: Sequence[Tensor]
    pairs: bool = False

    def losses(self, loss: object = None) -> list[float]:
        return [
            sum(
                float((layer.updates[k].dense() - right).square().mean())
                for layer, right in zip(self.layers, self.wanted)
            )
            / DEPTH
            for k in range(len(self.layers[0]))
        ]

    def scaled(self, factors: Mapping[str, Sequence[float]]) -> Anchors:
        changed = [
            layer.with_updates([u.scaled(f) for u, f in zip(layer, factors[layer.name])])
            for layer in self.layers
        ]
        return Anchors(changed, self.wanted)


def draw() -> Figure:
    common = matrices(0)
    own = {label: matrices(seed) for seed, label in enumerate(CLIENTS, 10)}
    layers = [
        sm.Layer(
            f"layer{n}",
            [
                sm.Dense(length * (sign * common[n] + 0.8 * own[label][n]))
                for label, (sign, length) in CLIENTS.items()
            ],
            adapters=list(CLIENTS),
        )
        for n in range(DEPTH)
    ]
    anchors: Any = Anchors(layers, common)
    method: Any = sm.prepare(sm.sap(), sm.Stream(layers, anchors))
    notes: dict[str, Any] = {}
    merged = method(layers[0].noting(notes.__setitem__)).dense()
    clips = {label: notes.get("clipped", {}).get(label, 1.0) for label in CLIENTS}
    clipped = anchors.scaled({layer.name: list(clips.values()) for layer in layers})
    losses = dict(zip(CLIENTS, clipped.losses()))
    cosines = with_the_reference(layers, losses)
    used = [label for label, weight in notes["weights"].items() if weight]
    assert used == ["art", "sketch", "cartoon"]
    updates = dict(zip(CLIENTS, clipped.layers[0].updates))
    mean = sum((updates[label].dense() for label in used), torch.zeros(ROWS, COLUMNS)) / len(used)
    torch.testing.assert_close(mean * notes["energy_factor"], merged)

    figure = Figure(figsize=(11.4, 6.3), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11.4)
    axes.set_ylim(0, 6.3)
    axes.axis("off")
    y = dict(zip(CLIENTS, (4.55, 3.35, 2.15, 0.95)))
    x = {"adapter": 0.95, "clipped": 3.1, "judged": 5.75, "mean": 7.65, "merged": 9.75}
    wide, top = COLUMNS * CELL, 4.0
    for label, place in y.items():
        out = label not in used
        axes.text(0.12, place, label, va="center", fontsize=11, color=BAD if out else INK)
        for column, matrix in (
            ("adapter", layers[0].updates[list(CLIENTS).index(label)].dense()),
            ("clipped", updates[label].dense()),
        ):
            cells(axes, matrix, x[column], place + ROWS * CELL / 2, signed, top)
        arrow(axes, (x["adapter"] + wide + 0.1, place), (x["clipped"] - 0.1, place))
        if clips[label] < 1:
            middle = (x["adapter"] + wide + x["clipped"]) / 2
            axes.text(
                middle, place + 0.16, f"× {clips[label]:.2f}", ha="center", fontsize=10, color=INK
            )
        said = f"loss {losses[label]:.2f}\ncosine {cosines[label]:+.2f}"
        axes.text(
            x["judged"] - 0.62, place, said + "\nleft out" * out, va="center", fontsize=10.5,
            color=BAD if out else INK,
        )  # fmt: skip
        if not out:
            middle = y["sketch"] + 0.3 * (place - y["sketch"])
            arrow(axes, (x["judged"] + 0.5, place), (x["mean"] - 0.1, middle))
    centre = y["sketch"] + ROWS * CELL / 2
    cells(axes, mean, x["mean"], centre, signed, top)
    cells(axes, merged, x["merged"], centre, signed, top)
    arrow(axes, (x["mean"] + wide + 0.1, y["sketch"]), (x["merged"] - 0.1, y["sketch"]))
    axes.text(
        (x["mean"] + wide + x["merged"]) / 2, y["sketch"] + 0.16,
        f"× {notes['energy_factor']:.2f}", ha="center", fontsize=10, color=INK,
    )  # fmt: skip

    titles = {
        "adapter": ("One per client", "the updates BA"),
        "clipped": ("1  Clip", "at twice the median"),
        "judged": ("2  Judge", "by anchors and directions"),
        "mean": ("3  Average", "of those that are left"),
        "merged": ("4  Give back", "the length of the inputs"),
    }
    for column, (title, below) in titles.items():
        middle = x[column] + (0 if column == "judged" else wide / 2)
        axes.text(middle, 5.75, title, ha="center", fontsize=13, color=INK, fontweight="bold")
        axes.text(middle, 5.48, below, ha="center", fontsize=9.5, color=SOFT)
    return figure


def with_the_reference(layers: Sequence[sm.Layer], losses: Mapping[str, float]) -> dict[str, float]:
    """The mean cosine of each adapter with the others among the half of lowest loss."""
    whole = {
        label: torch.cat([layer.updates[k].dense().flatten() for layer in layers])
        for k, label in enumerate(losses)
    }
    reference = sorted(losses, key=losses.__getitem__)[: (len(losses) + 1) // 2]
    found = {}
    for label, one in whole.items():
        others = [whole[name] for name in reference if name != label]
        cosines = [float(torch.cosine_similarity(one, other, dim=0)) for other in others]
        found[label] = sum(cosines) / len(cosines)
    return found


if __name__ == "__main__":
    draw().savefig(OUT)
