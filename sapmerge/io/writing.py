"""Writes a PEFT checkpoint folder: tensors are streamed to disk, then everything appears at once.

The safetensors header stands first in the file and is known last. So tensors go to a scratch file
as they come, and `commit` copies them behind the header, widest items first and then by name: every
offset is a multiple of the item size without holes,
and the bytes do not depend on the order of the calls.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from typing_extensions import Self

from sapmerge.core.linalg import finite
from sapmerge.errors import NonFiniteError, OutputError
from sapmerge.io.atomic import StagedFolder, explained, write_all
from sapmerge.io.outputs import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from sapmerge.io.system import read_at

__all__ = [
    "CONFIG_DIGEST_KEY",
    "CheckpointWriter",
    "OUTPUT_DTYPES",
    "TENSORS_DIGEST_KEY",
    "digest_of",
]

CONFIG_DIGEST_KEY, TENSORS_DIGEST_KEY = "sapmerge.config_sha256", "sapmerge.tensors_sha256"
_SCRATCH_NAME = "tensors.tmp"
_MAX_HEADER = 100_000_000  # the format's readers refuse more
_COPY_CHUNK = 1 << 22
OUTPUT_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What all of an output can be asked to be stored in, by name."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Stored(NamedTuple):
    """A tensor in the scratch file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    digest: str


