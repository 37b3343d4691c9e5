"""The cache under several writers, killed writers, and a disk that changes digits."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sapmerge.io.cache import Cache

DEAD = 4_194_303 + 1  # above the largest process id that Linux gives out


def put(cache: Cache, number: int = 0) -> None:
    cache.put("key", {"x": torch.arange(5.0)}, {"loss": 0.25, "number": number})


def test_any_digit_of_what_is_kept_counts(tmp_path: Path) -> None:
    put(Cache(tmp_path))
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {"x": opened.get_tensor("x").clone()}
    for key, notes in [
        ("key", {"loss": 0.26, "number": 0}),
        ("key", {"loss": 0.25}),
        ("other", None),
    ]:
        changed = {**metadata, "key": key}
        changed["notes"] = metadata["notes"] if notes is None else json.dumps(notes)
        save_file(tensors, file, changed)
        assert Cache(tmp_path).get("key") is None
    save_file(tensors, file, metadata)
    assert Cache(tmp_path).get("key") is not None


def test_every_byte_of_the_file_counts(tmp_path: Path) -> None:
    put(Cache(tmp_path))
    (file,) = tmp_path.iterdir()
    whole, kept = file.read_bytes(), Cache(tmp_path).get("key")
    assert kept is not None
    for place in range(8, len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        got = Cache(tmp_path).get("key")
        assert got is None or (got[1] == kept[1] and torch.equal(got[0]["x"], kept[0]["x"])), place


def test_writers_of_one_process_have_names_of_their_own(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def write() -> None:
        try:
            for number in range(30):
                put(Cache(tmp_path), number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [file.name for file in tmp_path.iterdir()] == [next(tmp_path.iterdir()).name]


def test_scratch_files_of_killed_writers_go(tmp_path: Path) -> None:
    put(Cache(tmp_path))
    (file,) = tmp_path.iterdir()
    left = [tmp_path / f".{file.name}.{DEAD}.tmp", tmp_path / f".{file.name}.{DEAD}-0123abcd.tmp"]
    in_use = tmp_path / f".{file.name}.{os.getpid()}-0123abcd.tmp"
    foreign = tmp_path / ".notes.tmp"
    for path in [*left, in_use, foreign]:
        path.write_bytes(b"x")
    Cache(tmp_path)
    assert not any(path.exists() for path in left)
    assert in_use.exists()
    assert foreign.exists()


def test_a_scratch_file_that_is_swept_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = os.fsync, list[str]()

    def fsync(file: int) -> None:
        real(file)
        for name in os.listdir(tmp_path):
            if name.endswith(".tmp") and not swept:
                swept.append(name)
                os.unlink(tmp_path / name)

    monkeypatch.setattr(os, "fsync", fsync)
    put(Cache(tmp_path))
    assert len(swept) == 1
    assert Cache(tmp_path).get("key") is not None


def test_the_folder_stays_the_same_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = Cache("kept")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    put(cache)
    assert re.fullmatch(r"[0-9a-f]{64}\.safetensors", os.listdir(tmp_path / "kept")[0])
