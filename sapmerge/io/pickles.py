"""`adapter_model.bin`: the only module that unpickles anything, and only tensors."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, AdapterSecurityError, LimitExceededError
from sapmerge.io.files import HeldWeights, Limits, RegularFile, shown

__all__ = ["held", "open_pickle"]

OLDEST_TORCH = (2, 10)


def open_pickle(file: RegularFile, limits: Limits) -> tuple[HeldWeights, bytes]:
    """The tensors of a `torch.save` archive, and the bytes they came from.

    Raises:
        AdapterSecurityError: the pickle needs more than tensors, or torch is too old to be trusted
            with it.
        LimitExceededError: the archive unpacks to more than the file has bytes.
    """
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise AdapterSecurityError(
            f"{file.where}: torch {torch.__version__} has known holes in weights_only loading; "
            "2.10 or newer is needed to read a .bin file"
        )
    data = bytes(file.read(0, file.size))
    _check_archive(data, file.where)
    try:
        content: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text recommends weights_only=False: never pass it on.
        raise AdapterSecurityError(
            f"{file.where}: the pickle is damaged or asks for more than tensors "
            f"({type(error).__name__}); do not open "
            "it by other means, and ask its author for adapter_model.safetensors"
        ) from None
    if not isinstance(content, Mapping):
        raise AdapterFormatError(
            f"{file.where}: holds a {type(content).__name__}; expected a mapping name -> tensor"
        )
    return held(content, file.where, limits, most=file.size), data  # pyright: ignore[reportUnknownArgumentType]


def _check_archive(data: bytes, where: str) -> None:
    if not data.startswith(b"PK\x03\x04"):
        raise AdapterFormatError(
            f"{where}: is not an archive of torch.save (a zip file); download it again"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError):
        raise AdapterFormatError(f"{where}: the zip archive is damaged or truncated") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise LimitExceededError(
            f"{where}: has compressed members; torch.save writes none, so this may be a zip bomb"
        )
    if sum(member.file_size for member in members) > len(data):
        raise LimitExceededError(f"{where}: unpacks to more than its {len(data)} bytes")


def held(
    tensors: Mapping[object, object], where: str, limits: Limits, most: int | None = None
) -> HeldWeights:
    """Tensors of a mapping as weights of our own, once it is sure that they are plain.

    Args:
        tensors: name -> tensor; anything else is refused.
        where: how messages name them.
        limits: of number and names.
        most: bytes that all of them may need together.
    """
    if len(tensors) > limits.tensors:
        raise LimitExceededError(
            f"{where}: {len(tensors)} tensors; at most {limits.tensors} are read"
        )
    mine: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise AdapterFormatError(f"{where}: the key {shown(name)} is not a tensor name")
        if len(name) > limits.name_length:
            raise LimitExceededError(
                f"{where}: tensor name {shown(name)} is longer than {limits.name_length}"
            )
        if type(tensor) not in (Tensor, torch.nn.Parameter) or not isinstance(tensor, Tensor):
            raise AdapterFormatError(
                f"{where}: {shown(name)} is a {type(tensor).__name__}; expected a tensor"
            )
        if (
            tensor.layout != torch.strided
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.is_nested
        ):
            raise AdapterFormatError(
                f"{where}: tensor {shown(name)} is sparse, quantised or without data"
            )
        total += tensor.numel() * tensor.element_size()
        if most is not None and total > most:
            raise LimitExceededError(
                f"{where}: tensor {shown(name)}: the tensors need more bytes than the file has"
            )
        copied = tensor.detach().to(device="cpu").contiguous()
        # What was loaded from a file is ours already; what a caller handed over may change later.
        mine[name] = (
            copied.clone() if most is None and copied.data_ptr() == tensor.data_ptr() else copied
        )
    return HeldWeights(mine, where)