class CheckpointWriter:
    """Writes one PEFT checkpoint folder, whole or not at all.

    Args:
        path: the folder to write; its parent must exist.
        overwrite: replace an existing checkpoint (or an empty folder), whole.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false.
        OutputError: `path` cannot be an output (a file, a symlink, a folder without
            `adapter_config.json`).

    Example:
        >>> with CheckpointWriter("out") as writer:
        ...     writer.add("base_model.model.fc.lora_A.weight", torch.zeros(2, 4))
        ...     writer.commit(config={"peft_type": "LORA"}, metadata={}, card="# An adapter")
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self._folder = StagedFolder(path, overwrite=overwrite)
        self._scratch = -1  # the scratch file while the writer is open, else -1
        self._size = 0
        self._stored: dict[str, _Stored] = {}

    def __enter__(self) -> Self:
        self._folder.__enter__()
        try:
            with explained(self._folder.path, "create a scratch file"):
                self._scratch = self._folder.create(_SCRATCH_NAME)
        except BaseException:
            self._folder.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        scratch, self._scratch = self._scratch, -1
        try:
            if scratch >= 0:
                os.close(scratch)
        except OSError:
            pass  # what is closed here is thrown away
        finally:
            self._folder.__exit__()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Streams one tensor to disk; its memory can be freed afterwards.

        Raises:
            NonFiniteError: the tensor holds a NaN or an infinity.
            OutputError: the name is taken or cannot be stored, the dtype is not supported,
                or the disk refuses.
        """
        self._require_open()
        if not name or name == "__metadata__":
            raise OutputError(f"{self._folder.path!r}: {name!r} cannot be the name of a tensor")
        self._encode(name, "a tensor name")
        if name in self._stored:
            raise OutputError(f"{self._folder.path!r}: tensor {name!r} was added twice")
        if tensor.dtype not in _DTYPES:
            raise OutputError(
                f"{self._folder.path!r}: tensor {name!r} has the unsupported dtype {tensor.dtype}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if not finite(flat):
            count = int((~torch.isfinite(flat)).sum())
            raise NonFiniteError(
                f"{self._folder.path!r}: tensor {name!r} has {count} NaN or infinite values of "
                f"{flat.numel()}; nothing is written"
            )
        data = flat.view(torch.uint8).numpy().data
        with explained(self._folder.path, f"write tensor {name!r}"):
            write_all(self._scratch, data, self._size)
        digest = hashlib.sha256(data).hexdigest()
        self._stored[name] = _Stored(
            tensor.dtype, tuple(tensor.shape), self._size, data.nbytes, digest
        )
        self._size += data.nbytes

    def widen(self, name: str, dim: int, rank: int, wanted: int) -> None:
        """Pads a factor that was added with zeros, from one rank to a larger one.

        Args:
            dim: where the rank is: 0 in A, where it may be in several blocks below each other, 1 in
                B.
            rank: of the factor as it is.
            wanted: rank that it gets.
        """
        self._require_open()
        stored = self._stored.pop(name)
        with explained(self._folder.path, f"read tensor {name!r} again"):
            data = bytearray(read_at(self._scratch, stored.size, stored.start))
        outer = stored.shape[0] // rank if dim == 0 else stored.shape[0]
        factor = torch.frombuffer(data, dtype=stored.dtype).reshape(outer, rank, -1)
        padded = torch.cat([factor, factor.new_zeros(outer, wanted - rank, factor.shape[2])], 1)
        shape = list(stored.shape)
        shape[dim] = shape[dim] // rank * wanted
        self.add(name, padded.reshape(shape))

    def commit(
        self,
        *,
        config: Mapping[str, object],
        metadata: Mapping[str, str],
        card: str,
        check: Callable[[str], object] | None = None,
    ) -> None:
        """Writes the remaining files and puts the folder in place.

        Args:
            config: content of `adapter_config.json`.
            metadata: of the safetensors file; "format" and the sha256 of the config file and of the
                tensors are added.
            card: content of `README.md`.
            check: looks at the whole folder before it is put in place, and may refuse it.

        Raises:
            OutputExistsError: an output appeared meanwhile and `overwrite` is false.
            OutputError: an argument cannot be stored, or the disk refuses;
                an old output is as it was.
        """
        self._require_open()
        try:
            text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise OutputError(f"{self._folder.path!r}: the config is not JSON: {error}") from error
        files = {CONFIG_NAME: text.encode("ascii"), CARD_NAME: self._encode(card, CARD_NAME)}
        digest = hashlib.sha256(files[CONFIG_NAME]).hexdigest()
        tensors = digest_of({name: stored.digest for name, stored in self._stored.items()})
        self._write_tensors(
            {**metadata, "format": "pt", CONFIG_DIGEST_KEY: digest, TENSORS_DIGEST_KEY: tensors}
        )
        for name, content in files.items():
            self._folder.write(name, content)
        if check is not None:
            check(self._folder.staged)
        self._folder.publish()

    def withdraw(self) -> None:
        """Remove what `commit` has put in place, unless it replaced something, and what an
        interrupted exit has left. It may be called again.
        """
        self.__exit__()
        self._folder.withdraw()

    def _write_tensors(self, metadata: Mapping[str, str]) -> None:
        ordered = sorted(self._stored.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        header = self._header(ordered, metadata)
        with explained(self._folder.path, f"write {TENSORS_NAME}"):
            file = self._folder.create(TENSORS_NAME)
            try:
                write_all(file, header, 0)
                position = len(header)
                for _, stored in ordered:
                    _copy(self._scratch, stored.start, file, position, stored.size)
                    position += stored.size
                os.fsync(file)
            finally:
                os.close(file)
            scratch, self._scratch = self._scratch, -1
            os.close(scratch)
            self._folder.unlink(_SCRATCH_NAME)

    def _header(self, ordered: list[tuple[str, _Stored]], metadata: Mapping[str, str]) -> bytes:
        for key, value in metadata.items():
            self._encode(key, "a metadata key")
            self._encode(value, f"metadata {key!r}")
        content: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        end = 0
        for name, stored in ordered:
            start, end = end, end + stored.size
            content[name] = {
                "dtype": _DTYPES[stored.dtype],
                "shape": stored.shape,
                "data_offsets": (start, end),
            }
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        if len(header) > _MAX_HEADER:
            raise OutputError(
                f"{self._folder.path!r}: the safetensors header would take {len(header)} bytes, "
                "above the format's "
                f"limit of {_MAX_HEADER}; shorten the metadata or write fewer tensors"
            )
        return len(header).to_bytes(8, "little") + header

    def _encode(self, text: str, what: str) -> bytes:
        try:
            return text.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise OutputError(
                f"{self._folder.path!r}: {what} is not UTF-8 text: {text!r:.200}"
            ) from error

    def _require_open(self) -> None:
        if self._scratch < 0:
            raise OutputError(
                f"{self._folder.path!r}: the writer is not open; use it in a with block, and "
                "commit once"
            )


def digest_of(tensors: Mapping[str, str]) -> str:
    """One sha256 for a set of tensors: over the lines "name sha256-of-its-bytes", sorted."""
    lines = [f"{name} {digest}" for name, digest in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _copy(source: int, start: int, target: int, position: int, size: int) -> None:
    done = 0
    while done < size:
        chunk = read_at(source, min(_COPY_CHUNK, size - done), start + done)
        if not chunk:
            raise OSError(errno.EIO, "the scratch file was truncated")
        write_all(target, chunk, position + done)
        done += len(chunk)
