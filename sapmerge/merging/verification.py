"""Was this output made from these inputs? `verify` compares digests,
`reproduce` merges again and compares bits.

What an output says about itself is a claim: whoever can write tensors can write metadata that fits
them. So `verify` tells that nothing was damaged or mixed up since,
and only `reproduce` that the tensors are what the recipe gives.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sapmerge.anchors.digest import digest_of_weights
from sapmerge.anchors.loading import Batches, batch_size
from sapmerge.errors import (
    AdapterFormatError,
    AnchorError,
    IncompatibleAdaptersError,
    MethodError,
    SapmergeError,
)
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import shown
from sapmerge.io.folder import CONFIG, WEIGHTS
from sapmerge.io.provenance import ANCHORS_KEY, Provenance, read_provenance
from sapmerge.losses import NAMED, Loss
from sapmerge.merging.anchored import says_the_same
from sapmerge.merging.merge import merge
from sapmerge.models import exclusive
from sapmerge.parsing import parse
from sapmerge.version import __version__

__all__ = ["reproduce", "verify"]


def verify(
    path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]] = ()
) -> list[str]:
    """What is wrong with an output of sapmerge: whether its bytes, and its inputs,
    have the digests in its metadata.

    That the recipe gives these tensors is not checked: see `reproduce`.

    Args:
        path: the output's folder.
        inputs: folders of the adapters it was made from, in any order;
            all of them, or none to check the output alone.

    Returns:
        One line per problem; empty if config, weights and inputs are those that the metadata names.

    Raises:
        SapmergeError: the output or an input cannot be read, or the output is not one of sapmerge.

    Example:
        >>> import sapmerge as sm
        >>> sm.merge(["art", "sketch"], method=sm.mean()).save_pretrained("merged")
        >>> sm.verify("merged", ["art", "sketch"])
        []
    """
    stored = read_provenance(path)
    problems = list(stored.problems)
    if inputs:
        given = _by_label(stored, inputs, problems)
        missing = [label for label in _labels(stored) if label not in given]
        problems += [f"input {label!r} is not among the given folders" for label in missing]
    return problems


def reproduce(
    path: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    functions: Mapping[str, Callable[..., Any]] | None = None,
    model: Any = None,
    anchors: Any = None,
    loss: Loss | None = None,
    device: torch.device | str | None = None,
) -> list[str]:
    """Run the stored recipe on the inputs again and compare the bits.

    Args:
        path: the output's folder.
        inputs: folders of the adapters it was made from, in any order.
        functions: your own functions, by the "module:qualname" under which the recipe names them.
        model: the base, or its folder, where the merge was given one: DoRA and other kinds need its
            weights, and the output spells its modules. With anchors it is the loaded model.
        anchors: the batches of the merge, if it read any. Other anchors than those, the same in
            other batches, or other weights of the model are named, and nothing is merged.
        loss: of the anchors, where it was a function of yours.
        device: that of the merge, if not the CPU: other devices round in other ways.

    Returns:
        One line per difference; empty if the bytes of config and weights are the same, and what
        the metadata says of the anchors is so to a per cent.

    Raises:
        AnchorError: the merge read anchors, which no output contains: pass them, and the model.
        AdapterFormatError: the metadata is not of the form that sapmerge writes, or its recipe
            cannot be run.
        IncompatibleAdaptersError: an input is missing.
        SapmergeError: whatever the merge itself refuses.

    Example:
        >>> import sapmerge as sm
        >>> sm.merge(["art", "sketch"], method=sm.mean()).save_pretrained("again")
        >>> sm.reproduce("again", ["sketch", "art"])
        []
    """
    stored, problems = read_provenance(path), list[str]()
    loss = _loss_of(stored, anchors, model, loss)
    if anchors is not None and (others := _others(stored, anchors, model)):
        return others
    given = _by_label(stored, inputs, problems)
    missing = [label for label in _labels(stored) if label not in given]
    if missing:
        raise IncompatibleAdaptersError(f"the inputs {missing} are not among the given folders")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again"
        try:
            merged = merge(
                {label: given[label] for label in _labels(stored)},
                anchors,
                model,
                method=parse(stored.recipe["method"], functions),
                weights={entry["label"]: entry["weight"] for entry in stored.inputs},
                scale=stored.recipe["scale"],
                rank=stored.recipe["rank"],
                loss=loss,
                modules_to_save=stored.recipe["modules_to_save"],
                base_model=stored.recipe["base_model"],
                device=device,
                progress=False,
            )
            merged.save_pretrained(again, **dict(stored.recipe.get("written", {})))
        except SapmergeError:
            raise
        except (
            Exception
        ) as error:  # the recipe is anybody's text: it may ask for what no part can do
            raise AdapterFormatError(
                f"output {shown(os.fspath(path))}: the recipe in its metadata cannot be run: "
                f"{type(error).__name__}: {error}"
            ) from error
        by = "" if stored.version == __version__ else f" (written by sapmerge {stored.version})"
        if (again / CONFIG).read_bytes() != (Path(path) / CONFIG).read_bytes():
            problems.append(f"{CONFIG} differs{by}")
        if _without_anchors(again / WEIGHTS) != _without_anchors(Path(path) / WEIGHTS):
            problems.append(f"{WEIGHTS} differs{by}")
        elif not says_the_same(stored.anchors, read_provenance(again).anchors):
            problems.append(
                f"what {WEIGHTS} says of losses and decisions is not what the merge gives{by}"
            )
    return problems


def _loss_of(stored: Provenance, anchors: Any, model: Any, loss: Loss | None) -> Loss | None:
    """The loss of the merge.

    Raises:
        AnchorError: it read anchors and none are given, or the other way round; its loss is no
            loss of this library and is not given.
    """
    name = stored.recipe["loss"]
    if name is None:
        if anchors is not None:
            raise AnchorError("the merge read no anchors: leave anchors= out")
        return None
    if anchors is None or model is None:
        raise AnchorError(
            f"the merge read {_told(stored.anchors)}, which the output does not contain: pass "
            "anchors= and model="
        )
    if loss is None and name not in NAMED:
        raise AnchorError(f"the loss of the merge was a function {shown(name)}: pass loss=")
    return NAMED[name] if loss is None else loss


def _told(said: Mapping[str, Any] | None) -> str:
    if said is None:
        return "anchors and a model"
    return (
        f"{said['count']} anchors in {said['batches']} batches (sha256 {said['anchors'][:12]}) "
        f"and a model (sha256 {(said['model'] or 'not known')[:12]})"
    )


def _others(stored: Provenance, anchors: Any, model: Any) -> list[str]:
    """What is wrong with the anchors and the model."""
    said = stored.anchors
    if said is None:
        return ["the metadata of the output does not say which anchors and model it was made with"]
    problems: list[str] = []
    batches = Batches(anchors, torch.device("cpu"))
    if batches.content != said["anchors"]:
        count = sum(batch_size(batch) for batch in batches)
        problems.append(
            f"these are not the anchors of the merge: {count} in {len(batches)} batches (sha256 "
            f"{batches.content[:12]}); it read {said['count']} in {said['batches']} batches "
            f"(sha256 {said['anchors'][:12]})"
        )
    with exclusive(model) as base:
        digest = digest_of_weights(base)
    if said["model"] not in (None, digest):
        problems.append(
            f"this is not the model of the merge: the sha256 of its weights is {digest[:12]}; it "
            f"was {said['model'][:12]}"
        )
    return problems


def _without_anchors(path: Path) -> tuple[object, bytes]:
    """The header without what it says of the anchors (compared as numbers), and the rest."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header["__metadata__"].pop(ANCHORS_KEY, None)
    return header, raw[start:]


def _labels(found: Provenance) -> list[str]:
    return [entry["label"] for entry in found.inputs]


def _by_label(
    found: Provenance, inputs: Sequence[str | os.PathLike[str]], problems: list[str]
) -> dict[str, str | os.PathLike[str]]:
    """Label -> folder, by the sha256 of the files; folders that were not inputs become problems."""
    if isinstance(inputs, (str, bytes, os.PathLike)) or not isinstance(inputs, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(f"the inputs are a list of folders; got {shown(inputs)}")
    wanted = {entry["label"]: entry for entry in found.inputs}
    given: dict[str, str | os.PathLike[str]] = {}
    for folder in inputs:
        adapter = Adapter.load(folder)
        files = dict(adapter.files)
        label = next(
            (
                label
                for label, entry in wanted.items()
                if entry["files"] == files and label not in given
            ),
            None,
        )
        if label is None:
            problems.append(
                f"{os.fspath(folder)!r} is not an input of this output, or it has changed"
            )
            continue
        given[label] = folder
        if wanted[label]["digest"] != adapter.digest:
            problems.append(
                f"the metadata has another digest of the update of {label!r} than its files give"
            )
    return given
