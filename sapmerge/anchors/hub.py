"""Anchors of a data set of the Hub, or of any other that the package `datasets` opens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sapmerge.anchors.folders import IMAGE_COLUMNS, TEXT_COLUMNS, Pair
from sapmerge.errors import AnchorError, printable

__all__ = ["read_dataset"]


def read_dataset(
    dataset: str | Iterable[Mapping[str, Any]],
    split: str = "train",
    revision: str | None = None,
    image: str | None = None,
    text: str | None = None,
) -> list[Pair]:
    """The pairs of a data set with a column of images and one of captions.

    Args:
        dataset: a name of the Hub or a folder, opened by `datasets.load_dataset`; or one that is
            open: an iterable of rows.
        split: as in `datasets`, e.g. "train[:32]". All of its images are held in memory.
        revision: a commit, tag or branch of the Hub.
        image: the column of images; by default one called image, file_name, file or path.
        text: the column of captions; by default one called text, caption, title or prompt. Of
            several captions of one image the first is taken.

    Returns:
        Pairs of PIL images (or paths) and texts: a pool for `coreset`, or for `write_folder`.

    Raises:
        AnchorError: `datasets` is not installed; the Hub cannot be reached and the data set is not
            in the cache; a row without image or text.

    Example:
        >>> from sapmerge import anchors
        >>> anchors.read_dataset([{"image": "a.jpg", "caption": ["an ape", "a monkey"]}])
        [Pair(image='a.jpg', text='an ape', weight=None)]
    """
    name = repr(dataset) if isinstance(dataset, str) else "the data set"
    rows = _loaded(dataset, split, revision) if isinstance(dataset, str) else dataset
    pairs = list[Pair]()
    for number, row in enumerate(rows, 1):
        picture = _column(row, image, IMAGE_COLUMNS)
        caption = _column(row, text, TEXT_COLUMNS)
        if isinstance(caption, Sequence) and not isinstance(caption, str):
            caption = next(iter(cast("Sequence[object]", caption)), None)
        if picture is None or not isinstance(caption, str) or not caption.strip():
            raise AnchorError(
                f"{name}, row {number}: has no image or no caption; its columns are "
                f"{printable(', '.join(map(str, row)))}"
            )
        pairs.append(Pair(picture, caption.strip()))
    if not pairs:
        raise AnchorError(f"{name}: the split {split!r} has no rows")
    return pairs


def _column(row: Mapping[str, Any], name: str | None, usual: Sequence[str]) -> Any:
    return next((row[key] for key in ((name,) if name else usual) if key in row), None)


def _loaded(name: str, split: str, revision: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise AnchorError(
            f"{name!r} is opened by the package datasets: pip install datasets; or give a folder "
            "of images with captions"
        ) from None
    library = cast("Any", datasets)
    try:
        return library.load_dataset(name, split=split, revision=revision)
    except (OSError, ValueError) as error:  # offline and not in the cache, no such name, no split
        raise AnchorError(
            f"the data set {name!r} (split {split!r}) cannot be opened: "
            f"{printable(' '.join(str(error).split()))}. Without a network only what is in the "
            "cache of datasets can be"
        ) from None
