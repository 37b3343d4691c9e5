"""A full model written from the folder of its base: shard by shard, memory of one tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from sapmerge.core.linalg import finite
from sapmerge.core.undo import Undo
from sapmerge.errors import NonFiniteError, OutputError, SapmergeError
from sapmerge.io.atomic import StagedFolder, explained, write_all
from sapmerge.io.base_folder import LARGE, BaseFolder
from sapmerge.io.files import RegularFile, shown
from sapmerge.io.outputs import Kind
from sapmerge.io.strict_json import parse

__all__ = ["write_model"]

RECORD = "sapmerge.json"
# Weights in other formats are not the merged ones, and an adapter in the folder of a model would be
# loaded on top of it.
_LEFT_OUT = re.compile(
    r".*(?:\.bin|\.safetensors|\.gguf|\.pth?|\.h5|\.msgpack|\.onnx|pytorch_model.*)"
    r"|adapter_config\.json|sapmerge\.json"
)
_SMALL = 256 << 20


def write_model(
    base: BaseFolder,
    path: str | os.PathLike[str],
    moved: Mapping[str, Callable[[Tensor], Tensor]],
    record: Mapping[str, object],
    *,
    overwrite: bool,
    undo: Undo,
) -> None:
    """Every shard of a base with some tensors changed, and what lies beside it (configs,
    tokenizer) as it is.

    Args:
        base: the base's folder; names, dtypes and shapes of the output are its own.
        path: the folder to write.
        moved: name -> what makes the new tensor of the old one.
        record: content of `sapmerge.json`; the sha256 of every other file is added.
        overwrite: replace an earlier merged model.
        undo: is told how to take the output back.

    Raises:
        OutputExistsError, OutputError: the output cannot be written; nothing is left of it.
        NonFiniteError: a new tensor is not finite in the dtype of the base.
    """
    digests: dict[str, str] = {}
    folder = StagedFolder(path, overwrite=overwrite, kind=_MODEL)
    undo.add(folder.withdraw)
    with folder:
        for shard in base.shards:
            digests[shard] = _write_shard(base, shard, folder, moved)
        for name in sorted(set(os.listdir(base.path)) - set(digests)):
            beside = os.path.join(base.path, name)
            if (
                os.path.isfile(beside)
                and not _LEFT_OUT.fullmatch(name)
                and os.path.getsize(beside) <= _SMALL
            ):
                with RegularFile(beside, beside) as source:
                    content = bytes(source.read(0, source.size))
                folder.write(name, content)
                digests[name] = hashlib.sha256(content).hexdigest()
        text = json.dumps({**record, "files": digests}, indent=2, sort_keys=True) + "\n"
        folder.write(RECORD, text.encode())
        _check(base, folder.staged, digests)
        folder.publish()


def _write_shard(
    base: BaseFolder,
    shard: str,
    folder: StagedFolder,
    moved: Mapping[str, Callable[[Tensor], Tensor]],
) -> str:
    """One file, its header as it is, then tensor by tensor; the sha256 of what was written."""
    weights, whole = base.shards[shard], hashlib.sha256()
    ordered = sorted(weights.entries.items(), key=lambda item: (item[1].start, item[1].size))
    with RegularFile(weights.path, weights.where) as source:
        head = bytes(source.read(0, ordered[0][1].start if ordered else source.size))
    file = -1
    try:
        with explained(folder.path, f"write {shard}"):
            file = folder.create(shard)
            write_all(file, head, 0)
        whole.update(head)
        for name, entry in ordered:
            tensor = base.raw(name)
            if name in moved:
                tensor = moved[name](tensor).to(entry.dtype).contiguous()
                if not finite(tensor):
                    raise NonFiniteError(
                        f"{folder.path!r}: the merged weight {shown(name)} is not finite in "
                        f"{entry.dtype}; nothing is written"
                    )
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            with explained(folder.path, f"write tensor {shown(name)}"):
                write_all(file, data, entry.start)
            whole.update(data)
        with explained(folder.path, f"write {shard}"):
            os.fsync(file)
    finally:
        if file >= 0:
            os.close(file)
    return whole.hexdigest()


def _check(base: BaseFolder, staged: str, digests: Mapping[str, str]) -> None:
    """Refuse an output that its reader would refuse, or that does not hold what was written."""
    again = BaseFolder(staged)
    if again.entries != base.entries:
        raise OutputError("the output does not have the tensors of its base; nothing is written")
    for name in base.shards:
        with RegularFile(os.path.join(staged, name), f"the output, {name}") as file:
            whole = hashlib.sha256()
            for start in range(0, file.size, 1 << 22):
                whole.update(file.read(start, min(1 << 22, file.size - start)))
        if whole.hexdigest() != digests[name]:
            raise OutputError(f"{name} does not hold what was written to it; nothing is written")


def _of_a_model(folder: str) -> Collection[str]:
    """The files that an earlier output says it consists of; none if it says nothing."""
    where = f"the output, {RECORD}"
    try:
        with RegularFile(os.path.join(folder, RECORD), where) as file:
            files = parse(bytes(file.read(0, file.size)), where, LARGE).get("files")
    except SapmergeError:
        return ()
    return {RECORD, *cast("dict[str, object]", files)} if isinstance(files, dict) else ()


_MODEL = Kind("a merged model", RECORD, _of_a_model)
