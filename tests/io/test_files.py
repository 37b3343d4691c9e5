"""Files that are no safetensors file, or not a file at all."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapmerge.errors import (
    AdapterFormatError,
    AdapterSecurityError,
    InputChangedError,
    LimitExceededError,
    NonFiniteError,
    SapmergeError,
)
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import Limits, RegularFile
from sapmerge.io.header import open_weights
from tests.io.helpers import PREFIX, accepted, container, good_tensors, module, refused, write

A = PREFIX + module(0, "q_proj") + ".lora_A.weight"


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"1234567", "7 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
        (b"\x80\x02}q\x00." + b"x" * 50, "pickle"),
        (b"PK\x03\x04" + b"\0" * 50, "zip"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated"),
        (struct.pack("<Q", 50) + b'{"a":', "truncated"),
        (container("[]"), "does not begin with '{'"),
        (container(b'{"\xff\xfe": 1}'), "UTF-8"),
        (container('{"a":' * 5000), "tensor 'a'"),
        (
            container("{" + f'"{A}": {entry()}, "{A}": {entry(shape=[1, 1])}' + "}", b"abcd"),
            "duplicate",
        ),
        (
            container(
                f'{{"{A}": {entry(offsets=[0, 4])}, "b": {entry(offsets=[2, 6])}}}', b"abcdef"
            ),
            "overlaps",
        ),
        (container(f'{{"{A}": {entry()}, "b": {entry(offsets=[8, 12])}}}', b"a" * 12), "hole"),
        (container(f'{{"{A}": {entry(offsets=[4, 0])}}}', b"abcd"), "data_offsets"),
        (container(f'{{"{A}": {entry(offsets=[-4, 0])}}}', b"abcd"), "data_offsets"),
        (container(f'{{"{A}": {entry(shape=[2])}}}', b"abcd"), "needs 8 bytes"),
        (container(f'{{"{A}": {entry(shape=[2**62, 2**62])}}}', b"abcd"), "needs"),
        (container(f'{{"{A}": {entry()}}}', b"abcde"), "bytes after the last tensor"),
        (container(f'{{"{A}": {entry()}}}', b"abc"), "truncated"),
        (container(f'{{"{A}": {entry(dtype="F128")}}}', b"abcd"), "F128"),
        (container(f'{{"{A}": {entry()}, "__metadata__": {{"a": 1}}}}', b"abcd"), "not valid"),
        (container(f'{{"{A}": {entry()}}} x', b"abcd"), "not valid"),
        (container('{"\\u001b[2J' + "x" * 400 + f'": {entry()}}}', b"abcd"), "\\x1b[2J"),
        (container("{}"), "no LoRA tensor"),
    ],
)
def test_bad_containers(tmp_path: Path, content: bytes, word: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    refused(tmp_path, "adapter_model.safetensors", word, error=AdapterFormatError)


def test_limits_of_the_container(tmp_path: Path) -> None:
    write(tmp_path)
    refused(tmp_path, "header", error=LimitExceededError, limits=Limits(header_bytes=100))
    refused(tmp_path, "tensors", error=LimitExceededError, limits=Limits(tensors=3))
    refused(tmp_path, "tensor name", error=LimitExceededError, limits=Limits(name_length=30))
    with open(tmp_path / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(200_000_008)
    refused(tmp_path, "200000000", error=LimitExceededError)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    padded = raw[8 : 8 + length].rstrip() + b" " * 2048
    path.write_bytes(container(padded[:0x0480], raw[8 + length :]))
    assert path.read_bytes()[:2] == b"\x80\x04"
    accepted(tmp_path)


def test_many_empty_tensors_are_refused_fast(tmp_path: Path) -> None:
    write(tmp_path)
    names = ", ".join(
        f'"{PREFIX}x{i}.lora_A.weight": {entry(shape=[0], offsets=[0, 0])}' for i in range(100_000)
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(container("{" + names + "}"))
    start = time.monotonic()
    refused(tmp_path, "is empty")
    assert time.monotonic() - start < 4


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=8), st.integers(0, 400), st.integers(0, 255))
def test_what_we_accept_safetensors_accepts(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, at: int, byte: int
) -> None:
    """One byte of a good file is changed, or a few are added:
    never another exception, never more than safetensors.
    """
    import safetensors

    global _raw
    folder = tmp_path_factory.getbasetemp() / "differential"
    if not folder.exists():
        write(folder)
        _raw = (folder / "adapter_model.safetensors").read_bytes()
    path = folder / "broken.safetensors"
    content = bytearray(_raw)
    content[at] = byte
    path.write_bytes(bytes(content) + tail)
    try:
        with RegularFile(str(path), "broken") as file:
            mine = open_weights(file, str(path), Limits())
    except SapmergeError:
        return
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: tuple(info["shape"]) for name, info in theirs.items()} == {
        name: found.shape for name, found in mine.entries.items()
    }


_raw = b""


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    path = tmp_path / name
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path, name, "FIFO", error=AdapterSecurityError)
    path.unlink()
    path.symlink_to("/dev/zero")
    refused(tmp_path, name, "device", error=AdapterSecurityError)
    path.unlink()
    path.mkdir()
    refused(tmp_path, name, "folder", error=AdapterSecurityError)
    path.rmdir()
    path.symlink_to(path)
    refused(tmp_path, name, "cannot be opened", error=AdapterFormatError)
    path.unlink()
    refused(tmp_path, name, error=AdapterFormatError)


def test_symlinks_are_followed(tmp_path: Path) -> None:
    real = write(tmp_path / "blobs")
    link = tmp_path / "snapshot"
    link.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (link / name).symlink_to(real / name)
    assert accepted(link).digest == accepted(real).digest
    assert accepted(link).label == "snapshot"


def test_paths_are_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for missing in ("adapters/medical", "./none", "/nowhere/at/all", "a\0b"):
        with pytest.raises(AdapterFormatError, match=r"local only.*from_hub"):
            Adapter.load(missing)
    write(tmp_path / "x")
    refused(tmp_path / "x" / "adapter_config.json", "expected the folder")
    os.unlink(tmp_path / "x" / "adapter_model.safetensors")
    refused(tmp_path / "x", "nothing is downloaded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = good_tensors(dtype)
    tensors[A][1, 2] = value
    write(tmp_path, tensors=tensors)
    refused(tmp_path, A, "1 values", error=NonFiniteError)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = good_tensors()
    tensors[A] = tensors[A].to(dtype)
    try:
        write(tmp_path, tensors=tensors)
    except KeyError:
        pytest.skip(f"this version of safetensors cannot write {dtype}")
    refused(tmp_path, A, str(dtype).removeprefix("torch."), error=AdapterFormatError)


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path) / "adapter_model.safetensors"
    adapter = accepted(tmp_path)
    name = module(0, "q_proj")
    before = adapter.update(name)
    raw = path.read_bytes()
    broken = bytearray(raw)
    broken[-300] ^= 1
    owner = next(
        own
        for own, entry in adapter._contents.weights.entries.items()
        if entry.start <= len(raw) - 300 < entry.start + entry.size
    )
    changed = next(own for own, parts in adapter._contents.tensors.items() if owner in parts)
    path.write_bytes(broken)
    with pytest.raises(InputChangedError, match="lora_"):
        adapter.update(changed)
    path.write_bytes(raw[:-1])
    with pytest.raises(InputChangedError, match="size"):
        adapter.update(name)
    path.unlink()
    with pytest.raises(InputChangedError, match="could be read"):
        adapter.update(name)
    path.write_bytes(raw)
    assert torch.equal(adapter.update(name).A, before.A)
    assert torch.equal(adapter.update(name).B, before.B)


def test_speed_and_memory(tmp_path: Path) -> None:
    import resource

    big = {
        PREFIX + "a.lora_A.weight": torch.randn(512, 32768) / 100,
        PREFIX + "a.lora_B.weight": torch.randn(512, 512) / 100,
    }
    write(tmp_path, good_config_of_one("a", 512), big)
    size = sum(tensor.nbytes for tensor in big.values())
    del big
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    accepted(tmp_path)
    assert time.monotonic() - start < 2 + size / 100e6
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < 64e6 + 3 * size


def good_config_of_one(name: str, rank: int) -> dict[str, object]:
    from tests.io.helpers import good_config

    return good_config(r=rank, lora_alpha=rank, target_modules=[name])
