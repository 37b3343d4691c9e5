"""Temporary siblings of an output: their names, and what killed writers have left of them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress

from sapmerge.io.system import POSIX, Folder

__all__ = ["alive", "remove", "sibling_name", "sweep", "sweep_after"]

_LEFTOVER = re.compile(r"\.(.+)\.sapmerge-\d{1,9}-[0-9a-f]{8}\.(?:tmp|old)")


def sibling_name(name: str, ending: str) -> str:
    """A name that no other writer has: ".tmp" for a new output,
    ".old" for one that was moved aside.
    """
    return f".{name}.sapmerge-{os.getpid()}-{secrets.token_hex(4)}.{ending}"


def sweep(parent: str) -> None:
    """Removes what killed writers of any name left in a folder."""
    for name in {match[1] for entry in os.listdir(parent) if (match := _LEFTOVER.fullmatch(entry))}:
        sweep_after(parent, name)


def sweep_after(parent: str, name: str) -> None:
    """Removes what killed writers of `name` left, and puts back an old output that one of them
    had moved aside.
    """
    pattern = re.compile(rf"\.{re.escape(name)}\.sapmerge-(\d{{1,9}})-[0-9a-f]{{8}}\.(tmp|old)")
    for entry in os.listdir(parent):
        match = pattern.fullmatch(entry)
        # A process id comes back after a restart, in containers at once: our own says nothing, only
        # the lock does.
        if not match or (int(match[1]) != os.getpid() and alive(int(match[1]))):
            continue
        leftover, target = os.path.join(parent, entry), os.path.join(parent, name)
        if match[2] == "old" and not os.path.lexists(target):
            os.rename(leftover, target)
        else:
            _remove_unlocked(leftover)


def remove(folder: str) -> bool:
    """Removes what it can of a folder; whether it is gone."""
    with suppress(OSError):  # `ignore_errors` lets some through
        shutil.rmtree(folder, ignore_errors=True)
    try:
        os.lstat(folder)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def alive(process: int) -> bool:
    """Whether a process of this computer has the number; on Windows, where asking would end
    it, all have.
    """
    if not POSIX:
        return True
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _remove_unlocked(folder: str) -> None:
    """Removes a leftover that no writer holds. Where folders cannot be locked nobody can
    tell: it stays.
    """
    if not POSIX:
        return
    with suppress(OSError):
        opened = Folder(folder)
        try:
            opened.lock()
            remove(folder)
        finally:
            opened.close()
