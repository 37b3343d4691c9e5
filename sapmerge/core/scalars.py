"""Numbers of NumPy and torch where a number of Python is meant: `np.linspace` gives densities,
counts of samples come from arrays.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

__all__ = ["plain", "whole"]

T = TypeVar("T")


def plain(value: T) -> T:
    """A scalar of NumPy or torch as Python's number, also inside of tuples; anything else as it is.

    So a recipe prints as one that can be read back, whatever made its numbers.

    Example:
        >>> import numpy as np
        >>> plain(np.float64(0.5)), plain((np.int64(2), "a"))
        (0.5, (2, 'a'))
    """
    if type(value) is tuple:
        return cast("T", tuple(plain(entry) for entry in cast("tuple[object, ...]", value)))
    scalar = cast("Any", value)
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return scalar.item()
    return value


def whole(value: object, low: int, high: float = math.inf) -> int | None:
    """A whole number between two bounds, both included, as an int; None for anything else.

    Example:
        >>> import numpy as np
        >>> whole(np.int64(3), 1), whole(3.0, 1), whole(9, 1, 8)
        (3, None, None)
    """
    number = plain(value)
    return number if isinstance(number, int) and low <= number <= high else None
