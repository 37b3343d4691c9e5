"""Putting back what was changed, whatever happens on the way:
errors, Ctrl-C, and Ctrl-C in the middle of that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["Undo", "without_interrupts"]


class Undo:
    """Steps that put something back, to be run last first:
    each may run twice, and runs again if it was cut short.

    One call is not enough: it can be interrupted itself. So whoever changes something writes

        undo = Undo()
        try:
            try:
                ...  # first `undo.add(step)`, then the change, time and again
            finally:
                undo.run()
        finally:
            undo.run()  # goes on where an interruption stopped the first one
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, step: Callable[[], object]) -> None:
        """Remember a step, before the change that it puts back."""
        self._steps.append(step)

    def run(self) -> None:
        """Run every step, also after one that fails; the first failure is raised at the end."""
        failure: Exception | None = None
        with without_interrupts():
            while self._steps:
                try:
                    self._steps[-1]()
                except Exception as error:
                    failure = failure or error
                self._steps.pop()
        if failure is not None:
            raise failure


class without_interrupts:
    """Ctrl-C waits until the block is done. In other threads than the main one there is none.

    A class: the end of a generator that was left hanging would put an old handler back later.
    """

    def __init__(self) -> None:
        self._before: Callable[[int, FrameType | None], object] | None = None
        self._pressed: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)
        if callable(before):  # else the default action, or one that was not set from Python
            self._before = before
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pressed.append((number, frame))

    def __exit__(self, *_: object) -> None:
        if (before := self._before) is None:
            return
        try:
            signal.signal(signal.SIGINT, before)
        finally:
            signal.signal(signal.SIGINT, before)
            if self._pressed:
                before(*self._pressed[-1])
