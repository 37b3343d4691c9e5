"""Names of base models: quantised copies of one base have its weights but for rounding."""

from __future__ import annotations

import os
import re

__all__ = ["is_here", "is_path", "one_base", "unquantised"]

_QUANTISED = re.compile(
    r"(?:-unsloth)?-bnb-[48]bit|-gptq(?:-int[2-8])?|-awq(?:-int4)?|-fp8(?:-dynamic)?|-gptq-marlin",
    re.IGNORECASE,
)


def unquantised(name: str) -> str:
    """The name without a trailing slash and the suffix of a quantised copy.

    Example:
        >>> unquantised("unsloth/Llama-3.2-1B-unsloth-bnb-4bit")
        'unsloth/Llama-3.2-1B'
        >>> unquantised("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4/")
        'Qwen/Qwen2.5-7B-Instruct'
    """
    plain = name.rstrip("/")
    match = re.search(rf"(?:{_QUANTISED.pattern})$", plain, re.IGNORECASE)
    return plain[: match.start()] if match and match.start() else plain


_PATH = re.compile(r"[/\\~.]|[A-Za-z]:[/\\]|file:|[\w.-]+\\|[^/]*/[^/]*/")


def is_path(name: str) -> bool:
    """Whether the name of a base is a place on somebody's disk; names of the Hub have one slash.

    Example:
        >>> is_path("/home/someone/models/llama"), is_path("C:\\\\models"), is_path("meta/llama")
        (True, True, False)
    """
    return _PATH.match(name.rstrip("/") or name) is not None


def is_here(path: str) -> bool:
    """Whether the folder of a base is on this machine; it is not opened."""
    return os.path.isdir(path)


def one_base(names: list[str]) -> str | None:
    """The base that all names mean, spelled without a suffix; None if they mean several.

    Names are compared without regard to case, a trailing slash, and suffixes of quantised copies.
    """
    if len({unquantised(name).lower() for name in names}) != 1:
        return None
    plain = sorted({name.rstrip("/") for name in names if unquantised(name) == name.rstrip("/")})
    return plain[0] if plain else sorted({unquantised(name) for name in names})[0]
