"""The table of all cases."""

from __future__ import annotations

from . import configs, containers, outside, pairs, tensors
from .build import Case

CASES: tuple[Case, ...] = (
    *containers.CASES,
    *tensors.CASES,
    *configs.CASES,
    *outside.CASES,
    *pairs.CASES,
)
GROUPS = (
    "container",
    "tensors",
    "json",
    "numbers",
    "patterns",
    "meaning",
    "pickle",
    "file system",
    "pairs",
)
assert {case.group for case in CASES} == set(GROUPS)
assert len({(case.group, case.name) for case in CASES}) == len(CASES)
