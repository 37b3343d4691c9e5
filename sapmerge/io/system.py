"""What systems have differently: bytes at a place of a file, and folders that are held open.

Windows opens no folders, reads and writes where a file's position is, and replaces or removes
nothing that is open.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from sapmerge.io.locks import lock

__all__ = [
    "BINARY",
    "NEW_FILE",
    "NOFOLLOW",
    "POSIX",
    "Folder",
    "read_at",
    "sync_folder",
    "write_at",
]

POSIX = hasattr(os, "pread") and os.open in os.supports_dir_fd
# Not every flag exists on every system; without O_BINARY Windows would write "\n" as "\r\n".
NOFOLLOW, BINARY = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_BINARY", 0)
NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW | BINARY
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | NOFOLLOW


def read_at(file: int, size: int, start: int) -> bytes:
    """At most `size` bytes of an open file, from `start` on."""
    if POSIX:
        return os.pread(file, size, start)
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, size)


def write_at(file: int, data: memoryview, start: int) -> int:
    """Write some of the bytes from `start` on; how many."""
    if POSIX:
        return os.pwrite(file, data, start)
    os.lseek(file, start, os.SEEK_SET)
    return os.write(file, data)


class Folder:
    """A folder that is held open, where the system can: what is done in it is done there,
    wherever its path leads by then.

    Args:
        path: of the folder; in `parent`, if there is one.

    Raises:
        OSError: it is no folder, or cannot be opened.
    """

    def __init__(self, path: str, parent: Folder | None = None) -> None:
        self.path = path if parent is None else os.path.join(parent.path, path)
        self.descriptor = -1  # while it is not open, and where the system opens no folders
        if POSIX:
            at = None if parent is None else parent.descriptor
            self.descriptor = os.open(path, _DIRECTORY, dir_fd=at)
        elif not os.path.isdir(self.path):
            raise NotADirectoryError(f"{self.path!r} is no folder")

    def create(self, name: str) -> int:
        """Open a new file for reading and writing."""
        path, at = self._place(name)
        return os.open(path, NEW_FILE, 0o666, **at)

    def unlink(self, name: str) -> None:
        """Remove a file."""
        path, at = self._place(name)
        os.unlink(path, **at)

    def mkdir(self, name: str) -> None:
        """Make a folder."""
        path, at = self._place(name)
        os.mkdir(path, 0o777, **at)

    def rename(self, source: str, target: str) -> None:
        """Give an entry another name; an existing target is not replaced, but for an
        empty folder on POSIX.
        """
        if POSIX:
            os.rename(source, target, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        else:
            os.rename(os.path.join(self.path, source), os.path.join(self.path, target))

    def lstat(self, name: str) -> os.stat_result:
        """The status of an entry, or of a link itself."""
        path, at = self._place(name)
        return os.stat(path, follow_symlinks=False, **at)

    def status(self) -> os.stat_result:
        """Of the folder that was opened."""
        return os.fstat(self.descriptor) if POSIX else os.stat(self.path)

    def lock(self) -> None:
        """Lock it until it is closed, where folders can be locked.

        Raises:
            BlockingIOError: another process holds it.
            OSError: this file system has no locks.
        """
        if POSIX:
            lock(self.descriptor, wait=False)

    def sync(self) -> None:
        """Its entries to disk, where folders can be synced."""
        if POSIX:
            os.fsync(self.descriptor)

    def close(self) -> None:
        """It may be closed again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:  # an interruption before anybody had it
        with suppress(OSError):
            self.close()

    def _place(self, name: str) -> tuple[str, dict[str, Any]]:
        return (name, {"dir_fd": self.descriptor}) if POSIX else (os.path.join(self.path, name), {})


def sync_folder(path: str) -> None:
    """The entries of a folder to disk, where folders can be synced."""
    if POSIX:
        folder = Folder(path)
        try:
            folder.sync()
        finally:
            folder.close()
