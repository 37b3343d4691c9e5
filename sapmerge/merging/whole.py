"""A merged full model, streamed from the folder of its base."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from sapmerge.core.torch_state import pinned
from sapmerge.core.undo import Undo
from sapmerge.errors import ModelMismatchError
from sapmerge.io.base_folder import BaseFolder, Spot
from sapmerge.io.keys import EMBEDDINGS
from sapmerge.io.outputs import check_apart
from sapmerge.io.whole import write_model
from sapmerge.merging.report import digests_of
from sapmerge.merging.run import Run
from sapmerge.merging.texts import metadata_of
from sapmerge.merging.vectors import Change

__all__ = ["save_merged"]

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save_merged(
    run: Run,
    base_folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
) -> None:
    """Write every shard of the base with the updates added, and copy what lies beside it
    (configs, tokenizer).
    """
    undo = Undo()
    try:
        _written(run, base_folder, path, overwrite, undo)
    except BaseException:
        try:
            undo.run()
        finally:
            undo.run()  # goes on where an interruption stopped the first one
        raise


@pinned
def _written(
    run: Run,
    base_folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    overwrite: bool,
    undo: Undo,
) -> None:
    base = BaseFolder(base_folder, conv1d=any(adapter.fan_in_fan_out for adapter in run.adapters))
    check_apart(path, (base.path, *(adapter.folder for adapter in run.adapters)))
    _check_not_tied(run, base)
    moved = _moves(run, base)
    for name in moved:
        _check_plain(base, name)
    metadata = metadata_of(run, {}, None)
    anchors = run.stream.anchors
    record = {
        "version": metadata["sapmerge.version"],
        "recipe": json.loads(metadata["sapmerge.recipe"]),
        "inputs": json.loads(metadata["sapmerge.inputs"]),
        **({} if anchors is None else {"digests": digests_of(anchors)}),
    }
    write_model(base, path, moved, record, overwrite=overwrite, undo=undo)


def _check_not_tied(run: Run, base: BaseFolder) -> None:
    """Refuse a change of embeddings that the head would share: PEFT changes one of both.

    Raises:
        ModelMismatchError: the base ties them.
    """
    owners = [m.owner for m in run.stream.modules.values() if m.kind == "embedding"]
    owners += [name.rpartition(".")[0] for name in run.heads.tensors()]
    shared = next((name for name in owners if EMBEDDINGS.fullmatch(name)), None)
    if shared is not None and base.tied():
        raise ModelMismatchError(
            f"the base ties its embeddings and its head, so that a change of {shared!r} in its "
            "folder would be one of both; use save_pretrained"
        )


def _moves(run: Run, base: BaseFolder) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """Tensor of the base -> what makes the merged one of it."""
    base.check(run.stream.modules.values(), run.heads.shapes())
    layers: dict[str, list[tuple[str, Spot]]] = {}
    for name, module in run.stream.modules.items():
        for spot in base.spots(module):
            layers.setdefault(spot.tensor, []).append((name, spot))
    changes: dict[str, list[Change]] = {}
    for change in run.vectors.changes:
        changes.setdefault(_found(base, change.name), []).append(change)
    moved: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(_moved, run, layers.get(name, []), changes.get(name, []))
        for name in (*layers, *changes)
    }
    for name, read in run.heads.tensors().items():
        moved[_found(base, name)] = partial(_replaced, read)
    return moved


def _found(base: BaseFolder, name: str) -> str:
    base.tensor(name)  # raises where it is not there
    return base.find(name) or name


def _check_plain(base: BaseFolder, name: str) -> None:
    entry = base.entries[name][1]
    if entry.dtype not in _PLAIN:
        raise ModelMismatchError(
            f"the base stores {name!r} as {entry.dtype}: an update that is added to quantised "
            "weights is lost in their rounding. Use save_pretrained, or a base in bfloat16 or "
            "float32"
        )


def _replaced(read: Callable[[], Tensor], _: Tensor) -> Tensor:
    return read()


def _moved(
    run: Run, layers: list[tuple[str, Spot]], changes: list[Change], value: Tensor
) -> Tensor:
    """A tensor of the base plus what the merge does to it."""
    moved = value.to(torch.promote_types(value.dtype, torch.float32))
    rows = {change.name: change.delta(value) for change in changes if change.rows and layers}
    for name, spot in layers:
        update = run.merged(name)[1].dense().cpu().to(moved.dtype)
        part = update if spot.rows is None else update[spot.rows]
        target = moved if spot.expert is None else moved[spot.expert]
        target.add_(part.T if spot.transposed else part.reshape(target.shape))
    for change in changes:
        if change.how == "moves":
            moved = (moved.double() + change.value(None)).to(moved.dtype)
        elif change.name in rows:
            moved[list(change.rows)] += rows[change.name].to(moved.dtype)
        elif change.rows:
            moved[list(change.rows)] = change.value(moved).to(moved.dtype)
        else:
            moved = change.value(moved).to(moved.dtype)
    return moved
