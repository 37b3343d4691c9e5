"""Methods by what they are called: names of this library, of PEFT and mergekit, and recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

from sapmerge.errors import MethodError

if TYPE_CHECKING:
    from sapmerge.core.protocols import Method

__all__ = ["ALIASES", "factory_of", "method_named", "names"]

ALIASES: Mapping[str, str] = {
    "linear": "mean",
    "cat": "task_arithmetic",
    "svd": "task_arithmetic",
    "dare_linear": "dare",
}
"""What PEFT and mergekit call methods of this library. `linear` is mergekit's, whose weights are
divided by their sum; PEFT's is the sum, as its `cat` and `svd` are."""


def names() -> list[str]:
    """Of every method that a function makes."""
    from sapmerge import contrib, methods  # here, as below: the shell's help names no method

    return [name for name in (*methods.__all__, *contrib.__all__) if name.islower()]


def factory_of(name: str) -> Callable[..., Method]:
    """The function that makes a method.

    Raises:
        MethodError: there is none of that name; the message names the nearest.
    """
    known = names()
    real = ALIASES.get(name, name)
    if real not in known:
        close = get_close_matches(name.lower(), [*known, *ALIASES], 1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise MethodError(f"there is no method {name!r}; {hint} methods are {', '.join(known)}")
    from sapmerge import contrib, methods

    package = methods if real in methods.__all__ else contrib
    return cast("Callable[..., Method]", getattr(package, real))


def method_named(
    text: str, functions: Mapping[str, Callable[..., Any]] | None = None, **options: Any
) -> Method:
    """The method of a name, or of a recipe.

    Args:
        text: e.g. "ties", or "Chain(Prune(Magnitude(), TopFraction(0.2)), Mean())".
        functions: as `parse` takes them.
        options: arguments of a method given by its name.

    Raises:
        MethodError: no such method, or one that does not take these arguments.

    Example:
        >>> method_named("mean")
        Chain(Mean())
    """
    if "(" in text:
        if options:
            raise MethodError(
                f"{next(iter(options))} goes with a method's name; write it into {text!r} instead"
            )
        from sapmerge.parsing import parse

        return parse(text, functions)
    factory = factory_of(text)
    taken = signature(factory).parameters
    unknown = sorted(set(options) - set(taken))
    if unknown:
        known = ", ".join(taken) or "no arguments"
        raise MethodError(f"the method {text!r} has no {unknown[0]}; it takes {known}")
    missing = [p.name for p in taken.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise MethodError(f"the method {text!r} needs {missing[0]}; it takes {signature(factory)}")
    return factory(**options)
