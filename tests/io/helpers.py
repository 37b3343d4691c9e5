"""Small adapters to read, and ways to break them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sapmerge.errors import SapmergeError, SapmergeWarning
from sapmerge.io.adapter import Adapter
from tests.corpus.build import PREFIX, good_config, module

SHARED = Path(__file__).parents[3] / "shared" / "data"


def good_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in (0, 1):
        for part, out in (("q_proj", 16), ("v_proj", 8)):
            name = PREFIX + module(layer, part)
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, 16, generator=generator).to(dtype)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator).to(dtype)
    return tensors


def write(
    folder: Path,
    config: Mapping[str, object] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps(good_config() if config is None else config)
    )
    save_file(
        dict(good_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors"
    )
    return folder


def container(header: str | bytes, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with any header."""
    raw = header.encode() if isinstance(header, str) else header
    return len(raw).to_bytes(8, "little") + raw + data


def refused(
    path: Path, *words: str, error: type[SapmergeError] = SapmergeError, **options: object
) -> str:
    """Loading raises `error` with a printable message that has all the words."""
    with pytest.raises(error) as caught:
        Adapter.load(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message) <= 2000
    assert message.isprintable()
    for word in words:
        assert word in message, message
    return message


def accepted(path: Path, **options: object) -> Adapter:
    """Loading is silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Adapter.load(path, **options)  # type: ignore[arg-type]


def warned(path: Path, *words: str, **options: object) -> Adapter:
    """Loading works, with exactly one warning that has all the words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = Adapter.load(path, **options)  # type: ignore[arg-type]
    assert [item.category for item in caught] == [SapmergeWarning], [
        str(item.message) for item in caught
    ]
    for word in words:
        assert word in str(caught[0].message), str(caught[0].message)
    return adapter
