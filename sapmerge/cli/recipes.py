"""Methods: by name, by recipe, or of a module of the user's."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any, cast

import sapmerge
from sapmerge import contrib, methods
from sapmerge.core.protocols import Method
from sapmerge.errors import MethodError

__all__ = ["imported", "method_of"]

_IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def method_of(text: str, given: dict[str, Any]) -> Method:
    """A name of `methods.__all__`, a recipe, or module:function that the user wrote and so allowed
    to be imported.
    """
    options = {key: value for key, value in given.items() if value is not None}
    names = [*methods.__all__, *(name for name in contrib.__all__ if name.islower())]
    if text in names:
        factory = cast(
            "Callable[..., Method]", getattr(methods if text in methods.__all__ else contrib, text)
        )
        unknown = sorted(set(options) - set(signature(factory).parameters))
        if unknown:
            known = ", ".join(signature(factory).parameters) or "no arguments"
            raise MethodError(f"the method {text!r} has no {unknown[0]}; it takes {known}")
        missing = [
            p.name
            for p in signature(factory).parameters.values()
            if p.default is p.empty and p.name not in options
        ]
        if missing:
            raise MethodError(
                f"the method {text!r} needs {missing[0]}; it takes {signature(factory)}"
            )
        return factory(**options)
    if options:
        raise MethodError(
            f"--{next(iter(options))} goes with a method's name; write it into {text!r} instead"
        )
    if _IMPORTABLE.fullmatch(text):
        return imported(text)
    if "(" not in text:
        close = get_close_matches(text.lower(), names, 1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise MethodError(f"there is no method {text!r}; {hint} methods are {', '.join(names)}")
    functions = {name: imported(name) for name in _strings(text) if _IMPORTABLE.fullmatch(name)}
    return sapmerge.parse(text, functions)


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
