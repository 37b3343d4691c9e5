"""The axis that all pictures of layers share: one column per layer, by module type and depth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from sapmerge.display.labels import fitted, width_of
from sapmerge.display.markup import Markup, element, join
from sapmerge.display.order import Group, depth, grouped

__all__ = ["LayerAxis"]

_WIDE, _GAP = 860, 7
_TITLE = 214  # pixels of a heading at most


@dataclass(frozen=True)
class LayerAxis:
    """Columns of layers, in pixels.

    Args:
        groups: the layers by module type.
    """

    groups: tuple[Group, ...]

    @staticmethod
    def of(names: Iterable[str]) -> LayerAxis:
        """The axis for these layers."""
        return LayerAxis(grouped(names))

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group.names]

    @cached_property
    def cell(self) -> int:
        """The width of one column."""
        count = max(1, len(self.names))
        return max(3, min(34, (_WIDE - _GAP * (len(self.groups) - 1)) // count))

    @cached_property
    def places(self) -> dict[str, int]:
        """The left edge of every column."""
        places, x = dict[str, int](), 0
        for group in self.groups:
            for name in group.names:
                places[name] = x
                x += self.cell
            x += _GAP
        return places

    @property
    def width(self) -> int:
        return len(self.names) * self.cell + _GAP * (max(1, len(self.groups)) - 1)

    @property
    def overhang(self) -> int:
        """What slanted headings need on the right of the last column."""
        if self._fits:
            return 0
        return max(
            0,
            *(
                round(self.places[g.names[0]] + 0.84 * width_of(_title(g)) + 16 - self.width)
                for g in self.groups
            ),
        )

    @property
    def _fits(self) -> bool:
        """Whether the headings can lie flat."""
        return all(
            width_of(_title(group)) <= self.cell * len(group.names) + _GAP - 4
            for group in self.groups
        )

    def headings(self) -> Markup:
        """The module types, above their columns; slanted where they are longer than wide."""
        flat = self._fits
        longest = max((width_of(_title(group)) for group in self.groups), default=0.0)
        height = 18 if flat else round(0.55 * longest) + 20
        marks: list[Markup] = []
        for group in self.groups:
            x, end = self.places[group.names[0]], self.cell * len(group.names)
            at = f"translate({x + (0 if flat else 3)} {height - 8})"
            marks.append(
                element(
                    "text",
                    _title(group),
                    element("title", group.kind),
                    transform=at if flat else f"{at} rotate(-33)",
                    css="head",
                )
            )
            marks.append(element("path", d=f"M{x} {height - 2.5}h{max(2, end - 1)}", css="rule"))
        return self.svg(height, marks)

    def ticks(self) -> Markup:
        """The numbers of the blocks, under their columns, at regular steps that leave room."""
        marks: list[Markup] = []
        for group in self.groups:
            longest = max(width_of(depth(name)) for name in group.names)
            step = max(1, math.ceil((longest + 4) / self.cell))
            for name in group.names[::step]:
                x = self.places[name] + self.cell / 2
                marks.append(
                    element("text", depth(name), x=x, y=11, css="tick", text_anchor="middle")
                )
        return self.svg(15, marks)

    def svg(self, height: int, marks: Iterable[Markup]) -> Markup:
        """A picture as wide as the axis."""
        width = self.width + self.overhang
        return element(
            "svg", join(marks), width=width, height=height, viewBox=f"0 0 {width} {height}"
        )


def _title(group: Group) -> str:
    return fitted(group.title, _TITLE)
