"""Anchors from files: a folder of images with their captions, or a table."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from sapmerge.anchors.loading import from_pairs
from sapmerge.errors import AnchorError, printable

__all__ = [
    "IMAGE_COLUMNS",
    "TEXT_COLUMNS",
    "Pair",
    "batches",
    "check_weights",
    "from_csv",
    "from_folder",
    "read_captions",
    "read_folder",
]

_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("file_name", "image", "file", "path", "filename", "filepath")
TEXT_COLUMNS = ("text", "caption", "title", "prompt")
_STEMS = ("captions", "metadata")  # the second one is that of imagefolders of the Hub
_WEIGHT_COLUMN = "weight"


@dataclass(frozen=True)
class Pair:
    """An image, its text, and how much the two count among anchors.

    Args:
        image: a path, or a PIL image.
        text: the caption.
        weight: at least 0, in any unit; None where all pairs count the same.
    """

    image: Any
    text: str
    weight: float | None = None


def from_folder(
    folder: str | os.PathLike[str], processor: Any, batch_size: int = 16
) -> list[dict[str, Any]]:
    """Anchor batches from a folder of images and their captions.

    The captions are in the first of these that is there: `captions.json` (file -> caption, or a
    list of objects), `captions.jsonl` (one object per line), `captions.csv`, `captions.txt` (file,
    a tab, caption); the same with `metadata` for `captions`; or `photo.txt` beside each
    `photo.jpg`. Objects and tables name the image `file_name` (or image, file, path) and the
    caption `text` (or caption, title, prompt); a number `weight`, in all of them or in none, says
    how much the pair counts (`weights` of `from_pairs`).

    Args:
        folder: images and captions.
        processor: as in `from_pairs`.
        batch_size: as in `from_pairs`.

    Returns:
        A list of dict batches in the order of the captions: an `anchor_loader` for `merge`.

    Raises:
        AnchorError: no captions, an image without a caption, a caption without its image, weights
            of some pairs only, or a file that cannot be read; the message names it.

    Example:
        >>> from sapmerge import anchors
        >>> loader = anchors.from_folder("photos", processor)  # doctest: +SKIP
    """
    return batches(read_folder(folder), processor, batch_size)


def read_folder(folder: str | os.PathLike[str]) -> list[Pair]:
    """The pairs of a folder, in the order of the captions, before any image is opened.

    Args:
        folder: as `from_folder` reads it.

    Returns:
        Pairs whose images are paths; the pool that anchors are chosen from, see `write_folder`.

    Raises:
        AnchorError: as `from_folder`.

    Example:
        >>> from sapmerge import anchors
        >>> pool = anchors.read_folder("photos")  # doctest: +SKIP
    """
    root = os.fspath(folder)
    try:
        present = sorted(os.listdir(root))
    except OSError as error:
        raise AnchorError(f"the anchors {root!r}: {error.strerror or error}") from None
    images = [name for name in present if _is_image(name)]
    tables = [f"{stem}{ending}" for stem in _STEMS for ending in _READERS]
    found = next((name for name in tables if name in present), None)
    if found is not None:
        pairs = read_captions(os.path.join(root, found))
    else:
        pairs = [Pair(name, _beside(root, name, present)) for name in images]
    if not pairs:
        raise AnchorError(f"the anchors {root!r}: the folder holds no image and no captions")
    if found is None:
        _no_deeper(root, present)
    left = sorted(set(images) - {os.path.normpath(pair.image) for pair in pairs})
    if left:
        raise AnchorError(
            f"the anchors {root!r}: {len(left)} images have no caption in {found}, the first is "
            f"{left[0]!r}; write one, or move the image away"
        )
    return _placed(root, pairs)


def _no_deeper(root: str, present: Sequence[str]) -> None:
    """Images of subfolders are no anchors where captions lie beside images: that is said."""
    for name in present:
        folder = os.path.join(root, name)
        if name.startswith(".") or not os.path.isdir(folder):
            continue
        below = next((file for file in sorted(os.listdir(folder)) if _is_image(file)), None)
        if below is not None:
            raise AnchorError(
                f"the anchors {root!r}: the subfolder {name!r} holds images, such as {below!r}, "
                "and captions beside images are read in one folder; name those images in a "
                "captions.csv, or move the subfolder away"
            )


def _is_image(name: str) -> bool:
    return name.lower().endswith(_IMAGES)


def from_csv(
    path: str | os.PathLike[str], processor: Any, batch_size: int = 16
) -> list[dict[str, Any]]:
    """Anchor batches from a table with one image and its caption per row.

    Args:
        path: a file with a header, as `captions.csv` of `from_folder`; images lie where it says,
            seen from its own folder.
        processor: as in `from_pairs`.
        batch_size: as in `from_pairs`.

    Raises:
        AnchorError: as `from_folder`.

    Example:
        >>> from sapmerge import anchors
        >>> loader = anchors.from_csv("photos/table.csv", processor)  # doctest: +SKIP
    """
    file = os.fspath(path)
    pairs = _placed(os.path.dirname(file) or ".", _read_csv(file))
    return batches(pairs, processor, batch_size)


def _placed(root: str, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with the full paths of their images, which are there."""
    placed = [replace(pair, image=os.path.join(root, pair.image)) for pair in pairs]
    for pair in placed:
        if not os.path.isfile(pair.image):
            raise AnchorError(f"the anchors {root!r}: there is no image {pair.image!r}")
    return placed


