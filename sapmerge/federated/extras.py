"""Packages of the extras: named where they are used, and asked for only then."""

from __future__ import annotations

import importlib
from typing import Any

from sapmerge.errors import SapmergeError

__all__ = ["package"]


def package(name: str, extra: str) -> Any:
    """A module of an optional package.

    Raises:
        SapmergeError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SapmergeError(
            f'{name} is not installed ({error}): pip install "sapmerge[{extra}]"'
        ) from error
