"""What an output says about itself: the recipe and the inputs in its metadata, checked against its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sapmerge.errors import AdapterFormatError
from sapmerge.io.adapter import CONFIG, WEIGHTS, Adapter
from sapmerge.io.files import RegularFile, shown
from sapmerge.io.writing import CONFIG_DIGEST_KEY, TENSORS_DIGEST_KEY, digest_of

__all__ = ["Provenance", "read_provenance"]

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Provenance:
    """The metadata of an output of sapmerge.

    Args:
        version: of the library that wrote it.
        recipe: the call: method, weights, scale, rank, base_model, modules_to_save, loss.
        inputs: label, digest, weight, and file name -> sha256 of every adapter that went in.
        problems: what does not agree with the bytes; empty for an intact output.
    """

    version: str
    recipe: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    problems: tuple[str, ...]


def read_provenance(path: str | os.PathLike[str]) -> Provenance:
    """Read an output as any adapter is read, then compare its bytes with the digests in its metadata.

    Raises:
        AdapterFormatError: it was not written by sapmerge.
        SapmergeError: it cannot be read as an adapter at all.
    """
    folder = os.fspath(path)
    files = Adapter.load(folder).files  # whatever is wrong with the files is refused here
    where = f"output {shown(folder)}"
    with RegularFile(os.path.join(folder, WEIGHTS), f"{where}, {WEIGHTS}") as file:
        length = int.from_bytes(file.read(0, 8), "little")
        header = cast("dict[str, Any]", json.loads(bytes(file.read(8, length))))
        metadata = cast("dict[str, str]", header.pop("__metadata__", {}))
        if "sapmerge.recipe" not in metadata:
            raise AdapterFormatError(f"{where}: was not written by sapmerge (its metadata holds no recipe)")
        found = {name: _hash(file, 8 + length, entry["data_offsets"]) for name, entry in header.items()}
    problems: list[str] = []
    if metadata.get(CONFIG_DIGEST_KEY) != files[CONFIG]:
        problems.append(f"{CONFIG} is not the one that was written")
    if metadata.get(TENSORS_DIGEST_KEY) != digest_of(found):
        problems.append(f"the tensors of {WEIGHTS} are not those that were written")
    try:
        recipe, inputs = json.loads(metadata["sapmerge.recipe"]), json.loads(metadata["sapmerge.inputs"])
        labels = [str(entry["label"]) for entry in inputs]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{where}: the recipe in its metadata cannot be read ({shown(str(error))})") from None
    if len(set(labels)) != len(labels):
        problems.append("two inputs have one label")
    return Provenance(metadata.get("sapmerge.version", "?"), recipe, inputs, tuple(problems))


def _hash(file: RegularFile, base: int, offsets: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for start in range(base + offsets[0], base + offsets[1], _CHUNK):
        digest.update(file.read(start, min(_CHUNK, base + offsets[1] - start)))
    return digest.hexdigest()
