"""A bar with what is done now and the time that is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sapmerge.io.machine import at_terminal

__all__ = ["Clock", "nobody"]


def nobody(_: str) -> None:
    """Tell nobody."""


@dataclass
class Clock:
    """How far the demo is.

    Args:
        total: of the work, in steps of training or as long.
        say: is told what begins.
        shown: whether to show a bar on stderr. None: if that is a terminal.
    """

    total: int
    say: Callable[[str], None] = nobody
    shown: bool | None = None
    _bar: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.shown or (self.shown is None and at_terminal()):
            from tqdm import tqdm

            form = "{percentage:3.0f} %|{bar}| {desc}, {remaining} left"
            self._bar = tqdm(total=self.total, bar_format=form, leave=False, dynamic_ncols=True)

    def begin(self, what: str) -> None:
        """What is done from now on."""
        if self._bar is None:
            self.say(what)
        else:
            self._bar.set_description_str(what)

    def step(self, count: int = 1) -> None:
        """So much of the work is done."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
