"""Anchors as a folder of images and captions, which `from_folder` and `--anchors` read."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Sequence
from typing import Any, cast

from sapmerge.anchors.folders import Pair, check_weights, read_captions
from sapmerge.errors import AnchorError
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.files import RegularFile
from sapmerge.io.outputs import Kind, check_apart

__all__ = ["write_folder"]

_CAPTIONS = "captions.jsonl"


def write_folder(
    pairs: Sequence[Pair], path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write pairs as a folder that `from_folder` and `sapmerge merge --anchors` read.

    Images are copied byte for byte under their own names, a second one of a name as `name-2`; PIL
    images become PNG files `image-1.png`, in order. `captions.jsonl` has one line per pair:
    `file_name`, `text` and, if pairs have weights, `weight`. The folder appears whole or not at
    all.

    Args:
        pairs: as `Chosen.among` gives them, or made by hand.
        path: of the folder; its parent must exist.
        overwrite: replace a folder that this function has written.

    Raises:
        AnchorError: no pairs, a text that is empty, weights of some pairs only, an image that is
            neither a path nor a PIL image.
        AdapterFormatError: an image file that cannot be read.
        OutputExistsError: the folder exists, and `overwrite` is false.
        OutputError: it holds one of the images, or something else than such a folder; the disk
            refuses.

    Example:
        >>> from sapmerge import anchors
        >>> pool = anchors.read_folder("photos")  # doctest: +SKIP
        >>> batches = anchors.from_folder("photos", processor)  # doctest: +SKIP
        >>> chosen = anchors.coreset(batches, 32, model)  # doctest: +SKIP
        >>> anchors.write_folder(chosen.among(pool), "anchors")  # doctest: +SKIP
    """
    where = f"the anchors {os.fsdecode(path)!r}"
    if not pairs:
        raise AnchorError(f"{where}: there are no pairs to write")
    check_weights(pairs, where)
    files = [_path_of(pair.image) for pair in pairs]
    check_apart(path, {os.path.dirname(os.path.abspath(file)) for file in files if file})
    names = _names(files)
    with StagedFolder(path, overwrite=overwrite, kind=_KIND) as folder:
        lines = list[str]()
        for pair, file, name in zip(pairs, files, names, strict=True):
            if not pair.text.strip():
                raise AnchorError(f"{where}: the pair of {name!r} has no text")
            row: dict[str, object] = {"file_name": name, "text": pair.text}
            if pair.weight is not None:
                row["weight"] = pair.weight
            lines.append(json.dumps(row) + "\n")
            folder.write(name, _png(pair.image, name, where) if file is None else _bytes(file))
        folder.write(_CAPTIONS, "".join(lines).encode("ascii"))
        folder.publish()


def _path_of(image: object) -> str | None:
    if not isinstance(image, (str, os.PathLike)):
        return None
    return os.fspath(cast("str | os.PathLike[str]", image))


def _names(files: Sequence[str | None]) -> list[str]:
    """A name for each file, distinct also where upper and lower case are one."""
    names, taken = list[str](), {_CAPTIONS}
    for position, file in enumerate(files, 1):
        base = f"image-{position}.png" if file is None else os.path.basename(file)
        stem, ending = os.path.splitext(base)
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}{ending}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _bytes(path: str) -> bytes:
    with RegularFile(path, f"the image {path!r}") as file:
        return bytes(file.read(0, file.size))


def _png(image: Any, name: str, where: str) -> bytes:
    if not hasattr(image, "save") or not hasattr(image, "convert"):
        raise AnchorError(
            f"{where}: {name!r} would be a {type(image).__name__}; expected a path or a PIL image"
        )
    data = io.BytesIO()
    image.convert("RGB").save(data, format="PNG")  # what `from_pairs` makes of it
    return data.getvalue()


def _written(folder: str) -> Collection[str]:
    """The files that belong to a folder of anchors: its captions and the images they name."""
    return {_CAPTIONS, *(pair.image for pair in read_captions(os.path.join(folder, _CAPTIONS)))}


_KIND = Kind("a folder of anchors", _CAPTIONS, _written)
