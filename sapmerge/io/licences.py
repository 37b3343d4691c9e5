"""The licence that the model card beside an adapter states.

The card is a stranger's text: so many bytes of it are read, as lines, and only what has the form of
a licence's name is believed to be one. It is not parsed as YAML, whose references can make much out
of little.
"""

from __future__ import annotations

import os
import re

from sapmerge.errors import SapmergeError
from sapmerge.io.files import RegularFile

__all__ = ["CARD", "licence_of"]

CARD = "README.md"
_MOST = 1 << 16
_NAME = r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}"
_SCALAR = re.compile(rf"\s*(?:({_NAME})|'({_NAME})'|\"({_NAME})\")\s*(?:\s#.*)?")


def licence_of(folder: str | os.PathLike[str]) -> str | None:
    """What the front matter of a folder's README.md says of its licence, as the Hub reads it:
    `license`, a name or several, and `license_name` where that is `other`. None if it says nothing,
    or nothing that has the form of a name.

    Example:
        >>> import pathlib, tempfile
        >>> from sapmerge.io.licences import licence_of
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = "---\\nlicense: other\\nlicense_name: llama3\\n---\\n"
        ...     _ = (pathlib.Path(folder) / "README.md").write_text(text)
        ...     licence_of(folder)
        'other (llama3)'
    """
    path = os.path.join(folder, CARD)
    try:
        with RegularFile(path, CARD) as file:
            text = bytes(file.read(0, min(file.size, _MOST))).decode(errors="replace")
    except SapmergeError:  # there is none, or it is no file
        return None
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return None
    ends = [k for k, line in enumerate(lines) if k and line.rstrip() == "---"]
    if not ends:
        return None
    names = _values("license", lines[1 : ends[0]])
    if names == ["other"]:
        names = [f"other ({name})" for name in _values("license_name", lines[1 : ends[0]])] or names
    return ", ".join(names) or None


def _values(key: str, lines: list[str]) -> list[str]:
    """The names of a top-level key: `key: a`, `key: [a, b]`, or `- a` on the lines that follow;
    none if one of them is no name, or the key stands there twice.
    """
    places = [k for k, line in enumerate(lines) if line.startswith(f"{key}:")]
    if len(places) != 1:
        return []
    place = places[0]
    given = lines[place].partition(":")[2].strip()
    if given.startswith("[") and given.endswith("]"):
        parts = given[1:-1].split(",")
    elif given:
        parts = [given]
    else:
        parts = list[str]()
        for line in lines[place + 1 :]:
            if not re.match(r"\s*-\s", line):
                break
            parts.append(line.strip()[1:])
    found = [_SCALAR.fullmatch(part) for part in parts]
    if not all(found):
        return []
    return [next(filter(None, match.groups())) for match in found if match]
