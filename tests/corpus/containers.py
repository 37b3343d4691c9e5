"""Files that are no safetensors file, or one that means two things."""

# ruff: noqa: E501  a case per line

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

from .build import (
    PREFIX,
    QA,
    WEIGHTS,
    Case,
    accept,
    container,
    data_of,
    files,
    good_tensors,
    header_of,
    raw,
    refuse,
    stored,
    write,
)

GOOD = good_tensors()
HEADER, DATA = header_of(GOOD), data_of(GOOD)
TEXT = json.dumps(HEADER, separators=(",", ":"))
WHOLE = container(TEXT, DATA)
LAST = list(GOOD)[-1]


def entry(name: str, **changes: object) -> bytes:
    """The good file with one entry of its header changed."""
    table: dict[str, Any] = json.loads(TEXT)
    table[name] = {key: value for key, value in (table[name] | changes).items() if value is not ...}
    return container(table, DATA)


def sparse(size: int, claimed: int) -> Any:
    def build(folder: Path) -> None:
        write(folder, weights=...)
        with open(folder / WEIGHTS, "wb") as file:
            file.write(struct.pack("<Q", claimed) + b"{")
            file.truncate(size)

    return build


def many_empty(folder: Path) -> None:
    names = ",".join(
        f'"{PREFIX}x{i}.lora_A.weight":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        for i in range(100_000)
    )
    write(folder, weights=container("{" + names + "}"))


def many_names(count: int) -> Any:
    def build(folder: Path) -> None:
        names = ",".join(
            f'"x{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
            for i in range(count)
        )
        write(folder, weights=container("{" + names + "}", bytes(count)))

    return build


def alphabets(folder: Path) -> None:
    write(
        folder,
        weights=container(
            '{"__metadata__":{"a":"' + "\U0001f600" * 5_000_000 + '"},' + TEXT[1:], DATA
        ),
    )


def escapes(folder: Path) -> None:
    write(
        folder,
        weights=container(
            '{"__metadata__":{"a":"' + "a" * 20_000_000 + '\\ud83d\\ude00"},' + TEXT[1:], DATA
        ),
    )


def lots(folder: Path) -> None:
    write(
        folder,
        weights=container('{"__metadata__":{"a":"' + "a" * 20_000_000 + '"},' + TEXT[1:], DATA),
    )


def bad(name: str, weights: bytes, *words: str) -> Case:
    return refuse("container", name, files(weights=weights), WEIGHTS, *words)


def padded(text: str, size: int) -> bytes:
    return container(text + " " * (size - len(text)), DATA)


