"""Statistics of long anchor passes, kept on disk under a key of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import OutputError
from sapmerge.io.leftovers import alive
from sapmerge.io.locks import lock

__all__ = ["Cache"]

_SCRATCH = re.compile(r"\.[0-9a-f]{64}\.safetensors\.(\d{1,9})(-[0-9a-f]{8})?\.tmp")
_ATTEMPTS = 100


class Cache:
    """A folder of results; a result is written whole or not at all,
    and a damaged one is computed again.

    Args:
        folder: is made if it does not exist. Only your own: what lies there is believed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(os.path.abspath(folder))  # the working folder may be another one later
        _sweep(self._folder)

    def get(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and notes kept under a key; None if there are none,
        or if the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with cast("Any", safe_open(path, "pt")) as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata: dict[str, str] = file.metadata() or {}
            notes = metadata["notes"]
            if metadata.get("key") != key or metadata.get("digest") != _digest(key, tensors, notes):
                return None
            return tensors, json.loads(notes)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep tensors and notes (JSON) under a key.

        Raises:
            OutputError: the folder cannot be written.
        """
        from safetensors.torch import save

        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(notes)
        data = save(held, {"key": key, "digest": _digest(key, held, text), "notes": text})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for attempt in range(_ATTEMPTS):
                try:
                    return self._write(self._path(key), data)
                except FileNotFoundError:  # swept by another computer before it was locked
                    if attempt == _ATTEMPTS - 1:
                        raise
        except OSError as error:
            raise OutputError(
                f"cannot write to the cache {str(self._folder)!r}: {error}"
            ) from error

    def _write(self, path: Path, data: bytes) -> None:
        """One file, whole or not at all; a name of its own for every writer,
        also for those of one process.
        """
        scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(scratch, "xb") as file:
                # tells other computers that somebody writes here; not all have locks
                with suppress(OSError):
                    lock(file.fileno(), wait=False)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(scratch, path)
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _digest(key: str, tensors: Mapping[str, Tensor], notes: str) -> str:
    """Of all that is kept, so that no digit of it can change unseen."""
    hasher = hashlib.sha256(json.dumps([key, notes]).encode())
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what killed writers have left: files of processes that are gone,
    and that nobody has locked.
    """
    with suppress(OSError):
        for entry in os.listdir(folder):
            match = _SCRATCH.fullmatch(entry)
            if match and not alive(int(match[1])):
                with suppress(OSError), open(folder / entry, "rb") as file:
                    lock(file.fileno(), wait=False)
                    os.unlink(folder / entry)
