"""The header of a safetensors file: a strict reader that believes nothing it has not checked.

safetensors accepts what this reader accepts; the opposite does not hold (names that are there
twice, for one).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from json.decoder import scanstring  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
from typing import cast

import torch

from sapmerge.errors import AdapterFormatError, LimitExceededError
from sapmerge.io.files import Limits, RegularFile, StoredWeights, shown
from sapmerge.io.measuring import Entry

__all__ = ["UNGATHERED", "open_weights"]

UNGATHERED = (
    ". Saved under DeepSpeed ZeRO-3 or FSDP without gathering the parameters? Set "
    "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py, and save again"
)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


# The grammar of a header is so small that it is cheaper to walk it than to build what a stranger
# nested into it.
_SPACE = re.compile(r"[ \t\n\r]*")
_BLANKS = (" ", "\t", "\n", "\r")
_FIELD = re.compile(
    r'[ \t\n\r]*"(dtype|shape|data_offsets)"[ \t\n\r]*:[ \t\n\r]*'
    r'(?:"([A-Z0-9_]{1,16})"|\[[ \t\n\r]*((?:0|[1-9][0-9]{0,18})(?:[ \t\n\r]*,[ '
    r"\t\n\r]*(?:0|[1-9][0-9]{0,18})){0,15})?"
    r"[ \t\n\r]*\])[ \t\n\r]*([,}])"
)
# The same in the one order and spacing that safetensors writes: one step instead of many.
_WRITTEN = re.compile(
    r'\{"dtype": ?"([A-Z0-9_]{1,16})", ?"shape": ?\[((?:0|[1-9][0-9]{0,18})(?:, '
    r"?(?:0|[1-9][0-9]{0,18})){0,15})?\], ?"
    r'"data_offsets": ?\[(0|[1-9][0-9]{0,18}), ?(0|[1-9][0-9]{0,18})\]\}'
)
# Text that is not ASCII takes up to four times its bytes in memory; a header has no use for much of
# it.
_LARGE = 1 << 24


def open_weights(file: RegularFile, path: str, limits: Limits) -> StoredWeights:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        AdapterFormatError: anything but a complete and unambiguous safetensors file.
        LimitExceededError: header, number of tensors or a name above the limits.
    """
    head = file.read(0, min(file.size, 512))
    length = int.from_bytes(head[:8], "little") if len(head) >= 8 else 0
    if len(head) < 10 or length > file.size - 8 or head[8] != ord("{"):
        raise AdapterFormatError(f"{file.where}: {_what_it_is(bytes(head), length, file.size)}")
    if length > limits.header_bytes:
        raise LimitExceededError(
            f"{file.where}: the header has {length} bytes; at most {limits.header_bytes} are read"
        )
    raw = file.read(0, 8 + length)
    digest = hashlib.sha256(raw)
    if length > _LARGE and (b"\\" in raw or not raw[8:].isascii()):
        raise LimitExceededError(
            f"{file.where}: the header has {length} bytes and is not plain ASCII"
        )
    try:
        text = str(memoryview(raw)[8:], "utf-8", "strict")
    except UnicodeDecodeError:
        raise AdapterFormatError(f"{file.where}: the header is not UTF-8") from None
    del raw
    base = 8 + length
    entries = dict(_walk(text, base, file.where, limits))
    _check_offsets(entries, base, file)
    return StoredWeights(path, file.where, entries, digest, file.size)


def _what_it_is(head: bytes, length: int, size: int) -> str:
    """Why these first bytes are no safetensors file; the commonest causes get their own words."""
    lowered = head.lstrip().lower()
    if size == 0:
        return "the file is empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return (
            "is a Git LFS pointer, not the weights; run `git lfs pull`, or download the file itself"
        )
    if lowered.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is an HTML page, not weights; the download failed or needs a login"
    if head.startswith(b"PK\x03\x04"):
        return (
            "is a zip archive (torch.save writes those), not safetensors; save the weights as "
            "safetensors"
        )
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "is a pickle, not safetensors; save the weights as safetensors"
    if size < 10:
        return f"has {size} bytes, too few for a safetensors header"
    if length > size - 8:
        return (
            f"the header says {length} bytes but {size - 8} follow: truncated, or not a "
            "safetensors file"
        )
    return "the header does not begin with '{': not a safetensors file"


