"""The right update, from json and numpy alone, in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .build import CONFIG, PREFIX, WEIGHTS, Raw, good_config, good_tensors

Matrix = Any


def read(path: Path) -> dict[str, Raw]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    body = data[8 + length :]
    header = json.loads(data[8 : 8 + length])
    return {
        name: Raw(
            info["dtype"],
            tuple(info["shape"]),
            body[info["data_offsets"][0] : info["data_offsets"][1]],
        )
        for name, info in header.items()
        if name != "__metadata__"
    }


def numbers(tensor: Raw) -> Matrix:
    if tensor.dtype == "BF16":
        return (
            (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16)
            .view("<f4")
            .astype(float)
            .reshape(tensor.shape)
        )
    if tensor.dtype.startswith("F8"):  # of zeros, in this corpus
        assert not any(tensor.data)
        return np.zeros(tensor.shape)
    return (
        np.frombuffer(tensor.data, f"<f{ {'F64': 8, 'F32': 4, 'F16': 2}[tensor.dtype] }")
        .astype(float)
        .reshape(tensor.shape)
    )


def by_pattern(table: Mapping[str, Any], name: str, default: Any) -> Any:
    return next(
        (value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", name)), default
    )


def updates(config: Mapping[str, Any], tensors: Mapping[str, Raw]) -> dict[str, Matrix]:
    """Module -> scaling * B @ A."""
    found: dict[str, Matrix] = {}
    for a_name in tensors:
        if ".lora_A." not in a_name and not a_name.endswith(".lora_embedding_A"):
            continue
        name = a_name.removeprefix(PREFIX).rpartition(".lora_")[0]
        a, b = (
            numbers(tensors[a_name]),
            numbers(
                tensors[a_name.replace("lora_A", "lora_B").replace("_embedding_A", "_embedding_B")]
            ),
        )
        rank = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
        alpha = by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        scaling = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
        found[name] = scaling * b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
    return found


def of_folder(folder: Path) -> dict[str, Matrix]:
    return updates(
        json.loads((folder / CONFIG).read_bytes().decode("utf-8-sig")), read(folder / WEIGHTS)
    )


def of_good() -> dict[str, Matrix]:
    return updates(good_config(), good_tensors())


def mean(each: list[dict[str, Matrix]]) -> dict[str, Matrix]:
    names = {name: one[name].shape for one in each for name in one}
    return {
        name: sum(one.get(name, np.zeros(shape)) for one in each) / len(each)
        for name, shape in names.items()
    }


def error(got: Mapping[str, Matrix], wanted: Mapping[str, Matrix]) -> float:
    """The largest relative Frobenius error of a module; infinite if the modules differ."""
    if got.keys() != wanted.keys():
        return float("inf")
    return max(
        (
            np.linalg.norm(got[name] - wanted[name]) / (np.linalg.norm(wanted[name]) or 1.0)
            for name in wanted
        ),
        default=0.0,
    )
