"""Whether the method, the anchors and the model that `merge` is called with are
what they may be.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from sapmerge import methods
from sapmerge.core.protocols import Method
from sapmerge.errors import MethodError

__all__ = ["check_method", "says_what_is_meant"]

P = ParamSpec("P")
R = TypeVar("R")


def says_what_is_meant(function: Callable[P, R]) -> Callable[P, R]:
    """Arguments that the function does not take are a MethodError with what was meant:
    `merge(adapters, "ties", density=0.2)`.
    """
    own = signature(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        unknown = [name for name in kwargs if name not in own.parameters]
        if unknown:
            raise MethodError(_no_argument(unknown[0], own.parameters))
        if sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in own.parameters.values()) < len(args):
            raise MethodError(
                f"{function.__name__} takes adapters, anchors and a model by place; everything "
                "else by name: method=..., weights=..."
            )
        return function(*args, **kwargs)

    return checked


def _no_argument(name: str, known: Iterable[str]) -> str:
    owners = [one for one in methods.__all__ if name in signature(getattr(methods, one)).parameters]
    if owners:
        chosen = "ties" if "ties" in owners else owners[0]
        return (
            f"merge has no argument {name}=; it is one of a method: method=sm.{chosen}({name}=...)"
        )
    close = get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]}=?" if close else ""
    return f"merge has no argument {name}={hint}"


def check_method(method: Method | None, anchor_loader: Any, model: Any) -> Method:
    """The method of a merge: `sap()` where there are anchors and none is given.

    Raises:
        MethodError: no method, one that is not called yet, one that does not take a Layer,
            or anchors without a model.
    """
    if isinstance(anchor_loader, str):
        raise MethodError(
            f"the second argument of merge is a loader of anchors; got the text {anchor_loader!r}. "
            f"A method is given by name: merge(adapters, method=sm.{_like(anchor_loader)}())"
        )
    if callable(anchor_loader) and not hasattr(anchor_loader, "__iter__"):
        raise MethodError(
            "the second argument of merge is a loader of anchors; got a "
            f"{type(anchor_loader).__name__}. A method is "
            "method=..., a model is the third argument"
        )
    if model is not None and not hasattr(model, "named_modules"):
        raise MethodError(
            f"model must be a torch module; got a {type(model).__name__}: merge(adapters, loader, "
            "model)"
        )
    if anchor_loader is not None and model is None:
        raise MethodError("anchors need a model: merge(adapters, anchor_loader, model)")
    if method is None and anchor_loader is not None:
        return methods.sap()
    if method is None:
        raise MethodError(
            "without anchors a method must be given: merge(adapters, method=sm.mean()), or "
            "sm.ties(density=0.2), sm.knots(), sm.task_arithmetic(), ..."
        )
    if isinstance(method, str):
        raise MethodError(
            f"method={method!r} is text; pass a method, e.g. sm.ties(), or sm.parse({method!r})"
        )
    name = getattr(method, "__name__", "")
    if isinstance(method, type) or (name in methods.__all__ and getattr(methods, name) is method):
        raise MethodError(
            f"the method {name} is not called yet: write method={name}(...) with its arguments, or "
            f"{name}()"
        )
    if not callable(method):
        raise MethodError(f"a method maps a Layer to one update; {method!r} cannot be called")
    try:
        signature(method).bind(None)
    except TypeError:
        raise MethodError(
            f"a method maps a Layer to one update, and takes it as its only argument; {method!r} "
            "does not: a scorer goes into Prune(...), a loss into loss=..."
        ) from None
    except ValueError:  # it has no signature that can be read
        pass
    return method


def _like(text: str) -> str:
    """The name of the method that a text may mean."""
    return next(iter(get_close_matches(text, methods.__all__, 1)), "mean")


def check_cache(cache: Any, cache_only: bool, anchor_loader: Any) -> None:
    """Whether the cache of a merge is the path of a folder, and of anchors that are there.

    Raises:
        MethodError: it is not.
    """
    if cache is not None and not isinstance(cache, (str, os.PathLike)):
        raise MethodError(
            f"cache is the path of a folder of your own; got a {type(cache).__name__}"
        )
    if cache_only and (cache is None or anchor_loader is None):
        raise MethodError(
            "cache_only=True needs cache=..., and the anchors and the model that the cache is for"
        )