def _walk(text: str, base: int, where: str, limits: Limits) -> Iterator[tuple[str, Entry]]:
    """Every (name, entry) of a header, or an error at the first character that does
    not belong there.
    """
    seen: set[str] = set()
    at = _skip(text, 1)
    if text[at : at + 1] == "}":
        at += 1
    else:
        while True:
            name, at = _string(text, at, where)
            if len(name) > limits.name_length:
                raise LimitExceededError(
                    f"{where}: tensor name {shown(name)} has {len(name)} characters; at most "
                    f"{limits.name_length}"
                )
            if name in seen:
                raise AdapterFormatError(f"{where}: tensor {shown(name)} is a duplicate")
            if len(seen) >= limits.tensors:
                raise LimitExceededError(f"{where}: more than {limits.tensors} tensors")
            seen.add(name)
            at = _expect(text, at, ":", where)
            if name == "__metadata__":
                at = _metadata(text, _skip(text, at), where)
            else:
                entry, at = _entry(text, _skip(text, at), base, name, where)
                yield name, entry
            at = _skip(text, at)
            if text[at : at + 1] == "}":
                at += 1
                break
            at = _skip(text, _expect(text, at, ",", where))
    if _skip(text, at) != len(text):
        raise _garbled(text, at, where)


def _skip(text: str, at: int) -> int:
    if text[at : at + 1] not in _BLANKS:
        return at
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, mark: str, where: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != mark:
        raise _garbled(text, at, where)
    return at + 1


def _garbled(text: str, at: int, where: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"{where}: the header is not valid at character {at}: {shown(text[at : at + 40])}"
    )


def _string(text: str, at: int, where: str) -> tuple[str, int]:
    if text[at : at + 1] != '"':
        raise _garbled(text, at, where)
    try:
        return cast("tuple[str, int]", scanstring(text, at + 1, True))
    except ValueError:
        raise _garbled(text, at, where) from None


def _metadata(text: str, at: int, where: str) -> int:
    """Skip {str: str}; nothing in it is used."""
    at = _expect(text, at, "{", where)
    at = _skip(text, at)
    if text[at : at + 1] == "}":
        return at + 1
    while True:
        _, at = _string(text, at, where)
        _, at = _string(text, _skip(text, _expect(text, at, ":", where)), where)
        at = _skip(text, at)
        if text[at : at + 1] == "}":
            return at + 1
        at = _skip(text, _expect(text, at, ",", where))


def _entry(text: str, at: int, base: int, name: str, where: str) -> tuple[Entry, int]:
    """One {"dtype": ..., "shape": [...], "data_offsets":
    [begin, end]}, in any order of the three.
    """
    written = _WRITTEN.match(text, at)
    if written is not None:
        dtype, sizes, begin, end = written.groups()
        return _checked(
            dtype, _numbers(sizes), (int(begin), int(end)), base, name, where
        ), written.end()
    if text[at : at + 1] != "{":
        excerpt = shown(text[at : at + 60])
        raise AdapterFormatError(
            f"{where}: tensor {shown(name)}: expected an object, found {excerpt}"
        )
    at += 1
    word: dict[str, str] = {}
    numbers: dict[str, tuple[int, ...]] = {}
    for count in range(1, 4):
        match = _FIELD.match(text, at)
        if match is None or (match[4] == "}") != (count == 3):
            raise AdapterFormatError(
                f"{where}: tensor {shown(name)}: expected exactly dtype, shape (at most 16 sizes) "
                f"and data_offsets, found {shown(text[at : at + 60])}"
            )
        at = match.end()
        if match[2] is not None:
            word[match[1]] = match[2]
        else:
            numbers[match[1]] = _numbers(match[3])
    if (
        set(word) != {"dtype"}
        or set(numbers) != {"shape", "data_offsets"}
        or len(numbers["data_offsets"]) != 2
    ):
        raise AdapterFormatError(
            f"{where}: tensor {shown(name)}: dtype, shape or data_offsets is missing or garbled"
        )
    return _checked(word["dtype"], numbers["shape"], numbers["data_offsets"], base, name, where), at


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _checked(
    found: str, shape: tuple[int, ...], offsets: tuple[int, ...], base: int, name: str, where: str
) -> Entry:
    """An entry whose dtype is known and whose offsets fit its shape."""
    dtype = DTYPES.get(found)
    if dtype is None:
        raise AdapterFormatError(
            f"{where}: tensor {shown(name)} has dtype {found!r}; expected F32, F16 or BF16"
        )
    if 0 in shape:
        raise AdapterFormatError(
            f"{where}: tensor {shown(name)} is empty: shape {shape}{UNGATHERED}"
        )
    begin, end = offsets
    needed = math.prod(shape) * _SIZES[found]
    if end - begin != needed:
        raise AdapterFormatError(
            f"{where}: tensor {shown(name)}: shape {shape} of {found} needs {needed} bytes, "
            f"data_offsets {begin}..{end} give {end - begin}"
        )
    return Entry(dtype, shape, base + begin, needed)


def _check_offsets(entries: Mapping[str, Entry], base: int, file: RegularFile) -> None:
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != at:
            problem = (
                "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
            )
            raise AdapterFormatError(
                f"{file.where}: tensor {shown(name)} {problem} (at {entry.start}, expected {at})"
            )
        at += entry.size
    if at != file.size:
        problem = "truncated" if at > file.size else "bytes after the last tensor"
        raise AdapterFormatError(
            f"{file.where}: {file.size} bytes, the tensors end at {at}: {problem}"
        )
