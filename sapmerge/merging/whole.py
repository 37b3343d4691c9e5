"""A merged full model, streamed from the folder of its base."""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor

from sapmerge.core.torch_state import pinned_state
from sapmerge.errors import NonFiniteError
from sapmerge.io.base_folder import BaseFolder, Spot
from sapmerge.io.whole import write_model
from sapmerge.merging.run import Run
from sapmerge.merging.vectors import Change

__all__ = ["save_merged"]


def save_merged(
    run: Run, base_folder: str | os.PathLike[str], path: str | os.PathLike[str]
) -> None:
    """Write every shard of the base with the updates added, and copy what lies beside it
    (configs, tokenizer).
    """
    base = BaseFolder(base_folder, conv1d=any(adapter.fan_in_fan_out for adapter in run.adapters))
    base.check(run.stream.modules.values(), run.heads.shapes())
    layers: dict[str, list[tuple[str, Spot]]] = {}
    for name, module in run.stream.modules.items():
        for spot in base.spots(module):
            layers.setdefault(spot.tensor, []).append((name, spot))
    changes: dict[str, list[Change]] = {}
    for change in run.vectors.changes:
        changes.setdefault(_found(base, change.name), []).append(change)
    heads = {_found(base, name): read for name, read in run.heads.tensors().items()}

    def moved(name: str, tensor: Tensor) -> Tensor:
        tensor = heads[name]() if name in heads else tensor
        return _moved(run, tensor, layers.get(name, []), changes.get(name, []))

    record = {"recipe": dict(run.recipe), "inputs": {a.label: a.digest for a in run.adapters}}
    write_model(base, path, moved, json.dumps(record, indent=2, sort_keys=True) + "\n")


def _found(base: BaseFolder, name: str) -> str:
    base.tensor(name)  # raises where it is not there
    return base.find(name) or name


def _moved(
    run: Run, value: Tensor, layers: list[tuple[str, Spot]], changes: list[Change]
) -> Tensor:
    """A tensor of the base plus what the merge does to it."""
    if not layers and not changes:
        return value
    moved = value.float()
    for name, spot in layers:
        with pinned_state():
            update = run.merged(name)[1].dense().float().cpu()
        part = update if spot.rows is None else update[spot.rows]
        target = moved if spot.expert is None else moved[spot.expert]
        target.add_(part.T if spot.transposed else part.reshape(target.shape))
    for change in changes:
        if change.how == "moves":
            moved = (moved.double() + change.value(None)).float()
        elif change.rows:
            moved[list(change.rows)] = change.value(moved).float()
        else:
            moved = change.value(moved).float()
    if not bool(torch.isfinite(moved.to(value.dtype)).all()):
        raise NonFiniteError(
            f"the merged weight {layers[0][0] if layers else changes[0].name!r} is not finite"
        )
    return moved
