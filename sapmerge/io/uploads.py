"""An upload, in whatever form it came, as the bytes of its two files;
nothing in it is believed yet.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, LimitExceededError, SapmergeError
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, shown
from sapmerge.io.folder import CONFIG, WEIGHTS
from sapmerge.io.header import open_weights
from sapmerge.io.live import config_bytes

__all__ = ["files_of", "stage", "tensors_of", "zipped"]


def files_of(upload: object, most: int) -> tuple[bytes, bytes]:
    """Config and weights of an upload, as bytes of `adapter_config.json` and
    `adapter_model.safetensors`.

    Args:
        upload: a folder, a zip file of the two files as bytes, (config, weights) as bytes, or
            (config, state_dict); a config may also be the JSON text.
        most: bytes that both may have together.

    Raises:
        SapmergeError: it is none of these, it cannot be read, or it is too large.
    """
    if isinstance(upload, (str, os.PathLike)):
        folder = os.fsdecode(cast("str", upload))
        return _within(_read(folder, CONFIG, most), _read(folder, WEIGHTS, most), most)
    if isinstance(upload, (bytes, bytearray)):
        return _unzipped(bytes(upload), most)
    parts = cast("tuple[object, ...]", upload) if isinstance(upload, tuple) else ()
    if len(parts) == 2:
        first, weights = parts
        config = first.encode() if isinstance(first, str) else first
        raw = (
            bytes(config)
            if isinstance(config, (bytes, bytearray))
            else config_bytes(config, "the config")
        )
        if isinstance(weights, (bytes, bytearray)):
            return _within(raw, bytes(weights), most)
        if isinstance(weights, Mapping):
            return _within(raw, _saved(cast("Mapping[object, object]", weights), most), most)
    raise AdapterFormatError(
        "an upload is a folder, the bytes of a zip file, or a pair (config, weights) of bytes or "
        f"(config, state_dict); got {shown(type(cast('object', upload)).__name__)}"
    )


def stage(folder: StagedFolder, config: bytes, weights: bytes) -> None:
    """Write the two files into a staged folder and sync them.

    Raises:
        OutputError: the disk refuses.
    """
    folder.write(CONFIG, config)
    folder.write(WEIGHTS, weights)


def zipped(path: str) -> bytes:
    """The bytes of a zip file.

    Raises:
        AdapterFormatError: it cannot be read.
    """
    with RegularFile(path, f"upload {shown(path)}") as file:
        return bytes(file.read(0, file.size))


def tensors_of(folder: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file, by their names in it.

    Raises:
        SapmergeError: it cannot be read.
    """
    path = os.path.join(folder, WEIGHTS)
    with RegularFile(path, path) as file:
        weights = open_weights(file, path, DEFAULT_LIMITS)
        weights.scan(file)
    return {name: weights.read(name) for name in weights.entries}


def _within(config: bytes, weights: bytes, most: int) -> tuple[bytes, bytes]:
    if len(config) + len(weights) > most:
        raise LimitExceededError(
            f"the upload has {len(config) + len(weights)} bytes; at most {most} are allowed"
        )
    return config, weights


def _read(folder: str, name: str, most: int) -> bytes:
    with RegularFile(os.path.join(folder, name), f"upload {shown(folder)}, {name}") as file:
        if file.size > most:
            raise LimitExceededError(f"{file.where}: {file.size} bytes; at most {most} are allowed")
        return bytes(file.read(0, file.size))


def _unzipped(data: bytes, most: int) -> tuple[bytes, bytes]:
    """The two files of a zip; what a member unpacks to is bounded while it is read."""
    if len(data) > most:
        raise LimitExceededError(f"the upload has {len(data)} bytes; at most {most} are allowed")
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                if member.filename in (CONFIG, WEIGHTS):
                    if member.filename in files:
                        raise AdapterFormatError(
                            f"the zip file of the upload has {member.filename} twice"
                        )
                    with archive.open(member) as file:
                        files[member.filename] = file.read(most + 1)
    except SapmergeError:
        raise
    except Exception as error:  # zipfile raises many kinds on damaged bytes
        raise AdapterFormatError(
            f"the upload is no zip file that can be read ({shown(str(error))})"
        ) from None
    missing = [name for name in (CONFIG, WEIGHTS) if name not in files]
    if missing:
        raise AdapterFormatError(f"the zip file of the upload has no {missing[0]} at its top")
    return _within(files[CONFIG], files[WEIGHTS], most)


def _saved(state: Mapping[object, object], most: int) -> bytes:
    """The bytes that safetensors writes for a state dict."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (
            not isinstance(name, str)
            or not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
        ):
            kind = type(tensor).__name__
            raise AdapterFormatError(
                f"the state dict maps names to dense tensors; got {shown(name)}: {shown(kind)}"
            )
        tensors[name] = tensor
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > most:
        raise LimitExceededError(
            f"the tensors of the upload have {size} bytes; at most {most} are allowed"
        )
    return save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
