"""Uploads in every form: what is none of them, damaged, or too large."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sapmerge.errors import AdapterFormatError, LimitExceededError, SapmergeError
from sapmerge.io.uploads import files_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def packed(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def refused(upload: object, error: type[SapmergeError], words: str, most: int = 10_000) -> None:
    with pytest.raises(error, match=re.escape(words)) as caught:
        files_of(upload, most)
    assert caught.type is error


@pytest.mark.parametrize("upload", [7, None, (), ("{}", b"", b""), ("{}", 7)])
def test_what_is_no_upload(upload: object) -> None:
    words = (
        "an upload is a folder, the bytes of a zip file, or a pair (config, weights) of bytes or "
        f"(config, state_dict); got '{type(upload).__name__}'"
    )
    refused(upload, AdapterFormatError, words)


def test_a_file_of_a_folder_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(b"{}")
    (tmp_path / WEIGHTS).write_bytes(bytes(10_001))
    refused(tmp_path, LimitExceededError, f"{WEIGHTS}: 10001 bytes; at most 10000 are allowed")
    assert files_of(tmp_path, 10_003) == (b"{}", bytes(10_001))
    refused(tmp_path, LimitExceededError, "the upload has 10003 bytes; at most 10002", 10_002)


def test_zip_files() -> None:
    good = packed((CONFIG, b"{}"), (WEIGHTS, b"w"))
    assert files_of(good, 10_000) == (b"{}", b"w")
    size = len(good)
    most = size - 1
    refused(good, LimitExceededError, f"the upload has {size} bytes; at most {most} are", most)
    refused(b"PK\x03\x04", AdapterFormatError, "the upload is no zip file that can be read")
    for name in (CONFIG, WEIGHTS):
        lacks = packed(*((other, b"{}") for other in (CONFIG, WEIGHTS) if other != name))
        refused(lacks, AdapterFormatError, f"the zip file of the upload has no {name} at its top")
        with pytest.warns(UserWarning, match="Duplicate name"):
            twice = packed((CONFIG, b"{}"), (WEIGHTS, b"w"), (name, b"x"))
        refused(twice, AdapterFormatError, f"the zip file of the upload has {name} twice")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (3, torch.ones(2), "3: 'Tensor'"),
        ("a", [1.0], "'a': 'list'"),
        ("a", torch.ones(2, 2).to_sparse(), "'a': 'Tensor'"),
    ],
)
def test_state_dicts_that_are_none(name: Any, tensor: Any, said: str) -> None:
    state = {"good": torch.ones(2), name: tensor}
    words = f"the state dict maps names to dense tensors; got {said}"
    refused(({}, state), AdapterFormatError, words)


def test_tensors_that_are_too_large_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number that is seen as a million: what it would take is known from its shape."""
    monkeypatch.setattr("safetensors.torch.save", lambda _: pytest.fail("copied"))
    state = {"a": torch.ones(1).expand(1_000_000)}
    words = "the tensors of the upload have 4000000 bytes; at most 10000 are allowed"
    refused(({}, state), LimitExceededError, words)
