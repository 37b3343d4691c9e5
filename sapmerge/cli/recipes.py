"""Methods: by name, by recipe, or of a module of the user's."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from typing import TYPE_CHECKING, Any

from sapmerge.errors import MethodError
from sapmerge.method_names import method_named

if TYPE_CHECKING:
    from sapmerge.core.protocols import Method

__all__ = ["imported", "method_of"]

_IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def method_of(text: str, given: dict[str, Any]) -> Method:
    """A name of `methods.__all__`, a recipe, or module:function that the user wrote and so allowed
    to be imported.
    """
    options = {key: value for key, value in given.items() if value is not None}
    if options and ("(" in text or _IMPORTABLE.fullmatch(text)):
        raise MethodError(
            f"--{next(iter(options))} goes with a method's name; write it into {text!r} instead"
        )
    if _IMPORTABLE.fullmatch(text):
        return imported(text)
    functions = {name: imported(name) for name in _strings(text) if _IMPORTABLE.fullmatch(name)}
    return method_named(text, functions, **options)


def imported(name: str) -> Any:
    module, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a function in a file of the working folder, as with python -m
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # importing runs the user's code: anything can go wrong there
        raise MethodError(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise MethodError(f"{name!r} is not a function")
    return found


def _strings(text: str) -> list[str]:
    """The string literals of a recipe; an unreadable one has none,
    and `parse` says what is wrong with it.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
