"""A folder that appears whole or not at all: filled beside its target, synced,
then renamed into place.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from sapmerge.core.undo import without_interrupts
from sapmerge.errors import OutputError, OutputExistsError, warn_afterwards
from sapmerge.io.leftovers import remove, sibling_name, sweep_after
from sapmerge.io.outputs import ADAPTER, Kind, as_path
from sapmerge.io.system import POSIX, Folder, write_at

__all__ = ["StagedFolder", "explained", "write_all"]

_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)
_NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = _NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF}  # EBADF: NFS, which locks no folder
_CHUNK = 1 << 26  # some systems refuse writes above 2 GiB
_ATTEMPTS = 100

_libc = ctypes.CDLL(None, use_errno=True) if POSIX else None
_renameat2: Callable[[int, bytes, int, bytes, int], int] | None = getattr(_libc, "renameat2", None)


@contextmanager
def explained(path: str | os.PathLike[str], operation: str) -> Generator[None, None, None]:
    """Turns an OSError into an OutputError that names the path and the operation."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown error")
        raise OutputError(
            f"{os.fspath(path)!r}: cannot {operation}: {error.strerror or error} ({code})"
        ) from error


def write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Writes every byte of `data` at `offset`, however the system splits the writes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += write_at(file, view[done : done + _CHUNK], offset + done)


