"""Values of tensors that are about to be overwritten:
in memory while they are few, in a temporary file beyond.
"""

from __future__ import annotations

import tempfile
from typing import BinaryIO, cast

import torch
from torch import Tensor

from sapmerge.errors import OutputError
from sapmerge.io.system import read_at, write_at

__all__ = ["HeldValues"]

_IN_MEMORY, _CHUNK = 32 << 20, 1 << 26  # bytes


class HeldValues:
    """Remembers tensors, and puts their values back.

    The file has no name and is gone with the process. It lies in `tempfile.gettempdir()` (TMPDIR),
    and is as large as all the tensors together.
    """

    def __init__(self, in_memory: int = _IN_MEMORY) -> None:
        self._left = in_memory
        self._held: list[
            tuple[Tensor, Tensor | int]
        ] = []  # a tensor, and its value or where that is in the file
        self._file: BinaryIO | None = None
        self._size = 0

    def keep(self, tensor: Tensor) -> None:
        """Remember the value that a tensor has now.

        Raises:
            OutputError: the temporary file cannot be written.
        """
        if tensor.nbytes <= self._left:
            self._held.append((tensor, tensor.detach().clone()))
            self._left -= tensor.nbytes
            return
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            if self._file is None:
                self._file = cast("BinaryIO", tempfile.TemporaryFile(prefix="sapmerge-"))  # noqa: SIM115
            done = 0
            while done < raw.nbytes:
                some = raw.data[done : done + _CHUNK]
                done += write_at(self._file.fileno(), some, self._size + done)
        except OSError as error:
            raise OutputError(
                "the weights that are to change cannot be kept in a temporary file in "
                f"{tempfile.gettempdir()!r}: {error.strerror or error}; set TMPDIR to a folder "
                f"with {raw.nbytes >> 20} MB and more to spare"
            ) from error
        self._held.append((tensor, self._size))
        self._size += raw.nbytes

    def put_back(self) -> None:
        """Give all tensors the values that they had, the last one first; it may run twice."""
        with torch.no_grad():
            for tensor, value in reversed(self._held):
                tensor.copy_(value if isinstance(value, Tensor) else self._read(value, tensor))

    def close(self) -> None:
        """Forget everything."""
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def _read(self, start: int, like: Tensor) -> Tensor:
        assert self._file is not None
        raw = bytearray(like.nbytes)
        view, done = memoryview(raw), 0
        while done < len(view):
            read = read_at(self._file.fileno(), min(_CHUNK, len(view) - done), start + done)
            if not read:
                raise OutputError(
                    "the temporary file with the weights was truncated: the model is damaged, load "
                    "it again"
                )
            view[done : done + len(read)] = read
            done += len(read)
        return torch.frombuffer(raw, dtype=like.dtype).reshape(like.shape)
