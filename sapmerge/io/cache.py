"""Statistics of long anchor passes, kept on disk under a key of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import OutputError

__all__ = ["Cache"]


class Cache:
    """A folder of results; a result is written whole or not at all, and a damaged one is computed again.

    Args:
        folder: is made if it does not exist. Only your own: what lies there is believed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)

    def get(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and notes kept under a key; None if there are none, or if the file is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with cast("Any", safe_open(path, "pt")) as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("key") != key or metadata.get("digest") != _digest(tensors):
                return None
            return tensors, json.loads(metadata["notes"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep tensors and notes (JSON) under a key.

        Raises:
            OutputError: the folder cannot be written.
        """
        from safetensors.torch import save

        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"key": key, "digest": _digest(held), "notes": json.dumps(notes)}
        path = self._path(key)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(scratch, "wb") as file:
                file.write(save(held, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except OSError as error:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise OutputError(f"cannot write to the cache {str(self._folder)!r}: {error}") from error

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