class StagedFolder:
    """A temporary sibling of `path` that `publish` puts in its place;
    what is not published is removed.

    Args:
        path: the folder to be; its parent must exist.
        overwrite: replace an existing output (or an empty folder), whole.
        kind: of output: an existing one of another kind is not replaced.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        OutputError: `path` is a symlink, a file or a folder that holds anything else than such an
            output; its parent is missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool, kind: Kind = ADAPTER
    ) -> None:
        self.path = as_path(path)
        self._overwrite, self._kind = overwrite, kind
        target = Path(self.path)
        if target.name in ("", ".."):
            target = target.resolve()
        if not target.name:
            raise OutputError(
                f"{self.path!r}: the root folder cannot be an output; give a folder below it"
            )
        self._parent_path, self._name = os.path.realpath(target.parent), target.name
        if not os.path.isdir(self._parent_path):
            raise OutputError(
                f"{self.path!r}: its parent folder {self._parent_path!r} does not exist; create it "
                "first"
            )
        self._parent: Folder | None = None
        self._folder: Folder | None = None
        self._temporary, self._replaced = "", False
        self._identity: os.stat_result | None = None
        with explained(self.path, "look for leftovers of earlier writes"):
            sweep_after(self._parent_path, self._name)
        self._target_exists()

    def __enter__(self) -> StagedFolder:
        try:
            with explained(self.path, "create a temporary folder beside it"):
                self._parent = Folder(self._parent_path)
                self._create(self._parent)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with without_interrupts():
            self._close()

    def _close(self) -> None:
        """Remove what was not published; it may be called again."""
        if self._temporary:
            remove(self._sibling(self._temporary))
        for opened in (self._folder, self._parent):
            if opened is not None:
                with suppress(OSError):
                    opened.close()
        self._folder = self._parent = None

    @property
    def staged(self) -> str:
        """Where the folder is while it is filled."""
        return self._sibling(self._temporary)

    def create(self, name: str) -> int:
        """Opens a new file of the folder for reading and writing."""
        return self._opened.create(name)

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole new file of the folder and syncs it."""
        with explained(self.path, f"write {name}"):
            file = self.create(name)
            try:
                write_all(file, data, 0)
                os.fsync(file)
            finally:
                os.close(file)

    def unlink(self, name: str) -> None:
        """Removes a file of the folder."""
        self._opened.unlink(name)

    def publish(self) -> None:
        """Puts the folder in its place; from here on it is the output.
        Readers see the old folder or the new one.
        """
        with explained(self.path, "put the new folder in place"):
            _sync(self._opened)
            self._identity = self._opened.status()
            replaced, undo = self._place()
            try:
                if replaced:
                    # another program may have put a file there meanwhile
                    self._kind.require(self._sibling(replaced), self.path)
                _sync(self._beside)
            except BaseException as error:
                try:
                    undo()
                except OSError:
                    raise OutputError(
                        f"{self.path!r}: in place, but perhaps not on disk yet: {error}"
                    ) from error
                raise
        self._temporary = replaced  # what goes now, also if this is interrupted
        if replaced and not remove(leftover := self._sibling(replaced)):
            warn_afterwards(
                f"{self.path!r} was replaced, but the previous output could not be removed from "
                f"{leftover!r}; the next write to the same place tries again"
            )

    def withdraw(self) -> None:
        """Remove the folder again after `publish`, if nothing was replaced by it and
        it is still ours; and what an interrupted exit has left. It may be called again.
        """
        self._close()
        if self._identity is None or self._replaced:
            return
        target = self._sibling(self._name)
        with suppress(OSError):
            if os.path.samestat(self._identity, os.lstat(target)):
                aside = self._sibling(sibling_name(self._name, "tmp"))
                os.rename(target, aside)
                remove(aside)
        self._identity = None

    def _place(self) -> tuple[str, Callable[[], object]]:
        """Renames the folder into place; returns where the old one went, and how to undo it."""
        for _ in range(_ATTEMPTS):
            try:
                return self._exchange() if self._target_exists() else self._rename()
            except OSError as error:
                # Another writer put an output there, or moved it, after we had looked: look again.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                    raise
        raise OutputError(f"{self.path!r}: other programs keep changing it; nothing was written")

    def _rename(self) -> tuple[str, Callable[[], object]]:
        if not self._renameat2(_NOREPLACE):
            # fails if the target is a folder that holds anything
            self._move(self._temporary, self._name)
        return "", lambda: self._move(self._name, self._temporary)

    def _exchange(self) -> tuple[str, Callable[[], object]]:
        self._replaced = True
        if self._renameat2(_EXCHANGE):
            return self._temporary, lambda: self._renameat2(_EXCHANGE)
        # a kill after the first move: the next `_sweep` puts it back
        aside = sibling_name(self._name, "old")

        def put_back() -> None:
            with suppress(FileNotFoundError):
                self._move(aside, self._name)

        def undo() -> None:
            self._move(self._name, self._temporary)
            put_back()

        try:
            self._move(self._name, aside)
            self._move(self._temporary, self._name)
        except BaseException:
            put_back()
            raise
        return aside, undo

    def _renameat2(self, flag: int) -> bool:
        """Renames or exchanges atomically; False where the system cannot."""
        if _renameat2 is None:
            return False
        at = self._beside.descriptor
        source, target = os.fsencode(self._temporary), os.fsencode(self._name)
        if _renameat2(at, source, at, target, flag) == 0:
            return True
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        raise OSError(code, os.strerror(code))

    def _move(self, source: str, target: str) -> None:
        self._beside.rename(source, target)

    def _sibling(self, name: str) -> str:
        return os.path.join(self._parent_path, name)

    @property
    def _opened(self) -> Folder:
        assert self._folder is not None, "entered"
        return self._folder

    @property
    def _beside(self) -> Folder:
        """The folder in which this one is put."""
        assert self._parent is not None, "entered"
        return self._parent

    def _create(self, parent: Folder) -> None:
        # The lock tells a later `_sweep` that this folder is in use. It may be swept before it is
        # locked: try again.
        for _ in range(_ATTEMPTS):
            self._temporary = name = sibling_name(self._name, "tmp")
            parent.mkdir(name)
            try:
                self._folder = Folder(name, parent)
                with _tolerating(_NO_LOCKS):
                    self._folder.lock()
                if os.path.samestat(self._folder.status(), parent.lstat(name)):
                    return
            except (FileNotFoundError, BlockingIOError):
                pass
            if self._folder is not None:
                self._folder.close()
                self._folder = None
        raise OutputError(
            f"{self.path!r}: other programs keep removing the temporary folder beside it"
        )

    def _target_exists(self) -> bool:
        """Whether there is an old output; refuses whatever must not be replaced."""
        target = self._sibling(self._name)
        with explained(self.path, "look at the output folder"):
            try:
                mode = os.lstat(target).st_mode
            except FileNotFoundError:
                return False
            if stat.S_ISLNK(mode):
                raise OutputError(
                    f"{self.path!r} is a symbolic link; give the folder it points to, or another "
                    "path"
                )
            if not stat.S_ISDIR(mode):
                raise OutputError(f"{self.path!r} exists and is not a folder; give another path")
            if not self._overwrite:
                raise OutputExistsError(
                    f"{self.path!r} exists; give another path, or overwrite=True to replace it"
                )
            self._kind.require(target, self.path)
        return True


@contextmanager
def _tolerating(codes: set[int]) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


def _sync(folder: Folder) -> None:
    with _tolerating(_NOT_SUPPORTED):  # some network file systems sync no folders
        folder.sync()
