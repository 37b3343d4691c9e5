"""Statistics of long anchor passes, kept on disk under a key of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import OutputError
from sapmerge.io.leftovers import alive
from sapmerge.io.locks import lock
from sapmerge.io.system import POSIX

__all__ = ["Cache", "Gathered", "gather"]

_RESULT = re.compile(r"[0-9a-f]{64}\.safetensors")
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

    def files(self) -> list[str]:
        """The names of the results that lie there, sorted."""
        try:
            return sorted(name for name in os.listdir(self._folder) if _RESULT.fullmatch(name))
        except OSError:
            return []

    def key_of(self, name: str) -> str | None:
        """The key of a result by the name of its file; None if it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with cast("Any", safe_open(self._folder / name, "pt")) as file:
                metadata: dict[str, str] = file.metadata() or {}
        except (OSError, SafetensorError):
            return None
        key = metadata.get("key", "")
        return key if self._path(key).name == name else None

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
                if POSIX:  # while it is locked
                    os.replace(scratch, path)
            if not POSIX:  # Windows moves nothing that is open
                os.replace(scratch, path)
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


@dataclass(frozen=True)
class Gathered:
    """What `gather` did, in numbers of results.

    Args:
        copied: were new.
        there: were in the target already.
        damaged: files that cannot be read, and are left where they are.
        different: have other numbers than the target's under the same key, which are kept.
    """

    copied: int
    there: int
    damaged: tuple[str, ...]
    different: tuple[str, ...]


def gather(
    target: str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]], parts: Sequence[str]
) -> Gathered:
    """Copy what caches of other machines have into one; every result is checked as it is read.

    Args:
        target: a folder, made if it does not exist.
        sources: folders of caches.
        parts: folders in a cache that hold results, "" for its top.

    Raises:
        OutputError: a source is no folder, or the target cannot be written.
    """
    copied, there, damaged, different = 0, 0, list[str](), list[str]()
    for source in sources:
        if not os.path.isdir(source):
            raise OutputError(f"the cache {os.fsdecode(source)!r} is no folder")
        for part in parts:
            mine, theirs = Cache(Path(target) / part), Cache(Path(source) / part)
            for name in theirs.files():
                path, key = os.path.join(os.fsdecode(source), part, name), theirs.key_of(name)
                found = None if key is None else theirs.get(key)
                if key is None or found is None:
                    damaged.append(path)
                    continue
                own = mine.get(key)
                if own is None:
                    mine.put(key, *found)
                    copied += 1
                    continue
                there += 1
                same = own[0].keys() == found[0].keys() and own[1] == found[1]
                if not same or not all(torch.equal(own[0][x], found[0][x]) for x in own[0]):
                    different.append(path)
    return Gathered(copied, there, tuple(damaged), tuple(different))


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
