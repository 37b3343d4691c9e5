"""Typed access to the keys of a config."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from typing import NoReturn, cast

from sapmerge.errors import AdapterConfigError, SapmergeWarning
from sapmerge.io.files import shown

__all__ = ["MODULE", "ConfigReader"]

MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LONGEST = 500


class ConfigReader:
    """Typed access to a config; each mistake names the key,
    what was found and what was expected.
    """

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self.config, self.where = config, where

    def fail(self, key: str, expected: str, advice: str = "") -> NoReturn:
        tail = f"; {advice}" if advice else ""
        written = shown(self.config[key]) if key in self.config else "missing"
        raise AdapterConfigError(
            f"{self.where}: {shown(key)} is {written}, expected {expected}{tail}"
        )

    def warn(self, text: str) -> None:
        warnings.warn(f"{self.where}: {text}", SapmergeWarning, stacklevel=2)

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        value = self.config.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(key, "a string or null")
        if value is not None and (len(value) > _LONGEST or not value.isprintable()):
            # It goes into reports, messages and the output's model card.
            self.fail(key, f"at most {_LONGEST} printable characters")
        return value

    def number(self, key: str, default: float) -> float:
        return self.as_number(self.config.get(key, default), key)

    def as_number(self, value: object, key: str) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self.fail(key, "a finite number" if key != "alpha_pattern" else "finite numbers")
        return float(value)

    def table(self, key: str) -> dict[str, object]:
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, "an object {pattern: number}")
        return cast("dict[str, object]", value or {})

    def names(self, key: str) -> str | tuple[str, ...] | None:
        """A pattern, or names."""
        value = self.config.get(key)
        if value is None or isinstance(value, str):
            return value
        items = cast("list[object]", value) if isinstance(value, list) else [None]
        if not all(isinstance(item, str) and item for item in items):
            self.fail(key, "a string, a list of strings, or null")
        return tuple(cast("list[str]", items))

    def tokens(self) -> Mapping[str, tuple[int, ...]] | None:
        """`trainable_token_indices`: a list of rows of the input embedding, or module -> rows."""
        value = self.config.get("trainable_token_indices")
        if value is None or value in ([], {}):
            return None
        table = cast("dict[str, object]", value if isinstance(value, dict) else {"": value})
        indices: dict[str, tuple[int, ...]] = {}
        for module, rows in table.items():
            items = cast("list[object]", rows) if isinstance(rows, list) else [None]
            fine = all(
                isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in items
            )
            if (
                not fine
                or not items
                or len(set(items)) < len(items)
                or not (module == "" or MODULE.fullmatch(module))
            ):
                self.fail(
                    "trainable_token_indices",
                    "distinct row numbers, or an object {module: row numbers}",
                )
            indices[module] = tuple(cast("list[int]", items))
        return indices

    def layers(self) -> tuple[int, ...] | None:
        value = self.config.get("layers_to_transform")
        if value is None:
            return None
        items = cast("list[object]", value) if isinstance(value, list) else [value]
        if not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items
        ):
            self.fail("layers_to_transform", "a layer number, a list of them, or null")
        return tuple(cast("list[int]", items))
