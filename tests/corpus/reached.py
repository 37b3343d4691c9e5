"""Which cases of the corpus, and which tests, come to a check of the reader at all.

One run of each over a reader whose every check says so before it does anything. Where nobody comes,
nobody can notice that the check is gone; and who is asked about a check that was taken out are
those who came.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["LOG", "instrumented", "note", "reading", "suite"]

LOG, CASE = "SAPMERGE_REACHED", "SAPMERGE_CASE"
"""Variables of the environment: the file to write to, and the case that runs."""

Reached = dict[tuple[str, int], list[str]]
"""(file, line of a check) -> who came there, in their order."""


_logs = dict[str, int]()  # opened once: some tests watch which files are opened


def note(file: str, line: int) -> None:
    """Somebody comes to a check."""
    who = os.environ.get(CASE) or os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    log = os.environ[LOG]
    if log not in _logs:
        _logs[log] = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.write(_logs[log], f"{file}\t{line}\t{who}\n".encode())


def instrumented(file: str, text: str, is_check: Callable[[ast.AST], bool]) -> ast.Module:
    """A module whose checks note that they were reached."""

    class Noting(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
            if not is_check(node):
                return self.generic_visit(node)
            said = f"from tests.corpus.reached import note\nnote({file!r}, {node.lineno})"  # type: ignore[attr-defined]
            return [*ast.parse(said).body, node]

    return ast.fix_missing_locations(Noting().visit(ast.parse(text)))


def reading(log: Path) -> Reached:
    """What the log says."""
    found: Reached = {}
    for line in log.read_text().splitlines():
        file, number, who = line.split("\t", 2)
        mine = found.setdefault((file, int(number)), [])
        if who not in mine:
            mine.append(who)
    return found


def suite(root: Path, place: Path, modules: Mapping[str, str], tests: Sequence[str]) -> Reached:
    """Which tests come to which checks.

    Args:
        root: of the repository.
        place: an empty folder for a copy of it.
        modules: file -> what its body is in the copy.
        tests: what pytest runs.
    """
    copied(root, place)
    for file, text in modules.items():
        (place / file).write_text(text)
    log = place / "reached"
    log.touch()
    done = pytest(place, tests, {LOG: str(log)})
    if done.returncode not in (0, 1) or not log.stat().st_size:
        raise RuntimeError(f"pytest could not run: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    return reading(log)


def copied(root: Path, place: Path) -> None:
    """What tests need of the repository."""
    for part in ("sapmerge", "tests", "pyproject.toml"):
        source, target = root / part, place / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)


def pytest(
    place: Path, tests: Sequence[str], more: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run tests in a copy of the repository."""
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place), **more},
        capture_output=True,
        text=True,
        timeout=3600,
    )
