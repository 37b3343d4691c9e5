"""Was this output made from these inputs? `verify` compares digests, `reproduce` merges again and compares bits."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapmerge.errors import AnchorError, IncompatibleAdaptersError
from sapmerge.io.adapter import CONFIG, WEIGHTS, Adapter
from sapmerge.io.provenance import Provenance, read_provenance
from sapmerge.merging.merge import merge
from sapmerge.parsing import parse
from sapmerge.version import __version__

__all__ = ["reproduce", "verify"]


def verify(path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """What is wrong with an output of sapmerge.

    Args:
        path: the output's folder.
        inputs: folders of the adapters it was made from, in any order; all of them, or none to check the output alone.

    Returns:
        One line per problem; empty if the output is intact and was made from exactly these inputs.

    Raises:
        SapmergeError: the output or an input cannot be read, or the output is not one of sapmerge.
    """
    found = read_provenance(path)
    problems = list(found.problems)
    if inputs:
        given = _by_label(found, inputs, problems)
        missing = [label for label in _labels(found) if label not in given]
        problems += [f"input {label!r} is not among the given folders" for label in missing]
    return problems


def reproduce(
    path: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> list[str]:
    """Run the stored recipe on the inputs again and compare the bits.

    Args:
        path: the output's folder.
        inputs: folders of the adapters it was made from, in any order.
        functions: your own functions, by the "module:qualname" under which the recipe names them.

    Returns:
        One line per difference; empty if the bytes of config and weights are the same.

    Raises:
        AnchorError: the merge read anchors, which no output contains.
        IncompatibleAdaptersError: an input is missing.
        SapmergeError: whatever the merge itself refuses.
    """
    found, problems = read_provenance(path), list[str]()
    if found.recipe.get("loss") is not None:
        raise AnchorError("the merge read anchors and a model, which the output does not contain: run it from Python")
    given = _by_label(found, inputs, problems)
    missing = [label for label in _labels(found) if label not in given]
    if missing:
        raise IncompatibleAdaptersError(f"the inputs {missing} are not among the given folders")
    recipe = found.recipe
    merged = merge(
        {label: given[label] for label in _labels(found)},
        method=parse(str(recipe["method"]), functions),
        weights={str(entry["label"]): float(entry["weight"]) for entry in found.inputs},
        scale=recipe["scale"],
        rank=recipe["rank"],
        modules_to_save=recipe["modules_to_save"],
        base_model=recipe["base_model"],
        progress=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(Path(folder) / "again")
        problems += [
            f"{name} differs" + ("" if found.version == __version__ else f" (written by sapmerge {found.version})")
            for name in (CONFIG, WEIGHTS)
            if (Path(folder) / "again" / name).read_bytes() != (Path(path) / name).read_bytes()
        ]
    return problems


def _labels(found: Provenance) -> list[str]:
    return [str(entry["label"]) for entry in found.inputs]


def _by_label(
    found: Provenance, inputs: Sequence[str | os.PathLike[str]], problems: list[str]
) -> dict[str, str | os.PathLike[str]]:
    """Label -> folder, by the sha256 of the files; folders that were not inputs become problems."""
    wanted = {str(entry["label"]): dict(entry["files"]) for entry in found.inputs}
    given: dict[str, str | os.PathLike[str]] = {}
    for folder in inputs:
        files = dict(Adapter.load(folder).files)
        label = next((label for label, known in wanted.items() if known == files and label not in given), None)
        if label is None:
            problems.append(f"{os.fspath(folder)!r} is not an input of this output, or it has changed")
        else:
            given[label] = folder
    return given
