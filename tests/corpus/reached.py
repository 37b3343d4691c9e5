"""Which cases of the corpus, and which tests, come to a check of the reader at all.

One run of each over a reader whose every check says so before it does anything. Where nobody comes,
nobody can notice that the check is gone; and who is asked about a check that was taken out are
those who came.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["CASE", "LOG", "Reached", "instrumented", "note", "reading"]

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

    module = ast.parse(text)
    Noting().visit(module)
    return ast.fix_missing_locations(module)


def reading(log: Path) -> Reached:
    """What the log says."""
    found: Reached = {}
    for line in log.read_text().splitlines():
        file, number, who = line.split("\t", 2)
        mine = found.setdefault((file, int(number)), [])
        if who not in mine:
            mine.append(who)
    return found
