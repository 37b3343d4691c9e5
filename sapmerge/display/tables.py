"""Tables of text: aligned, no wider than the terminal, coloured on a terminal alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from sapmerge.errors import printable

__all__ = ["Bad", "Look", "shortened", "table"]

_NARROWEST = 16
"""A column of text is not cut below this many letters: it would say nothing."""


class Bad(str):
    """The text of a cell that should be looked at: red where there is colour."""


@dataclass(frozen=True)
class Look:
    """How a table may look.

    Args:
        width: in letters; None: as wide as it has to be.
        colour: whether to use the terminal's colours.
    """

    width: int | None = None
    colour: bool = False

    @staticmethod
    def of(stream: TextIO) -> Look:
        """What suits a stream: a terminal's width and colours, neither of them for files and
        pipes. NO_COLOR and TERM=dumb are respected (https://no-color.org).
        """
        if not stream.isatty():
            return Look()
        colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        try:
            return Look(os.get_terminal_size(stream.fileno()).columns or None, colour)
        except (OSError, ValueError):  # a terminal that does not say, or no file at all
            return Look(None, colour)

    def bold(self, text: str) -> str:
        """A heading."""
        return f"\x1b[1m{text}\x1b[0m" if self.colour else text

    def red(self, text: str) -> str:
        """What should be looked at."""
        return f"\x1b[31m{text}\x1b[0m" if self.colour else text


def table(head: Sequence[str], rows: Sequence[Sequence[object]], look: Look | None = None) -> str:
    """Aligned columns of text: the first one to the left, the others to the right.

    Args:
        head: one heading per column; what comes from files is escaped here as in the cells.
        rows: cells, shown as `str` does. A `Bad` one is red.
        look: width and colours. Where the table is too wide, its columns of text are cut in their
            middle, the widest first; numbers are kept.
    """
    look = look or Look()
    cells = [[printable(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(head))]
    if look.width is not None:
        widths = _fitted(widths, cells, look.width)
    lines: list[str] = []
    for number, (given, row) in enumerate(zip((head, *rows), cells)):
        line: list[str] = []
        for k, (cell, width) in enumerate(zip(row, widths)):
            text = shortened(cell, width)
            text = text.ljust(width) if k == 0 else text.rjust(width)
            line.append(look.red(text) if isinstance(given[k], Bad) else text)
        whole = "  ".join(line).rstrip()
        lines.append(look.bold(whole) if number == 0 else whole)
    return "\n".join(lines)


def shortened(text: str, width: int) -> str:
    """The text in at most `width` letters, its middle left out.

    Example:
        >>> from sapmerge.display.tables import shortened
        >>> shortened("model.layers.11.self_attn.q_proj", 16)
        'model.l...q_proj'
    """
    if len(text) <= width:
        return text
    if width <= 5:
        return text[:width]
    tail = (width - 3) // 2
    return text[: width - 3 - tail] + "..." + text[len(text) - tail :]


def _fitted(widths: Sequence[int], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths that fit, as far as cutting text allows."""
    fitted = list(widths)
    texts = [k for k in range(len(fitted)) if any(_is_text(row[k]) for row in cells[1:])]
    excess = sum(fitted) + 2 * (len(fitted) - 1) - width
    while excess > 0:
        widest = max(texts, key=lambda k: fitted[k], default=None)
        if widest is None or fitted[widest] <= _NARROWEST:
            return fitted
        fitted[widest] -= 1
        excess -= 1
    return fitted


def _is_text(cell: str) -> bool:
    """Whether a cell says its part when its middle is left out: words and paths, not numbers."""
    return any(letter.isalpha() for letter in cell) and not cell[:1].isdigit()
