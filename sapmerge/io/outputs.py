"""Which folders may become an output: none that holds an input, and to be replaced only what is an
earlier output and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import cast

from sapmerge.errors import OutputError

__all__ = [
    "ADAPTER",
    "ADAPTERS",
    "CARD_NAME",
    "CONFIG_NAME",
    "TENSORS_NAME",
    "Kind",
    "as_path",
    "check_apart",
]

CONFIG_NAME = "adapter_config.json"  # what makes a folder a checkpoint, and safe to replace
TENSORS_NAME, CARD_NAME = "adapter_model.safetensors", "README.md"


@dataclass(frozen=True)
class Kind:
    """A kind of output, and what `overwrite=True` may delete with an earlier one.

    Args:
        what: for messages.
        marker: the file without which a folder is none of its kind.
        files: folder -> the names of the files that belong to it; whatever else lies there is
            somebody's, and is not deleted with it.
    """

    what: str
    marker: str
    files: Callable[[str], Collection[str]]

    def require(self, folder: str, path: str) -> None:
        """Refuse to replace a folder that holds anything but an earlier output.

        Args:
            folder: where it is now.
            path: how messages name it.
        """
        with os.scandir(folder) as entries:
            content = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        if content and self.marker not in content:
            raise OutputError(
                f"{path!r} holds {len(content)} entries but no {self.marker}: it is not "
                f"{self.what} and is not replaced, even with overwrite=True; give another path"
            )
        own = self.files(folder) if content else ()
        foreign = sorted(entry for entry, inside in content.items() if inside or entry not in own)
        if foreign:
            listed = ", ".join(map(repr, foreign[:5])) + (
                f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            )
            raise OutputError(
                f"{path!r} holds more than {self.what}: {listed}; overwrite=True would delete "
                "that, too. Move it away, or give another path"
            )


_OF_AN_ADAPTER = (CONFIG_NAME, TENSORS_NAME, CARD_NAME, "adapter_model.bin")
ADAPTER = Kind("an adapter", CONFIG_NAME, lambda _: _OF_AN_ADAPTER)


class _Folders(Kind):
    """A folder with nothing but folders in it, each of them an adapter."""

    def require(self, folder: str, path: str) -> None:
        with os.scandir(folder) as entries:
            content = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        for entry, inside in sorted(content.items()):
            if not inside:
                raise OutputError(
                    f"{path!r} holds {entry!r}: it is not {self.what} and is not replaced, even "
                    "with overwrite=True; give another path"
                )
            ADAPTER.require(os.path.join(folder, entry), os.path.join(path, entry))


ADAPTERS = _Folders("a folder of adapters", ADAPTER.marker, ADAPTER.files)


def as_path(path: object) -> str:
    """The path of an output as text.

    Raises:
        OutputError: it is none.
    """
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise OutputError(f"an output is the path of a folder; got a {type(path).__name__}")
    text = os.fsdecode(cast("str | bytes | os.PathLike[str]", path))
    if "\0" in text:
        raise OutputError(f"{text!r}: the output path contains a NUL character")
    return text


def check_apart(
    path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str] | None]
) -> None:
    """Refuse an output that is or holds an input.

    Args:
        inputs: folders; None for what lies in memory.

    Raises:
        OutputError: it does.
    """
    path = as_path(path)
    output = os.path.realpath(path)
    for given in inputs:
        folder = None if given is None else os.path.realpath(given)
        if folder == output:
            raise OutputError(f"the output {path!r} is one of the inputs; write to another folder")
        if folder is not None and folder.startswith(os.path.join(output, "")):
            raise OutputError(
                f"the output {path!r} holds the input {folder!r}; write to another folder"
            )
