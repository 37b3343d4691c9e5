"""A sample of the mutation run: checks whose absence the corpus must notice."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from tests.corpus.mutations import mutants, sample

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the corpus has cases of Linux")


def test_every_file_of_the_reader_has_checks() -> None:
    found = mutants()
    assert len(found) > 100
    assert len({mutant.file for mutant in found}) >= 9


def test_a_sample_of_removed_checks_is_noticed(tmp_path: Path) -> None:
    chosen = random.Random(0).sample([mutant for mutant in mutants() if mutant.reachable], 8)
    missed = [str(mutant) for mutant, by in sample(chosen, tmp_path) if by is None]
    assert missed == []
