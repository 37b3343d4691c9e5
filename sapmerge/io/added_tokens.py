"""Which tokens a tokenizer beside an adapter has added to its base's vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

from sapmerge.errors import SapmergeError
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile
from sapmerge.io.strict_json import parse

__all__ = ["TOKENIZER_FILES", "added_tokens"]

TOKENIZER_FILES = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")
"""The smallest first: the first that tells is enough. tokenizer.json holds a whole vocabulary."""

_LIMITS = replace(DEFAULT_LIMITS, config_bytes=64 << 20)


def added_tokens(folder: str) -> Mapping[int, str]:
    """Row of the embeddings -> the token that a tokenizer has added there; empty where no file
    tells, or where it cannot be read: nothing of an update depends on it.

    Args:
        folder: of an adapter. The files of `TOKENIZER_FILES` are opened, as JSON, and no other.
    """
    for name in TOKENIZER_FILES:
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            continue
        try:
            with RegularFile(path, name) as file:
                raw = bytes(file.read(0, min(file.size, _LIMITS.config_bytes + 1)))
            found = dict(_tokens(parse(raw, name, _LIMITS)))
        except SapmergeError:
            continue
        if found:
            return found
    return {}


def _tokens(table: Mapping[str, object]) -> Iterator[tuple[int, str]]:
    """From {"token": 7}, {"added_tokens_decoder": {"7": {"content": "token"}}} or
    {"added_tokens": [{"id": 7, "content": "token"}]}.
    """
    decoder, listed = table.get("added_tokens_decoder"), table.get("added_tokens")
    if isinstance(decoder, dict):
        for key, one in cast("dict[str, object]", decoder).items():
            content = _content(one)
            if key.isascii() and key.isdigit() and len(key) < 10 and content is not None:
                yield int(key), content
    elif isinstance(listed, list):
        for one in cast("list[object]", listed):
            content = _content(one)
            row = cast("dict[str, object]", one).get("id") if isinstance(one, dict) else None
            if isinstance(row, int) and content is not None:
                yield row, content
    else:
        for token, row in table.items():
            if isinstance(row, int) and not isinstance(row, bool):
                yield row, token


def _content(one: object) -> str | None:
    content = cast("dict[str, object]", one).get("content") if isinstance(one, dict) else None
    return content if isinstance(content, str) else None
