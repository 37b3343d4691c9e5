"""A full model written from the folder of its base: shard by shard, memory of one tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import torch
from torch import Tensor

from sapmerge.errors import OutputError
from sapmerge.io.atomic import StagedFolder, explained, write_all
from sapmerge.io.base_folder import BaseFolder
from sapmerge.io.files import RegularFile

__all__ = ["write_model"]

_WEIGHTS = re.compile(r".*(?:\.bin|\.safetensors|\.gguf|\.pth?|\.h5|\.msgpack|pytorch_model.*)")
_SMALL = 256 << 20


def write_model(
    base: BaseFolder,
    path: str | os.PathLike[str],
    moved: Callable[[str, Tensor], Tensor],
    record: str,
) -> None:
    """Every shard of a base with its tensors changed, and what lies beside it (configs,
    tokenizer) as it is.

    Args:
        base: the base's folder; names, dtypes and shapes of the output are its own.
        path: the folder to write, which must not exist.
        moved: (name, tensor) -> the tensor to write.
        record: content of `sapmerge.json`.

    Raises:
        OutputExistsError, OutputError: the output cannot be written; nothing is left of it.
    """
    if os.path.realpath(base.path) == os.path.realpath(path):
        raise OutputError(f"the output {os.fspath(path)!r} is the base; write to another folder")
    with StagedFolder(path, overwrite=False) as folder:
        for shard, weights in base.shards.items():
            ordered = sorted(weights.entries.items(), key=lambda item: item[1].start)
            with RegularFile(weights.path, weights.where) as source:
                head = source.read(0, ordered[0][1].start)
            with explained(folder.path, f"write {shard}"):
                file = folder.create(shard)
                try:
                    write_all(file, bytes(head), 0)
                    for name, entry in ordered:
                        tensor = moved(name, base.raw(name)).to(entry.dtype).contiguous()
                        write_all(
                            file, tensor.reshape(-1).view(torch.uint8).numpy().data, entry.start
                        )
                    os.fsync(file)
                finally:
                    os.close(file)
        for name in sorted(os.listdir(base.path)):
            beside = os.path.join(base.path, name)
            if (
                os.path.isfile(beside)
                and not _WEIGHTS.fullmatch(name)
                and os.path.getsize(beside) <= _SMALL
            ):
                with RegularFile(beside, beside) as source:
                    folder.write(name, bytes(source.read(0, source.size)))
        folder.write("sapmerge.json", record.encode())
        folder.publish()
