"""What an output says about itself: the recipe and the inputs in its metadata,
checked against its bytes.

The metadata is a claim of whoever wrote the file.
It is read by one schema, and what does not fit it is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from sapmerge.errors import AdapterFormatError, SapmergeError
from sapmerge.io.adapter import Adapter
from sapmerge.io.engines import ENGINES
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, shown
from sapmerge.io.folder import BESIDE, CONFIG, PICKLE, WEIGHTS
from sapmerge.io.names import STYLES
from sapmerge.io.strict_json import parse
from sapmerge.io.writing import (
    CONFIG_DIGEST_KEY,
    OUTPUT_DTYPES,
    TENSORS_DIGEST_KEY,
    digest_of,
)

__all__ = ["ANCHORS_KEY", "Provenance", "read_provenance"]

ANCHORS_KEY = "sapmerge.anchors"
_CHUNK = 1 << 22
# characters per comma in a list of inputs: each has a digest of 64. More commas are no such list
_SHORTEST = 32
_KEY = re.compile(r"[A-Za-z0-9._ -]{1,64}")
_LABEL, _SHA256 = re.compile(r"[A-Za-z0-9._-]{1,64}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Provenance:
    """The metadata of an output of sapmerge.

    Args:
        version: of the library that wrote it.
        recipe: the call: method, weights, scale, rank, base_model, modules_to_save, loss, and how
            it was written (`names` and the like) if not by default.
        inputs: label, digest, weight, and file name -> sha256 of every adapter that went in.
        problems: what does not agree with the bytes, or with itself; empty for an intact output.
        anchors: of a merge with anchors: the sha256 of the anchors and of the model's weights,
            how many they are in how many batches, the losses, and what the method decided.
    """

    version: str
    recipe: Mapping[str, Any]
    inputs: Sequence[Mapping[str, Any]]
    problems: tuple[str, ...]
    anchors: Mapping[str, Any] | None = None


def read_provenance(path: str | os.PathLike[str]) -> Provenance:
    """Read an output as any adapter is read, then compare its bytes with the digests
    in its metadata.

    Raises:
        AdapterFormatError: it was not written by sapmerge, or its metadata is not of the form that
            sapmerge writes.
        SapmergeError: it cannot be read as an adapter at all.
    """
    files = Adapter.load(path).files  # whatever is wrong with the files is refused here
    folder = os.fsdecode(path)
    where = f"output {shown(folder)}"
    with RegularFile(os.path.join(folder, WEIGHTS), f"{where}, {WEIGHTS}") as file:
        length = int.from_bytes(file.read(0, 8), "little")
        header = cast("dict[str, Any]", json.loads(file.read(8, length)))
        metadata = cast("dict[str, str]", header.pop("__metadata__", {}))
        if "sapmerge.recipe" not in metadata:
            raise AdapterFormatError(
                f"{where}: was not written by sapmerge (its metadata holds no recipe)"
            )
        stored = {
            name: _hash(file, 8 + length, entry["data_offsets"]) for name, entry in header.items()
        }
    problems: list[str] = []
    if metadata.get(CONFIG_DIGEST_KEY) != files[CONFIG]:
        problems.append(f"{CONFIG} is not the one that was written")
    if metadata.get(TENSORS_DIGEST_KEY) != digest_of(stored):
        problems.append(f"the tensors of {WEIGHTS} are not those that were written")
    recipe = _recipe(metadata["sapmerge.recipe"], f"{where}, the recipe in its metadata")
    inputs = _inputs(metadata.get("sapmerge.inputs", ""), f"{where}, the inputs in its metadata")
    labels = [entry["label"] for entry in inputs]
    if len(set(labels)) != len(labels):
        problems.append("two inputs have one label")
    if recipe["weights"] != {entry["label"]: entry["weight"] for entry in inputs}:
        problems.append("the weights of the recipe are not those of the inputs")
    anchors = None
    if ANCHORS_KEY in metadata:
        what = f"{where}, the anchors in its metadata"
        anchors = _fitting(_table(metadata[ANCHORS_KEY], what), _ANCHORS, what)
        if recipe["loss"] is None:
            problems.append("the metadata has anchors, and the recipe no loss")
    version = metadata.get("sapmerge.version", "?")
    return Provenance(version, recipe, inputs, tuple(problems), anchors)


def _recipe(text: str, where: str) -> Mapping[str, Any]:
    return _fitting(_table(text, where), _RECIPE, where)


def _inputs(text: str, where: str) -> Sequence[Mapping[str, Any]]:
    if text.count(",") * _SHORTEST > len(text):
        raise AdapterFormatError(f"{where}: is not the list of inputs that sapmerge writes")
    inputs = _table(f'{{"inputs": {text}}}', where, len(text) * 4 + 64)["inputs"]
    entries = cast("list[object]", inputs) if isinstance(inputs, list) else []
    if not entries:
        raise AdapterFormatError(f"{where}: is not the list of inputs that sapmerge writes")
    return [_fitting(entry, _INPUT, f"{where}, number {k}") for k, entry in enumerate(entries)]


def _table(text: str, where: str, most: int = DEFAULT_LIMITS.config_bytes) -> dict[str, object]:
    try:
        return parse(
            text.encode(errors="replace"), where, replace(DEFAULT_LIMITS, config_bytes=most)
        )
    except SapmergeError as error:
        raise AdapterFormatError(str(error)) from None


_Check = Callable[[object], bool]
_Schema = Mapping[str, tuple[str, _Check]]


def _fitting(value: object, schema: _Schema, where: str) -> dict[str, Any]:
    """The value, if it is a table of exactly these fields; those of `_OPTIONAL` may be missing."""

    def fail(problem: str) -> NoReturn:
        raise AdapterFormatError(
            f"{where}: {problem}; it was not written by sapmerge, or by another version of it"
        )

    if not isinstance(value, dict):
        fail(f"{shown(value)} is no object")
    table = cast("dict[str, Any]", value)
    for name, (expected, fits) in schema.items():
        if name not in table:
            if name in _OPTIONAL:
                continue
            fail(f"{name!r} is missing")
        if not fits(table[name]):
            fail(f"{name!r} is {shown(table[name])}, expected {expected}")
    unknown = sorted(set(table) - set(schema))
    return table if not unknown else fail(f"{shown(unknown[0])} is not a known field")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: object) -> bool:
    if isinstance(value, float):
        return 0 < value < 1
    return value in (None, "exact") or (
        isinstance(value, int) and not isinstance(value, bool) and value >= 1
    )


def _text(value: object) -> bool:
    return isinstance(value, str)


def _text_or_none(value: object) -> bool:
    return value is None or isinstance(value, str)


def _all(keys: _Check, values: _Check) -> _Check:
    def fits(value: object) -> bool:
        items = (
            cast("dict[object, object]", value).items()
            if isinstance(value, dict)
            else [(None, None)]
        )
        return all(keys(key) and values(one) for key, one in items)

    return fits


def _like(pattern: re.Pattern[str]) -> _Check:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _written(value: object) -> bool:
    table = cast("dict[str, object]", value) if isinstance(value, dict) else {"": None}
    return all(key in _WRITTEN and one in _WRITTEN[key] for key, one in table.items())


_OPTIONAL = {"written"}
_WRITTEN: Mapping[str, tuple[object, ...]] = {
    "names": ("input", *STYLES),
    "uniform_rank": (False,),
    "serving": tuple(ENGINES),
    "dtype": tuple(OUTPUT_DTYPES),
}
_texts = _all(_text, _text)
_RECIPE: _Schema = {
    "method": ("text", _text),
    "weights": ("a finite number for every label", _all(_like(_LABEL), _number)),
    "scale": ("a finite number", _number),
    "rank": ("null, a number >= 1, a share in (0, 1), or 'exact'", _rank),
    "base_model": ("text or null", _text_or_none),
    "modules_to_save": (
        "null, text, or an object of texts",
        lambda value: _text_or_none(value) or _texts(value),
    ),
    "loss": ("text or null", _text_or_none),
    "written": ("how it was written", _written),
}
_INPUT: _Schema = {
    "label": ("a label", _like(_LABEL)),
    "digest": ("a sha256", _like(_SHA256)),
    "weight": ("a finite number", _number),
    "files": (
        "the sha256 of the files",
        _all(lambda name: name in (CONFIG, WEIGHTS, PICKLE, BESIDE), _like(_SHA256)),
    ),
}


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number_or_none(value: object) -> bool:
    return value is None or _number(value)


def _decision(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_like(_LABEL), cast("list[object]", value)))
    return _number(value) or _all(_like(_KEY), _number)(value)


_ANCHORS: _Schema = {
    "anchors": ("a sha256", _like(_SHA256)),
    "model": ("a sha256, or null", lambda value: value is None or _like(_SHA256)(value)),
    "count": ("how many", _count),
    "batches": ("how many", _count),
    "losses": ("a finite number or null for each", _all(_like(_KEY), _number_or_none)),
    "decided": ("numbers, labels, or numbers by label", _all(_like(_KEY), _decision)),
}


def _hash(file: RegularFile, base: int, offsets: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for start in range(base + offsets[0], base + offsets[1], _CHUNK):
        digest.update(file.read(start, min(_CHUNK, base + offsets[1] - start)))
    return digest.hexdigest()
