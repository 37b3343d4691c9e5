"""What the cases are made of: numpy, json and bytes,
so that nothing under test takes part in making them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PREFIX = "base_model.model."
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CANARY = "CANARY"
SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
}
Build = Callable[[Path], None]


class Raw(NamedTuple):
    """A tensor as a file stores it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Case:
    """One folder, or two, and what has to happen to it.

    Args:
        build: fills an empty folder; pairs fill `a` and `b` in it.
        verdict: "refuse", "warn" or "accept".
        words: what the message of a refusal or a warning must contain.
        action: "load", "pickle" (load with allow_pickle_weights), "merge" (a and b), "base" (merge
            it on a model).
        target: what is loaded, relative to the folder.
        truth: where the right update comes from: the files, or the good adapter.
    """

    name: str
    group: str
    verdict: str
    build: Build
    words: tuple[str, ...] = ()
    action: str = "load"
    target: str = "."
    truth: str = "files"


def refuse(group: str, name: str, build: Build, *words: str, **options: Any) -> Case:
    assert words, name
    return Case(name, group, "refuse", build, words, **options)


def warn(group: str, name: str, build: Build, *words: str, **options: Any) -> Case:
    assert words, name
    return Case(name, group, "warn", build, words, **options)


def accept(group: str, name: str, build: Build, **options: Any) -> Case:
    return Case(name, group, "accept", build, **options)


def good_config(**changes: object) -> dict[str, object]:
    """`...` as a value takes the key out."""
    config: dict[str, object] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny/llama",
        "bias": "none",
        "inference_mode": True,
    }
    return {key: value for key, value in (config | changes).items() if value is not ...}


def module(layer: int, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{part}"


Q, V = PREFIX + module(0, "q_proj"), PREFIX + module(0, "v_proj")
QA, QB = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def raw(values: object, dtype: str = "F32") -> Raw:
    array = np.asarray(values)
    shape = array.shape
    if dtype == "BF16":  # truncated: a rounding of its own, the bytes are what counts
        data = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    elif dtype.startswith("F8"):
        data = bytes(array.size)
    else:
        kind = {"F": "f", "I": "i", "U": "u", "B": "u", "C": "c"}[dtype[0]]
        size = {"BOOL": 1, "C64": 8}.get(dtype) or SIZES[dtype]
        data = array.astype(f"<{kind}{size}").tobytes()
    return Raw(dtype, shape, data)


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0, dtype: str = "F32") -> Raw:
    return raw(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def pair(
    name: str, out: int, into: int, rank: int = 4, seed: int = 0, dtype: str = "F32"
) -> dict[str, Raw]:
    return {
        f"{PREFIX}{name}.lora_A.weight": random((rank, into), seed, dtype=dtype),
        f"{PREFIX}{name}.lora_B.weight": random((out, rank), seed + 1, dtype=dtype),
    }


def good_tensors(seed: int = 0, dtype: str = "F32", rank: int = 4) -> dict[str, Raw]:
    tensors: dict[str, Raw] = {}
    for layer in (0, 1):
        for number, (part, out) in enumerate((("q_proj", 16), ("v_proj", 8))):
            tensors |= pair(
                module(layer, part), out, 16, rank, 100 * seed + 10 * layer + 4 * number, dtype
            )
    return tensors


def header_of(tensors: Mapping[str, Raw], metadata: object = None) -> dict[str, Any]:
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, tensor in tensors.items():
        table[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(tensor.data)],
        }
        at += len(tensor.data)
    return table


def container(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: bytes or text as they are, anything else as JSON."""
    if isinstance(header, bytes):
        text = header
    else:
        text = (
            header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
        ).encode()
    return len(text).to_bytes(8, "little") + text + data


def data_of(tensors: Mapping[str, Raw]) -> bytes:
    return b"".join(tensor.data for tensor in tensors.values())


def stored(tensors: Mapping[str, Raw], metadata: object = None) -> bytes:
    return container(header_of(tensors, metadata), data_of(tensors))


def write(folder: Path, config: object = None, weights: object = None) -> None:
    """A folder: bytes are written as they are, None is the good adapter's, `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = good_config() if config is None else config
    weights = good_tensors() if weights is None else weights
    if config is not ...:
        (folder / CONFIG).write_bytes(
            config if isinstance(config, bytes) else json.dumps(config).encode()
        )
    if weights is not ...:
        assert isinstance(weights, bytes | dict)
        (folder / WEIGHTS).write_bytes(weights if isinstance(weights, bytes) else stored(weights))


def files(config: object = None, weights: object = None) -> Build:
    return lambda folder: write(folder, config, weights)


def changed(**changes: object) -> Build:
    """The good tensors under a config with changes."""
    return files(good_config(**changes))


def with_tensors(changes: Mapping[str, Raw | None], **config: object) -> Build:
    """The good adapter with tensors added, replaced, or (None) dropped."""
    tensors = {
        name: tensor
        for name, tensor in (good_tensors() | dict(changes)).items()
        if tensor is not None
    }
    return files(good_config(**config), tensors)


def scaled(a: float, b: float, dtype: str = "F32") -> dict[str, Raw]:
    """The good tensors with A times a, and B times b."""
    return {
        name: raw(
            np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)
            * (a if "lora_A" in name else b),
            dtype,
        )
        for name, tensor in good_tensors().items()
    }