def batches(pairs: Sequence[Pair], processor: Any, batch_size: int) -> list[dict[str, Any]]:
    """Pairs as an `anchor_loader`."""
    if importlib.util.find_spec("PIL") is None:
        raise AnchorError("images need pillow: pip install pillow")
    images, texts = [pair.image for pair in pairs], [pair.text for pair in pairs]
    weights = [pair.weight for pair in pairs if pair.weight is not None]
    return from_pairs(images, texts, processor, batch_size, weights or None)


def _beside(root: str, image: str, present: Sequence[str]) -> str:
    name = f"{os.path.splitext(image)[0]}.txt"
    if name not in present:
        raise AnchorError(
            f"the anchors {root!r} have no captions: expected captions.json, .jsonl, .csv or .txt, "
            f"or {name!r} beside {image!r}"
        )
    path = os.path.join(root, name)
    return _caption(_text(path), path, image)


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeError) as error:
        raise AnchorError(f"the captions {path!r} cannot be read: {error}") from None


def _lines(path: str) -> list[str]:
    """The lines of a file. Unlike `str.splitlines` it leaves a caption whole that has one of
    Unicode's other separators in it, as texts from the web do.
    """
    return re.split(r"\r\n|\r|\n", _text(path))


def read_captions(path: str) -> list[Pair]:
    """The pairs of one file of captions, with images as it names them."""
    return _READERS[os.path.splitext(path)[1]](path)


def _read_json(path: str) -> list[Pair]:
    data = _parsed(_text(path), path)
    if isinstance(data, Mapping):
        table = cast("Mapping[str, Any]", data)
        return [Pair(name, _caption(text, path, name)) for name, text in table.items()]
    if not isinstance(data, list):
        raise AnchorError(f"the captions {path!r}: expected file -> caption, or a list of objects")
    return _rows(cast("list[Any]", data), path)


def _read_lines(path: str) -> list[Pair]:
    lines = [line for line in _lines(path) if line.strip()]
    return _rows([_parsed(line, path) for line in lines], path)


def _parsed(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnchorError(f"the captions {path!r} are not JSON: {error}") from None


def _read_csv(path: str) -> list[Pair]:
    try:
        return _rows(list(csv.DictReader(io.StringIO(_text(path), newline=""))), path)
    except csv.Error as error:
        raise AnchorError(f"the captions {path!r} are no table: {error}") from None


def _read_tabs(path: str) -> list[Pair]:
    pairs = list[Pair]()
    for number, line in enumerate(_lines(path), 1):
        name, tab, text = line.partition("\t")
        if not tab and line.strip():
            raise AnchorError(f"the captions {path!r}, line {number}: expected file, tab, caption")
        if tab:
            pairs.append(Pair(name.strip(), _caption(text, path, name)))
    return pairs


def _rows(rows: Iterable[Any], path: str) -> list[Pair]:
    pairs = list[Pair]()
    for number, row in enumerate(rows, 1):
        table = cast("Mapping[str, Any]", row if isinstance(row, Mapping) else {})
        image = next((table[name] for name in IMAGE_COLUMNS if name in table), None)
        text = next((table[name] for name in TEXT_COLUMNS if name in table), None)
        if not isinstance(image, str) or text is None:
            raise AnchorError(
                f"the captions {path!r}, entry {number}: expected file_name and text; it has "
                f"{printable(str(sorted(map(str, table))))}"
            )
        weight = _weight(table[_WEIGHT_COLUMN], path, image) if _WEIGHT_COLUMN in table else None
        pairs.append(Pair(image, _caption(text, path, image), weight))
    check_weights(pairs, f"the captions {path!r}")
    return pairs


def check_weights(pairs: Sequence[Pair], where: str) -> None:
    """Refuse weights that are no weights of all pairs.

    Raises:
        AnchorError: some pairs have one and others do not, one is negative or not finite, or all
            are 0.
    """
    given = [pair.weight for pair in pairs if pair.weight is not None]
    if not given:
        return
    if len(given) < len(pairs):
        raise AnchorError(f"{where}: {len(given)} of {len(pairs)} pairs have a weight; all or none")
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or sum(given) == 0:
        raise AnchorError(f"{where}: weights are finite numbers, at least 0, and not all of them 0")


def _weight(value: object, path: str, image: str) -> float | None:
    if value is None:  # a row of a table that ends early
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise AnchorError(
            f"the captions {path!r}: the weight of {image!r} is {printable(repr(value))}, not a "
            "number; a column that means something else needs another name"
        ) from None


def _caption(text: object, path: str, image: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise AnchorError(f"the captions {path!r}: {image!r} has no text")
    return text.strip()


_READERS: Mapping[str, Callable[[str], list[Pair]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".txt": _read_tabs,
}
