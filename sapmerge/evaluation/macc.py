"""mAcc: one number for several measures on several test sets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from sapmerge.errors import SapmergeError, SapmergeWarning

__all__ = ["macc"]


def macc(table: Mapping[str, Mapping[str, float]]) -> float:
    """The mean of all measures over all test sets: mAcc.

    Args:
        table: test set -> measure -> its value in per cent, the same measures for each set.

    Raises:
        SapmergeError: a set lacks a measure, or a value is not in per cent.

    Example:
        >>> macc({"market": {"rank-1": 80.0, "mAP": 60.0}, "duke": {"rank-1": 70.0, "mAP": 50.0}})
        65.0

    Source: TransMatcher, Liao and Shao, https://arxiv.org/abs/2105.14432, where the measures are
    rank-1 and mAP.
    """
    measures = {name: frozenset(row) for name, row in table.items()}
    if not measures or not next(iter(measures.values())):
        raise SapmergeError("macc takes test set -> measure -> value; got an empty table")
    first = next(iter(measures))
    for name, found in measures.items():
        if found != measures[first]:
            raise SapmergeError(
                f"macc: {name!r} has the measures {sorted(found)} and {first!r} has "
                f"{sorted(measures[first])}; a mean over them counts some sets more than others"
            )
    values = [
        (name, measure, float(value))
        for name, row in table.items()
        for measure, value in row.items()
    ]
    for name, measure, value in values:
        if not 0 <= value <= 100:
            raise SapmergeError(
                f"macc: {measure!r} of {name!r} is {value}; expected per cent, 0 to 100"
            )
    if any(0 < value < 1 for *_, value in values):
        warnings.warn(
            "macc: some values lie between 0 and 1; is 0.71 meant to be 71 per cent?",
            SapmergeWarning,
            stacklevel=2,
        )
    return math.fsum(value for *_, value in values) / len(values)
