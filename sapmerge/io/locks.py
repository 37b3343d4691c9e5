"""Locks on files, with what the system offers:
flock(2), or nothing where Python has no `fcntl` (Windows).
"""

from __future__ import annotations

__all__ = ["lock"]

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # pyright: ignore[reportConstantRedefinition]


def lock(descriptor: int, *, wait: bool) -> None:
    """Lock an open file or folder until it is closed.
    Without `fcntl` nothing is locked: see SECURITY.md.

    Args:
        wait: until another holder lets it go.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        OSError: this file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
