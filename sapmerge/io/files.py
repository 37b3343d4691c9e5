"""Files and the tensors in them, read into memory of our own.

Nothing is mapped: a mapped file that is edited changes tensors already read, and one that is
truncated kills the process.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, AdapterSecurityError, InputChangedError, printable
from sapmerge.io.measuring import CHUNK, Entry, Facts, groups, measure, measure_group

if TYPE_CHECKING:
    from hashlib import _Hash as Hash  # pyright: ignore[reportPrivateUsage]

__all__ = [
    "DEFAULT_LIMITS",
    "HeldWeights",
    "Limits",
    "RegularFile",
    "StoredWeights",
    "Weights",
    "reason",
    "shown",
]

# Not every flag exists on every system.
_OPEN = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Limits:
    """How large, deep and slow an adapter may be before it is refused.
    The defaults fit every adapter we know of.
    """

    config_bytes: int = 1 << 20
    config_depth: int = 32
    pattern_keys: int = 4096
    pattern_length: int = 512
    pattern_seconds: float = 2.0
    header_bytes: int = 100_000_000
    tensors: int = 200_000
    name_length: int = 512
    rank_above_shape: bool = True


DEFAULT_LIMITS = Limits()


def shown(value: object, width: int = 200) -> str:
    """`repr`, without control characters, cut in the middle:
    safe to print whatever a stranger wrote.
    """
    try:
        text = printable(repr(value))
    except Exception:  # an integer of 5000 digits, or an object with a broken repr
        text = f"a {type(value).__name__}"
    if len(text) <= width:
        return text
    half = (width - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


class RegularFile:
    """A regular file, opened so that a FIFO cannot block and a device cannot be read.

    Args:
        path: where it is; symbolic links are followed (the cache of the Hub is made of them).
        where: how messages name it.
    """

    def __init__(self, path: str, where: str) -> None:
        self.where = where
        try:
            self._require_regular(os.stat(path).st_mode)
            self._raw = io.FileIO(path, "r", opener=lambda name, _: os.open(name, _OPEN))
        except (OSError, ValueError) as error:
            raise AdapterFormatError(f"{where}: cannot be opened ({reason(error)})") from None
        try:
            status = os.fstat(self._raw.fileno())
            self._require_regular(status.st_mode)
        except BaseException:
            self._raw.close()
            raise
        self.size = status.st_size

    def _require_regular(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
            raise AdapterSecurityError(f"{self.where}: is {kind}; expected a regular file")

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` with the bytes from `start` on, or raise `InputChangedError`:
        the size was checked before.
        """
        done = 0
        try:
            self._raw.seek(start)
            while done < len(view):
                count = self._raw.readinto(view[done:])
                if not count:
                    break
                done += count
        except OSError as error:
            raise AdapterFormatError(f"{self.where}: cannot be read ({reason(error)})") from None
        if done < len(view):
            raise InputChangedError(
                f"{self.where}: became shorter while it was read ({start + done} bytes, expected "
                f"at least {start + len(view)}); leave inputs alone during a merge and load the "
                "adapter again"
            )

    def read(self, start: int, size: int) -> bytearray:
        """`size` bytes from `start`, in memory of our own."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), start)
        return buffer


def reason(error: Exception) -> str:
    """The short text of an OSError, without the path."""
    return (
        error.strerror or type(error).__name__ if isinstance(error, OSError) else shown(str(error))
    )


class Weights(Protocol):
    """Named tensors, wherever they lie. `facts` is empty until `scan` has seen every value."""

    where: str
    entries: dict[str, Entry]
    facts: dict[str, Facts]

    def read(self, name: str) -> Tensor: ...


class StoredWeights:
    """The tensors of one safetensors file. Each read opens the file anew and compares with
    the first pass.

    Args:
        path: absolute path.
        where: how messages name the file.
        entries: what the header says.
        header: sha256 object fed with everything before the first tensor.
        size: size of the file.
    """

    def __init__(
        self, path: str, where: str, entries: dict[str, Entry], header: Hash, size: int
    ) -> None:
        self.path, self.where, self.entries = path, where, entries
        self.facts: dict[str, Facts] = {}
        self.sha256 = ""
        self._header, self._size = header, size

    def __getstate__(self) -> dict[str, object]:
        # of no use after `scan`
        return {name: value for name, value in vars(self).items() if name != "_header"}

    def scan(self, file: RegularFile) -> None:
        """Read every value once, in file order. Fills `facts`, and `sha256` of the whole file."""
        whole = self._header.copy()
        view = memoryview(bytearray(min(CHUNK, max(self._size, 1))))

        def read(start: int, size: int) -> memoryview:
            part = view[:size]
            file.read_into(part, start)
            whole.update(part)
            return part

        def chunks(entry: Entry) -> Iterator[tuple[memoryview, Tensor]]:
            for offset in range(0, entry.size, len(view)):
                part = read(entry.start + offset, min(len(view), entry.size - offset))
                yield part, torch.frombuffer(part, dtype=entry.dtype)

        for group in groups(self.entries):
            if len(group) == 1:
                self.facts[group[0][0]] = measure(chunks(group[0][1]))
            else:
                first, last = group[0][1], group[-1][1]
                part = read(first.start, last.start + last.size - first.start)
                self.facts.update(measure_group(group, part, first))
        self.sha256 = whole.hexdigest()

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of our own.

        Raises:
            InputChangedError: the file is not the one that was loaded.
        """
        entry = self.entries[name]
        try:
            with RegularFile(self.path, self.where) as file:
                if file.size != self._size:
                    raise self._changed(f"the size ({file.size} bytes, was {self._size})")
                data = file.read(entry.start, entry.size)
        except (AdapterFormatError, AdapterSecurityError) as error:
            raise InputChangedError(
                f"{error}; it could be read when the adapter was loaded"
            ) from None
        if hashlib.sha256(data).hexdigest() != self.facts[name].digest:
            raise self._changed(f"tensor {shown(name)}")
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def _changed(self, what: str) -> InputChangedError:
        return InputChangedError(
            f"{self.where}: {what} changed since the adapter was loaded; leave inputs alone during "
            "a merge, load again"
        )


class HeldWeights:
    """Tensors in memory of our own: from a live model, a state dict, or a pickle.

    Args:
        tensors: name -> contiguous CPU tensor that nobody else writes to.
        where: how messages name them.
    """

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.where = where
        self.entries = {
            name: Entry(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in tensors.items()
        }
        self.facts: dict[str, Facts] = {}
        self._tensors = tensors

    def scan(self) -> None:
        """Look at every value once. Fills `facts`."""
        for name, tensor in self._tensors.items():
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            self.facts[name] = measure(iter([(data, tensor.reshape(-1))]))

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()