SMALL = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
SWAPPED = [entry["data_offsets"] for entry in HEADER.values()]
CASES = [
    bad("empty", b"", "empty"),
    bad("one byte", b"\0", "bytes"),
    bad("seven bytes", b"1234567", "bytes"),
    bad("eight bytes", struct.pack("<Q", 0), "bytes"),
    bad("truncated by one", WHOLE[:-1], "truncated"),
    bad("truncated by half", WHOLE[: len(WHOLE) // 2], "truncated"),
    bad("truncated in the header", WHOLE[:100], "header"),
    bad("trailing byte", WHOLE + b"\0", "after the last"),
    bad("trailing copy of itself", WHOLE + WHOLE, "after the last"),
    bad("trailing zip archive", WHOLE + b"PK\x05\x06" + bytes(18), "after the last"),
    bad("offsets beyond the end", entry(LAST, data_offsets=[10**6, 10**6 + 128]), LAST, "leaves a "
                                                                                        "hole"),
    bad("header longer than the file", struct.pack("<Q", 10**5) + TEXT.encode(), "header"),
    bad("header of 2^64-1", struct.pack("<Q", 2**64 - 1) + TEXT.encode() + DATA, "header"),
    bad("header of 2^63", struct.pack("<Q", 2**63) + TEXT.encode() + DATA, "header"),
    bad("header length zero", struct.pack("<Q", 0) + TEXT.encode() + DATA, "header"),
    refuse("container", "header of 200 MB, sparse", sparse(200_000_008, 200_000_000), WEIGHTS, "header", "header has"),
    refuse("container", "header of 200 MB, claimed", sparse(1000, 200_000_000), WEIGHTS, "header"),
    refuse("container", "header of 90 MB of zeros", sparse(90_000_008, 90_000_000), WEIGHTS, "header"),
    bad("git lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize "
                           b"12345\n", "LFS"),
    bad("html page", b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>", "HTML"),
    bad("html page in small letters", b"\n <html>" + b" " * 80 + b"</html>", "HTML"),
    bad("xml error page", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML"),
    bad("json error", b'{"error":"Repository not found"}', "safetensors"),
    bad("pickle", pickle.dumps({QA: [1.0]}), "pickle"),
    bad("zip of torch.save", b"PK\x03\x04" + bytes(60), "zip"),
    bad("random bytes", bytes(range(7, 207)), "header"),
    bad("gguf", b"GGUF" + bytes(100), "header"),
    bad("header is a list", container([HEADER], DATA), "'{'"),
    bad("header is null", container("null      ", DATA), "'{'"),
    bad("header begins with a space", container(" " + TEXT, DATA), "'{'"),
    bad("header begins with a mark", container(b"\xef\xbb\xbf" + TEXT.encode(), DATA), "'{'"),
    bad("header is not JSON", container(TEXT.replace(":", "=", 1), DATA), "header", "not valid at"),
    bad("header is cut", container(TEXT[:-20], DATA), "tensor", "tensor"),
    bad("a name without its first quote", container(TEXT.replace('{"base', "{xbase", 1), DATA), "not valid at"),
    bad("header in single quotes", container(TEXT.replace('"', "'"), DATA), "header", "not valid at"),
    bad("header with a trailing comma", container(TEXT[:-1] + ",}", DATA), "header", "not valid at"),
    bad("header with a comment", container(TEXT[:-1] + "/* x */}", DATA), "header", "not valid at"),
    bad("two headers", container(TEXT + TEXT, DATA), "header", "not valid at"),
    bad("header ends in zeros", container(TEXT + "\0\0\0", DATA), "header"),
    bad("header is not UTF-8", container(b'{"\xff\xfe":' + SMALL.encode() + b"}", bytes(4)), "UTF-8"),
    bad("header is UTF-16", container(TEXT.encode("utf-16-le"), DATA), "header"),
    bad("header is 50,000 deep", container('{"a":' * 50_000), "'a'"),
    bad("lists 50,000 deep in an entry", container('{"a":{"dtype":"F32","shape":' + "[" * 50_000), "'a'"),
    bad("metadata is nested", container({"__metadata__": {"a": {"b": "c"}}} | HEADER, DATA), "header"),
    bad("metadata has a number", container({"__metadata__": {"a": 1}} | HEADER, DATA), "header"),
    bad("metadata is a list", container({"__metadata__": ["a"]} | HEADER, DATA), "header"),
    bad("metadata is a tensor", container(f'{{"__metadata__":{SMALL}}}', bytes(4)), "header"),
    bad("metadata twice", container('{"__metadata__":{},"__metadata__":{},' + TEXT[1:], DATA), "__metadata__"),
    bad("no tensors", container("{}"), "no LoRA tensor"),
    bad("only metadata", container('{"__metadata__":{"format":"pt"}}'), "no LoRA tensor"),
    bad("overlap", container(HEADER | {LAST: HEADER[LAST] | {"data_offsets": SWAPPED[0]}}, DATA), "tensor"),
    bad("full overlap of equal tensors", container(f'{{"a":{SMALL},"b":{SMALL}}}', bytes(4)), "overlaps"),
    bad("hole", container(f'{{"a":{SMALL},"b":{SMALL.replace("[0,4]", "[8,12]")}}}', bytes(12)), "hole"),
    bad("hole at the start", container(f'{{"b":{SMALL.replace("[0,4]", "[8,12]")}}}', bytes(12)), "hole"),
    bad("reversed offsets", container(f'{{"b":{SMALL.replace("[0,4]", "[4,0]")}}}', bytes(4)), "data_offsets", "needs"),
    bad("negative offsets", entry(QA, data_offsets=[-256, 0]), QA),
    bad("offsets of half a byte", entry(QA, data_offsets=[0.0, 256.0]), QA),
    bad("offsets as text", entry(QA, data_offsets=["0", "256"]), QA),
    bad("three offsets", entry(QA, data_offsets=[0, 256, 256]), QA, "missing or garbled"),
    bad("one offset", entry(QA, data_offsets=[256]), QA, "missing or garbled"),
    bad("offsets with exponents", container(TEXT.replace("[0,256]", "[0,2.56e2]"), DATA), QA),
    bad("offsets of 30 digits", container(TEXT.replace("[0,256]", f"[0,{10**30}]"), DATA), QA),
    bad("twice, other bytes", container("{" + f'"{QA}":{SMALL},' + TEXT[1:], DATA), "duplicate"),
    bad("twice, same bytes", container(f'{{"{QA}":{json.dumps(HEADER[QA])},' + TEXT[1:], DATA), "duplicate"),
    bad(
        "twice, same bytes, other shape",
        container(f'{{"{QA}":{json.dumps(HEADER[QA] | {"shape": [16, 4]})},' + TEXT[1:], DATA),
        "duplicate",
    ),
    bad("twice, spelled with an escape", container(TEXT[:-1] + f',"\\u0062{QA[1:]}":{json.dumps(HEADER[QA])}}}', DATA), "duplicate"),
    bad("dtype twice", container(TEXT.replace('"dtype":"F32"', '"dtype":"F32","dtype":"F16"', 1), DATA), QA, "expected exactly"),
    bad("shape and bytes differ", entry(QA, shape=[4, 15]), QA, "needs"),
    bad("shape overflows", entry(QA, shape=[2**62, 2**62, 4]), QA, "needs"),
    bad("shape overflows to the right size", entry(QA, shape=[2**63, 2, 2**62]), QA),
    bad("negative sizes", entry(QA, shape=[-4, -16]), QA),
    bad("size as text", entry(QA, shape=["4", 16]), QA),
    bad("size is true", entry(QA, shape=[True, 64]), QA),
    bad("shape is a number", entry(QA, shape=64), QA),
    bad("shape is null", entry(QA, shape=None), QA),
    bad("40 sizes", entry(QA, shape=[1] * 38 + [4, 16]), QA, "expected exactly"),
    bad("zero times 2^40", container({"a": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}} | HEADER, DATA), "'a'", "empty"),
    bad("no dtype", entry(QA, dtype=...), QA, "expected exactly"),
    bad("no shape", entry(QA, shape=...), QA),
    bad("no offsets", entry(QA, data_offsets=...), QA),
    bad("an extra field", entry(QA, strides=[1, 4]), QA, "expected exactly"),
    bad("dtype F128", entry(QA, dtype="F128"), QA, "F128", "has dtype"),
    bad("dtype in small letters", entry(QA, dtype="f32"), QA),
    bad("dtype null", entry(QA, dtype=None), QA),
    bad("dtype of 4 bits", entry(QA, dtype="F4"), QA, "has dtype"),
    bad("entry is a list", container(HEADER | {QA: ["F32", [4, 16], [0, 256]]}, DATA), QA, "expected an object"),
    bad("entry is null", container(HEADER | {QA: None}, DATA), QA),
    refuse("container", "100,000 empty tensors", many_empty, WEIGHTS, "empty"),
    refuse("container", "200,001 tensors", many_names(200_001), WEIGHTS, "200000"),
    bad("name of a megabyte", container(f'{{"{"x" * 10**6}":{SMALL}}}', bytes(4)), "characters"),
    bad("name of 513 characters", stored(GOOD | {PREFIX + "x" * 500: raw([1.0])}), "characters"),
    bad("name with terminal escapes", stored(GOOD | {"\x1b[2J\x1b]0;owned\x07": raw([1.0])}), "\\x1b[2J"),
    bad("name with a newline", stored(GOOD | {QA + "\nloaded 1 adapter": raw([1.0])}), "\\n"),
    bad("name turns text around", stored(GOOD | {PREFIX + "\u202eA.weight": raw([1.0])}), "\\u202e"),
    bad("empty name", stored(GOOD | {"": raw([1.0])}), "tensor ''"),
    bad("name with half a surrogate", container(TEXT[:-1] + f',"\\ud800":{json.dumps(HEADER[LAST])}}}', DATA), "tensor"),
    bad("a control character in the header", container(TEXT.replace("self_attn", "self\nattn", 1), DATA), "not valid at"),
    refuse("container", "20 MB of other alphabets in the metadata", alphabets, WEIGHTS, "ASCII"),
    refuse("container", "20 MB of escapes in the metadata", escapes, WEIGHTS, "ASCII"),
    accept("container", "20 MB of metadata", lots),
    accept("container", "header padded to 8", files(weights=padded(TEXT, len(TEXT) + 8 - len(TEXT) % 8))),
    accept("container", "header padded with 100 kB", files(weights=padded(TEXT, 100_000))),
    accept("container", "header with spaces", files(weights=container(json.dumps(HEADER, indent=1), DATA))),
    accept("container", "header that begins like a pickle", files(weights=padded(TEXT, 0x0480))),
    accept("container", "metadata", files(weights=stored(GOOD, {"format": "pt", "note": "ü "
                                                                                        "\U0001f600 \n"}))),
    accept("container", "names in any order", files(weights=stored(dict(reversed(GOOD.items()))))),
    accept("container", "fields in any order", files(weights=container({name: dict(reversed(info.items())) for name, info in HEADER.items()}, DATA))),
    accept("container", "escaped letters in a name", files(weights=container(TEXT.replace('"base_model', '"\\u0062ase_model'), DATA))),
]  # fmt: skip
