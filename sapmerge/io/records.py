"""Small JSON files in a folder, each replaced whole,
and a lock for those who read before they write.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from sapmerge.errors import OutputError, SapmergeError
from sapmerge.io.atomic import explained, write_all
from sapmerge.io.files import Limits, RegularFile, reason
from sapmerge.io.leftovers import sweep
from sapmerge.io.locks import lock
from sapmerge.io.strict_json import parse
from sapmerge.io.system import BINARY, NEW_FILE, NOFOLLOW, sync_folder

__all__ = [
    "Records",
    "encoded",
    "folders",
    "is_folder",
    "read_record",
    "remove_folder",
    "write_file",
    "write_record",
]

_LIMITS = Limits(config_bytes=1 << 28)
_ENDING, _SCRATCH, _CACHE_SCRATCH = ".json", ".part", ".tmp"
_NO_LOCKS = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


def encoded(data: Mapping[str, Any]) -> bytes:
    """The bytes of a record: the same for equal data."""
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode("ascii")


def read_record(path: str) -> dict[str, Any] | None:
    """The data of one file; None if there is none.

    Raises:
        SapmergeError: it cannot be read, or is not a JSON object.
    """
    if not os.path.lexists(path):
        return None
    with RegularFile(path, path) as file:
        return cast("dict[str, Any]", parse(bytes(file.read(0, file.size)), path, _LIMITS))


def write_record(path: str, data: Mapping[str, Any]) -> None:
    """Replace one file: readers see the old one or the new one, also after a kill.

    Raises:
        OutputError: the disk refuses; an old file is as it was.
    """
    write_file(path, encoded(data))


def write_file(path: str, content: bytes) -> None:
    """Replace one file, as `write_record` does."""
    folder, name = os.path.split(path)
    folder = folder or os.curdir
    scratch = os.path.join(folder, f".{name}.{secrets.token_hex(4)}{_SCRATCH}")
    with explained(path, "write"):
        try:
            file = os.open(scratch, NEW_FILE, 0o666)
            try:
                write_all(file, content, 0)
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(scratch, path)
        except OSError:
            with suppress(OSError):
                os.unlink(scratch)
            raise
        _sync(folder)


def is_folder(path: str) -> bool:
    """Whether a path is a folder."""
    return os.path.isdir(path)


def folders(path: str) -> list[str]:
    """The names of the folders in a folder, hidden ones left out, sorted;
    what killed writers left is removed.
    """
    with explained(path, "list"):
        sweep(path)
        return sorted(name for name in os.listdir(path) if not name.startswith("."))


def remove_folder(path: str) -> None:
    """Remove a folder of files: out of sight in one step, then from the disk.

    Raises:
        OutputError: the disk refuses.
    """
    parent, name = os.path.split(path)
    aside = os.path.join(parent, f".{name}.sapmerge-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with explained(path, "remove"):
        os.rename(path, aside)
        _sync(parent)
        for entry in os.listdir(aside):
            os.unlink(os.path.join(aside, entry))
        os.rmdir(aside)


def _sync(folder: str) -> None:
    try:
        sync_folder(folder)
    except OSError as error:
        if error.errno not in _NO_LOCKS:  # some network file systems sync no folders
            raise


class Records:
    """A folder of records by name; names are safe file names, which the caller sees to.

    Args:
        path: the folder; it is made if it does not exist, its parent must.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with explained(path, "create"), suppress(FileExistsError):
            os.mkdir(path)

    def names(self) -> list[str]:
        """Of all records, sorted."""
        with explained(self.path, "list"):
            entries = os.listdir(self.path)
        return sorted(
            name.removesuffix(_ENDING)
            for name in entries
            if name.endswith(_ENDING) and name[0] != "."
        )

    def get(self, name: str) -> dict[str, Any] | None:
        """The data of one record; None if there is none."""
        return read_record(self._path(name))

    def put(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a record, or replace it whole."""
        write_record(self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove a record.

        Raises:
            OutputError: there is none, or the disk refuses.
        """
        with explained(self._path(name), "remove"):
            os.unlink(self._path(name))
            _sync(self.path)

    def sweep(self) -> None:
        """Remove what killed writers left; call it under the lock under which
        records are written.
        """
        with explained(self.path, "look for leftovers"):
            for name in os.listdir(self.path):
                if name.startswith(".") and name.endswith((_SCRATCH, _CACHE_SCRATCH)):
                    with suppress(FileNotFoundError):
                        os.unlink(os.path.join(self.path, name))

    @contextmanager
    def locked(self) -> Generator[None]:
        """One process or thread at a time; a killed holder lets go.

        Raises:
            OutputError: the lock cannot be opened.
        """
        path = os.path.join(self.path, ".lock")
        with explained(path, "lock"):
            file = os.open(path, os.O_RDWR | os.O_CREAT | NOFOLLOW | BINARY, 0o666)
        try:
            try:
                lock(file, wait=True)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise OutputError(f"{path!r}: cannot be locked ({reason(error)})") from error
            yield
        finally:
            os.close(file)  # and unlocks

    def _path(self, name: str) -> str:
        if not name or name[0] == "." or "/" in name or "\0" in name:
            raise SapmergeError(f"{name!r} cannot be the name of a record")
        return os.path.join(self.path, name + _ENDING)
