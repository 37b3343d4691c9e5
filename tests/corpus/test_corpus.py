"""Every case of the corpus gets its verdict, in time and within its memory."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

from .build import Case
from .cases import CASES, GROUPS
from .runner import on_disk, problems, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.group}: {case.name}"[:80].encode("unicode_escape").decode()
)
def test_case(case: Case, place: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what builds the case
        outcome = run(case, place)
    assert not problems(case, outcome)
    if case.action == "load" and case.verdict != "hung":
        try:
            size = on_disk(place / "folder")
        except OSError:
            size = 0
        assert outcome.seconds < 60 + size / 1e6  # a reader that is quadratic takes hours; machines differ by ten


def test_the_size_of_the_corpus() -> None:
    for group in GROUPS:
        verdicts = {case.verdict for case in CASES if case.group == group}
        assert {"refuse", "accept"} <= verdicts, group
    assert len(CASES) >= 235
    assert sum(case.verdict == "accept" for case in CASES) >= 60
