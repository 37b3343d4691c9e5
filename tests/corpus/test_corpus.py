"""Every case of the corpus gets its verdict, in time and within its memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from sapmerge.io.adapter import Adapter
from tests.versions import needs_pickles

from .build import Case, good_config
from .cases import CASES, GROUPS
from .runner import Outcome, on_disk, problems, run
from .tensors import bombs

TRIES = 3

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case.group}: {case.name}"[:80].encode("unicode_escape").decode(),
            marks=[needs_pickles] if case.action == "pickle" else [],
        )
        for case in CASES
    ],
)
def test_case(case: Case, place: Path) -> None:
    # Shared machines stall for seconds: a case is too slow if it is so each time.
    for _ in range(TRIES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what builds the case
            outcome = run(case, place)
        if in_time(case, outcome, place):
            break
    assert not problems(case, outcome)
    assert in_time(case, outcome, place), outcome.seconds


def in_time(case: Case, outcome: Outcome, place: Path) -> bool:
    """Ten times what SECURITY.md promises for an idle core; a quadratic reader takes hours."""
    if case.action != "load" or case.verdict == "hung":
        return True
    try:
        size = on_disk(place / "folder")
    except OSError:
        size = 0
    return outcome.seconds < 20 + size / 10e6


def test_reading_is_linear_in_the_number_of_tensors(tmp_path: Path) -> None:
    calls = []
    for count in (1000, 4000):
        folder = tmp_path / str(count)
        folder.mkdir()
        bombs(count, good_config(r=1, target_modules=["up_proj"]))(folder)
        calls.append(calls_in(lambda folder=folder: Adapter.load(folder)))
    assert (calls[1] - calls[0]) / 3000 < 120  # per tensor; it is 92
    assert calls[1] < 4.2 * calls[0]


def calls_in(work: Callable[[], object]) -> int:
    """How many functions `work` calls: a measure of time that does not depend on the machine."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_size_of_the_corpus() -> None:
    for group in GROUPS:
        verdicts = {case.verdict for case in CASES if case.group == group}
        assert {"refuse", "accept"} <= verdicts, group
    assert len(CASES) >= 235
    assert sum(case.verdict == "accept" for case in CASES) >= 60
