"""What a metric returns, read as numbers: one per name, with an interval where samples tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.evaluation import Interval, paired, wilson

__all__ = ["Score", "read_scores"]

Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Score:
    """A number that a metric gave to a model.

    Args:
        value: the number; of samples their mean.
        samples: (n,), one number per sample, 1 for right and 0 for wrong, say; None where the
            metric gave a single number.
    """

    value: float
    samples: Values | None = None

    @property
    def count(self) -> int:
        """How many samples there are; 0 for a single number."""
        return 0 if self.samples is None else len(self.samples)

    @property
    def interval(self) -> Interval | None:
        """Of 95 %: Wilson's for rights and wrongs, the bootstrap's for other numbers; None for a
        single one.
        """
        if self.samples is None:
            return None
        if np.isin(self.samples, (0.0, 1.0)).all():
            return wilson(int(self.samples.sum()), len(self.samples))
        return paired(self.samples, np.zeros_like(self.samples))

    def ahead_of(self, other: Score, level: float) -> Interval | None:
        """By how much, on the same samples; None where they do not tell."""
        if self.samples is None or other.samples is None or len(self.samples) != len(other.samples):
            return None
        return paired(self.samples, other.samples, level)


def read_scores(found: Any) -> dict[str, Score]:
    """Name -> score. A metric without names is called "score".

    Raises:
        MethodError: neither numbers nor samples.
        NonFiniteError: a number is NaN or infinite.
    """
    table = cast("Mapping[object, Any]", found) if isinstance(found, Mapping) else {"score": found}
    if not table:
        raise MethodError("evaluate returned an empty mapping; expected name -> number")
    return {str(name): _score(value, str(name)) for name, value in table.items()}


def _score(value: Any, name: str) -> Score:
    plain = value.detach().cpu() if isinstance(value, Tensor) else value
    if isinstance(plain, Tensor) and plain.is_floating_point():
        plain = plain.double()  # NumPy has no bfloat16
    try:
        if value is None:
            raise TypeError
        numbers: Values = np.asarray(plain, dtype=np.float64)
    except (TypeError, ValueError):
        numbers = np.empty((0, 0))
    if numbers.ndim > 1 or not numbers.size:
        raise MethodError(
            "evaluate returns a number, one number per sample, or a mapping name -> either; its "
            f"{name!r} is a {type(value).__name__}"
        )
    if not np.isfinite(numbers).all():
        raise NonFiniteError(f"evaluate: {name!r} is NaN or infinite")
    return Score(math.fsum(numbers.ravel()) / numbers.size, numbers if numbers.ndim else None)
