"""hf://user/name@revision, and with `--hub` user/name, where a folder may stand."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from sapmerge.errors import MethodError

__all__ = ["ADAPTER", "SCHEME", "add_hub_option", "local", "place_of", "with_hub"]

SCHEME = "hf://"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_FILES = (".safetensors", ".pt")


def add_hub_option(parser: Any) -> None:
    """The flag."""
    parser.add_argument(
        "--hub", action="store_true", help="user/name that is no folder is of the Hub"
    )


def with_hub(arguments: Sequence[str]) -> list[str]:
    """`--hub`: hf:// before what is called user/name and is no folder."""
    found = list[str]()
    for argument in arguments:
        label, separator, text = argument.rpartition("=")
        named = re.fullmatch(r"[\w.-]+/[\w.-]+(?:/[\w./-]+)?(?:@[\w./-]+)?", text)
        if named and not os.path.lexists(text) and not os.path.lexists(argument):
            text = f"{SCHEME}{text}"
        found.append(f"{label}{separator}{text}")
    return found


def place_of(text: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and subfolder of hf://user/name/subfolder@revision.

    Raises:
        MethodError: it is none.
    """
    name, _, revision = text.removeprefix(SCHEME).partition("@")
    owner, _, rest = name.partition("/")
    repository, _, subfolder = rest.partition("/")
    if not owner or not repository:
        raise MethodError(f"{text!r}: expected hf://user/name, or hf://user/name@revision")
    return f"{owner}/{repository}", revision or None, subfolder or None


def local(
    text: str,
    options: argparse.Namespace,
    names: Sequence[str] = ADAPTER,
    optional: Sequence[str] = (),
) -> str:
    """A path as it is; of hf://user/name the folder of these files, downloaded into the Hub's
    cache, and of hf://user/name/style.safetensors that file.

    Args:
        names: files that the repository must have.
        optional: files that it may have; they lie beside a file that is named, too.

    Raises:
        MethodError, AdapterFormatError: no such name, or what the Hub says.
    """
    (text,) = with_hub([text]) if options.hub else [text]
    if not text.startswith(SCHEME):
        return text
    from sapmerge.io.hub import downloaded

    repository, revision, inside = place_of(text)
    if inside is None or not inside.endswith(_FILES):
        return downloaded(repository, names, optional=optional, revision=revision, subfolder=inside)
    folder, _, name = inside.rpartition("/")
    found = downloaded(
        repository, (name,), optional=optional, revision=revision, subfolder=folder or None
    )
    return os.path.join(found, name)
