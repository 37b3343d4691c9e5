"""Was this output made from these inputs? `verify` compares digests,
`reproduce` merges again and compares bits.

What an output says about itself is a claim: whoever can write tensors can write metadata that fits
them. So `verify` tells that nothing was damaged or mixed up since,
and only `reproduce` that the tensors are what the recipe gives.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from sapmerge.io.provenance import Provenance, read_provenance
from sapmerge.merging.merge import Merged, merge
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
) -> list[str]:
    """Run the stored recipe on the inputs again and compare the bits.

    Args:
        path: the output's folder.
        inputs: folders of the adapters it was made from, in any order.
        functions: your own functions, by the "module:qualname" under which the recipe names them.
        model: the base, or its folder, where the merge was given one: DoRA and other kinds need its
            weights, and the output spells its modules.

    Returns:
        One line per difference; empty if the bytes of config and weights are the same.

    Raises:
        AnchorError: the merge read anchors, which no output contains.
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
    if stored.recipe.get("loss") is not None:
        raise AnchorError(
            "the merge read anchors and a model, which the output does not contain: run it from "
            "Python"
        )
    given = _by_label(stored, inputs, problems)
    missing = [label for label in _labels(stored) if label not in given]
    if missing:
        raise IncompatibleAdaptersError(f"the inputs {missing} are not among the given folders")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again"
        try:
            _merged(stored, given, functions, model).save_pretrained(
                again, **dict(stored.recipe.get("written", {}))
            )
        except SapmergeError:
            raise
        except (
            Exception
        ) as error:  # the recipe is anybody's text: it may ask for what no part can do
            raise AdapterFormatError(
                f"output {shown(os.fspath(path))}: the recipe in its metadata cannot be run: "
                f"{type(error).__name__}: {error}"
            ) from error
        problems += [
            f"{name} differs"
            + ("" if stored.version == __version__ else f" (written by sapmerge {stored.version})")
            for name in (CONFIG, WEIGHTS)
            if (again / name).read_bytes() != (Path(path) / name).read_bytes()
        ]
    return problems


def _merged(
    found: Provenance,
    given: Mapping[str, str | os.PathLike[str]],
    functions: Mapping[str, Callable[..., Any]] | None,
    model: Any,
) -> Merged:
    recipe = found.recipe
    return merge(
        {label: given[label] for label in _labels(found)},
        method=parse(recipe["method"], functions),
        weights={entry["label"]: entry["weight"] for entry in found.inputs},
        scale=recipe["scale"],
        rank=recipe["rank"],
        modules_to_save=recipe["modules_to_save"],
        base_model=recipe["base_model"],
        model=model,
        progress=False,
    )


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
