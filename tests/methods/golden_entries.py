"""The entries of goldens/consensus.json, as layers and outputs (see goldens/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import sapmerge as sm

HERE = Path(__file__).parents[1] / "goldens"
INDEX = json.loads((HERE / "consensus.json").read_text())
ENTRIES = {entry["key"]: entry for entry in INDEX["entries"]}
OUTPUTS = load_file(HERE / "consensus.safetensors")
INPUTS = load_file(HERE / "inputs.safetensors")
NAMES = ("layers.0.q_proj", "layers.1.v_proj")
TOLERANCE = 1e-5


def keys(start: str) -> list[str]:
    found = [key for key in ENTRIES if key.startswith(start)]
    assert found, start
    return found


def parameters(key: str) -> dict:
    return ENTRIES[key]["hyperparameters"]


def output(key: str, name: str) -> Tensor:
    return OUTPUTS[ENTRIES[key]["outputs"][name]]


def layers_of(key: str) -> list[sm.Layer]:
    """The input set of an entry, with its weights."""
    return input_layers(ENTRIES[key]["set"], tuple(map(float, parameters(key).get("weight", ()))))


def input_layers(name: str, weights: tuple[float, ...] = ()) -> list[sm.Layer]:
    """An input set in float64; alpha = r in all of them."""
    layers = []
    for layer in NAMES:
        updates: list[sm.Update] = []
        for k in range(3):
            if f"{name}/t{k}/{layer}/dW" in INPUTS:
                updates.append(sm.Dense(INPUTS[f"{name}/t{k}/{layer}/dW"].double()))
            else:
                A, B = (INPUTS[f"{name}/t{k}/{layer}/{part}"].double() for part in "AB")
                updates.append(sm.LowRank(B, A))
        layers.append(sm.Layer(layer, tuple(updates), adapters=("t0", "t1", "t2"), weights=weights))
    return layers


def alone(layer: sm.Layer, k: int) -> sm.Layer:
    """The layer with adapter k only."""
    return sm.Layer(layer.name, (layer.updates[k],), adapters=(layer.adapters[k],))


def split(flat: Tensor) -> dict[str, Tensor]:
    """A vector over all entries of both layers, row-major -> a matrix per layer."""
    one, other = flat.double().split(24 * 16)
    return {NAMES[0]: one.view(24, 16), NAMES[1]: other.view(16, 24)}


def flatten(merged: dict[str, sm.Update]) -> Tensor:
    return torch.cat([merged[name].dense().flatten() for name in NAMES])
