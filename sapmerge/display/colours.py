"""Colours by value. Blue for amounts, blue to orange for signs: told apart by colour-blind
readers too, on light and on dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["SHEET", "Scale", "amounts", "shares", "signed"]

_STEPS, _SIDES = 16, 8
_LIGHT = ("#eaf1f8", "#a9cbe8", "#4a8fca", "#0a3a6b")
_DARK = ("#1d2a37", "#1f527f", "#4f97d6", "#d3e8ff")
_LIGHT_SIGNS = ("#0b4f8a", "#7fb2dd", "#efefec", "#eda765", "#a84a00")
_DARK_SIGNS = ("#8cc4f7", "#2f6ea6", "#2b2f35", "#a8622a", "#ffb066")


@dataclass(frozen=True)
class Scale:
    """Values to colours.

    Args:
        signs: whether the colours have two ends and a neutral middle.
        place: value -> [0, 1].
        value: [0, 1] -> value, for the legend.
        form: how a value is written.
        label: what is shown, for the legend.
    """

    signs: bool
    place: Callable[[float], float]
    value: Callable[[float], float]
    form: Callable[[float], str]
    label: str

    def colour(self, value: float) -> str:
        """The class of a cell."""
        place = min(1.0, max(0.0, self.place(value)))
        if self.signs:
            return f"d{round(place * 2 * _SIDES)}"
        return f"s{round(place * (_STEPS - 1))}"

    def ink(self, value: float) -> str:
        """The class of a number that stands on the cell."""
        place = min(1.0, max(0.0, self.place(value)))
        return "on" if (abs(place - 0.5) > 0.28 if self.signs else place > 0.5) else "off"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes from the lowest value to the highest."""
        count = 2 * _SIDES + 1 if self.signs else _STEPS
        return tuple(f"{'d' if self.signs else 's'}{step}" for step in range(count))


def amounts(values: list[float], label: str, form: Callable[[float], str]) -> Scale:
    """From 0 to the largest value, by square roots. By logarithms over four decades where one
    value is 400 times the median or more: the others could not be told apart.
    """
    found = sorted(value for value in values if value > 0 and math.isfinite(value))
    top = found[-1] if found else 1.0
    if found and top > 400 * found[len(found) // 2]:
        return Scale(
            False,
            lambda value: 1 + math.log10(value / top) / 4 if value > 0 else 0.0,
            lambda place: top * 10 ** (4 * (place - 1)),
            form,
            f"{label}, logarithmic",
        )
    return Scale(
        False, lambda value: math.sqrt(max(value, 0.0) / top), lambda p: top * p * p, form, label
    )


def shares(label: str, form: Callable[[float], str]) -> Scale:
    """From 0 to 1."""
    return Scale(False, lambda value: value, lambda place: place, form, label)


def signed(
    values: list[float], middle: float, label: str, form: Callable[[float], str], most: float
) -> Scale:
    """Around a neutral value, as far as the values go, to `most` on either side. The end that is
    blue is that of the lowest values; `most` < 0 turns the colours round.
    """
    turn, most = (1.0, most) if most > 0 else (-1.0, -most)
    reach = max((abs(value - middle) for value in values if math.isfinite(value)), default=0.0)
    reach = min(most, max(0.1 * most, math.ceil(20 * reach / most) * most / 20))
    return Scale(
        True,
        lambda value: 0.5 + turn * (value - middle) / reach / 2,
        lambda place: middle + turn * (2 * place - 1) * reach,
        form,
        label,
    )


def _between(colours: tuple[str, ...], place: float) -> str:
    """The colour at a place of a ramp, between its neighbours."""
    at = place * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    one, other = ([int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in colours[low : low + 2])
    mixed = [round(x + (y - x) * (at - low)) for x, y in zip(one, other)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _ramps(amounts: tuple[str, ...], signs: tuple[str, ...]) -> str:
    steps = [f"--s{k}:{_between(amounts, k / (_STEPS - 1))}" for k in range(_STEPS)]
    steps += [f"--d{k}:{_between(signs, k / (2 * _SIDES))}" for k in range(2 * _SIDES + 1)]
    return ";".join(steps)


SHEET = "\n".join(
    [
        f":root{{{_ramps(_LIGHT, _LIGHT_SIGNS)}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{_ramps(_DARK, _DARK_SIGNS)}}}}}",
        "".join(f".s{k}{{fill:var(--s{k})}}" for k in range(_STEPS)),
        "".join(f".d{k}{{fill:var(--d{k})}}" for k in range(2 * _SIDES + 1)),
    ]
)
"""The style sheet of the colours."""
