"""Putting back what was changed, whatever happens on the way:
errors, Ctrl-C, and Ctrl-C in the middle of that.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import ParamSpec, TypeVar

__all__ = ["Undo", "guarded", "restoring", "without_interrupts"]

P = ParamSpec("P")
R = TypeVar("R")


class Undo:
    """Steps that put something back, to be run last first:
    each may run twice, and runs again if it was cut short.

    One call is not enough: it can be interrupted itself. See `restoring` and `guarded`.
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


class _Open(threading.local):
    """Of each thread: what has been begun and not been put back, the outermost first."""

    def __init__(self) -> None:
        self.undos = list[Undo]()


_open = _Open()


class restoring:
    """A block whose changes are put back on the way out. In it, first `undo.add(step)`,
    then the change, time and again.

    No block can promise that by itself: a Ctrl-C may come as the first thing in its `__exit__`, or
    between the `__enter__` of a generator's context manager and the block. What is then left
    open, the `guarded` function around it puts back.

    Example:
        >>> said = []
        >>> with restoring() as undo:
        ...     undo.add(lambda: said.append("put back"))
        ...     said.append("changed")
        >>> said
        ['changed', 'put back']
    """

    def __init__(self) -> None:
        self._undo = Undo()

    def __enter__(self) -> Undo:
        _open.undos.append(self._undo)
        return self._undo

    def __exit__(self, *_: object) -> None:
        try:
            self._undo.run()
        finally:
            self._undo.run()  # goes on where an interruption stopped the first one
            if self._undo in _open.undos:
                _open.undos.remove(self._undo)


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """A function on whose way out everything is put back that `restoring` blocks in it have
    left: of functions that users call.

    `try` has no gap, as `with` has: the first `finally` can be interrupted, and the second goes on.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        outer = len(_open.undos)
        try:
            try:
                return function(*args, **kwargs)
            finally:
                _put_back(outer)
        finally:
            _put_back(outer)

    return run


def _put_back(outer: int) -> None:
    """Run what was opened after the first `outer` blocks."""
    if len(_open.undos) == outer:
        return
    failure: Exception | None = None
    with without_interrupts():
        while len(_open.undos) > outer:
            try:
                _open.undos[-1].run()
            except Exception as error:
                failure = failure or error
            _open.undos.pop()
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
