"""Untrusted JSON: one object, UTF-8, no duplicate keys, no NaN, no depth,
no numbers of 5000 digits.
"""

from __future__ import annotations

import json
import math
from typing import NoReturn, cast

from sapmerge.errors import AdapterConfigError, LimitExceededError
from sapmerge.io.files import Limits, shown

__all__ = ["parse"]


def parse(raw: bytes, where: str, limits: Limits) -> dict[str, object]:
    """The JSON object in these bytes, or an error that names `where`."""
    if len(raw) > limits.config_bytes:
        raise LimitExceededError(
            f"{where}: {len(raw)} bytes; at most {limits.config_bytes} are read"
        )

    def fail(problem: str) -> NoReturn:
        raise AdapterConfigError(f"{where}: {problem}")

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(items)
        if len(table) < len(items):
            seen: set[str] = set()
            twice = next(name for name, _ in items if name in seen or seen.add(name))
            fail(f"key {shown(twice)} is a duplicate")
        return table

    def whole(text: str) -> int:
        return int(text) if len(text) <= 20 else fail(f"a number of {len(text)} digits")

    def real(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else fail(f"the number {shown(text)} is too large")

    try:
        text = raw.decode("utf-8-sig")
        content: object = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_int=whole,
            parse_float=real,
            parse_constant=lambda name: fail(f"{name} is not a number that JSON has"),
        )
    except UnicodeDecodeError:
        fail("is not UTF-8 text; expected a JSON object")
    except RecursionError:
        raise LimitExceededError(f"{where}: nested deeper than {limits.config_depth}") from None
    except ValueError as error:
        fail(f"is not valid JSON ({shown(str(error))})")
    if not isinstance(content, dict):
        fail(f"holds {_kind(content)}; expected a JSON object")
    level: list[object] = [content]
    for _ in range(limits.config_depth):
        level = [inner for value in level for inner in _children(value)]
        if not level:
            return cast("dict[str, object]", content)
    raise LimitExceededError(f"{where}: nested deeper than {limits.config_depth}")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(cast("dict[str, object]", value).values())
    return cast("list[object]", value) if isinstance(value, list) else []


def _kind(value: object) -> str:
    names = {
        "dict": "an object",
        "list": "a list",
        "str": "a string",
        "bool": "a boolean",
        "NoneType": "null",
    }
    return names.get(type(value).__name__, "a number")
