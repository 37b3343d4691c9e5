"""Does each check matter? Take one out, and see whether a case of the corpus or a test of the
reader notices.

`python -m tests.corpus.mutations` removes every check of the reader in turn and prints what nobody
noticed; `--tests` also asks the tests of the reader (`TESTS`) about what the corpus let pass. Asked
are those who come to the check (`reached.py`).
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import itertools
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.corpus import reached

ROOT = Path(__file__).parents[2]
READERS = (
    "adapter",
    "base_folder",
    "beside",
    "config",
    "config_reader",
    "consistency",
    "contents",
    "files",
    "folder",
    "header",
    "keys",
    "kinds/adalora",
    "kinds/dora",
    "kinds/experts",
    "kinds/vectors",
    "live",
    "pairs",
    "patterns",
    "pickles",
    "prompts",
    "provenance",
    "strict_json",
    "uploads",
)
FILES = tuple(f"sapmerge/io/{name}.py" for name in READERS)
# Who is asked about what the corpus lets pass: those who know such files, then all who read.
TESTS = {
    "base_folder": (
        "tests/kinds/test_base_folder.py",
        "tests/trust/test_whole_model.py",
        "tests/trust/test_arguments.py",
    ),
    "beside": ("tests/names/test_held.py",),
    "prompts": ("tests/federated/test_prompts.py",),
    "provenance": ("tests/trust/test_provenance.py", "tests/merging/test_verification.py"),
    "uploads": (
        "tests/io/test_uploads.py",
        "tests/federated/test_inbox.py",
        "tests/federated/test_exchange.py",
    ),
}
READING = (
    "tests/corpus/test_checks.py",
    "tests/io/test_adapter.py",
    "tests/io/test_config.py",
    "tests/io/test_files.py",
    "tests/io/test_keys.py",
    "tests/kinds/test_reading.py",
    "tests/kinds/test_kinds.py",
    "tests/kinds/test_looking.py",
)
# Calls that never return: they are checks as much as a `raise` is.
REFUSERS = ("fail", "_refuse", "_refuse_stray")
# Heavy, and no check stands or falls with them alone.
SLOW = ("46,000", "66,000")
SECONDS = 60
# Checks that no folder of the corpus can reach, by words of theirs.
BEYOND = (
    "an empty path",
    "an adapter is the path",
    "the Hub repository",
    "the Hub cannot be reached",
    "has no module",
    "has no saved tensor",
    "has no vector",
    "is larger than the upda",
    "expected 1 to 64 of the characters",
    "cannot be read",
    "became shorter",
    "the size (",
    "it could be read",
    "self._changed(f'tensor",
    "exceeded()",
    "known holes",
    "a row of the base's weight",
    "at most {limits.tensors} are read",
    "is longer than {limits.name_length}",
)


@dataclass(frozen=True)
class Mutant:
    """One statement of one file replaced by `pass`."""

    file: str
    line: int
    text: str

    @property
    def reachable(self) -> bool:
        """Whether a folder can lead there; what cannot is for tests in memory (`test_checks.py`,
        `TESTS`).
        """
        name = self.file.removeprefix("sapmerge/io/").removesuffix(".py")
        return name not in (*TESTS, "live") and not any(part in self.text for part in BEYOND)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


_sources: dict[str, str] = {}


def source(file: str) -> str:
    """The text of a file, read once: it may be worked on while the mutants run."""
    return _sources.setdefault(file, (ROOT / file).read_text())


def mutants() -> list[Mutant]:
    """Every statement that refuses or warns."""
    found: list[Mutant] = []
    for file in FILES:
        for node in ast.walk(ast.parse(source(file))):
            if _is_check(node):
                assert isinstance(node, ast.stmt)
                found.append(Mutant(file, node.lineno, ast.unparse(node)[:110]))
    return sorted(found, key=lambda mutant: (mutant.file, mutant.line))


def _is_check(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise):
        return node.exc is not None
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    called = node.value.func
    name = (
        called.attr
        if isinstance(called, ast.Attribute)
        else called.id
        if isinstance(called, ast.Name)
        else ""
    )
    return name in (*REFUSERS, "_warn", "warn") and not (
        isinstance(called, ast.Attribute) and name == "warn" and _owner(called) == "warnings"
    )


def _owner(called: ast.Attribute) -> str:
    return called.value.id if isinstance(called.value, ast.Name) else ""


def mutated(mutant: Mutant) -> ast.Module:
    tree = ast.parse(source(mutant.file))

    class Remove(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            if _is_check(node) and getattr(node, "lineno", 0) == mutant.line:
                return ast.copy_location(ast.Pass(), node)
            return self.generic_visit(node)

    return ast.fix_missing_locations(Remove().visit(tree))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives modules of the package other bodies: file -> body."""

    def __init__(self, bodies: Mapping[str, ast.Module]) -> None:
        self.bodies = {
            file.removesuffix(".py").replace("/", "."): (file, body)
            for file, body in bodies.items()
        }

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.bodies else None

    def exec_module(self, module: ModuleType) -> None:
        file, body = self.bodies[module.__name__]
        exec(compile(body, file, "exec"), module.__dict__)


def prepare(place: Path) -> list[tuple[Any, Path]]:
    """Build the corpus once. Nothing of sapmerge is imported by it."""
    from tests.corpus.cases import CASES
    from tests.corpus.runner import build

    built: list[tuple[Any, Path]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, case in enumerate(CASES):
            if not any(word in case.name for word in SLOW):
                built.append((case, build(case, place / str(number))))
    return built


class Reach:
    """Who comes to which check: the number of a case, or the name of a test."""

    def __init__(self, built: Sequence[tuple[Any, Path]], tests: bool = False) -> None:
        noting = {file: reached.instrumented(file, source(file), _is_check) for file in FILES}
        self.cases = _logged(lambda: _all_cases(noting, built))
        self.tests: reached.Reached = {}
        self.failing = set[str]()  # without a mutant, too
        named = dict.fromkeys((*itertools.chain(*TESTS.values()), *READING)) if tests else ()
        for file in named:
            with tempfile.NamedTemporaryFile() as failures:

                def ran(file: str = file, out: Path = Path(failures.name)) -> str:
                    out.write_text("\n".join(_ran(noting, [file])))
                    return ""

                for place, who in _logged(ran).items():
                    self.tests.setdefault(place, []).extend(who)
                self.failing |= {*Path(failures.name).read_text().split("\n")}

    def of(self, mutant: Mutant) -> tuple[list[int], list[str]]:
        """The cases and the tests that come to a check."""
        place = mutant.file, mutant.line
        tests = [test for test in self.tests.get(place, []) if test not in self.failing]
        return [int(number) for number in self.cases.get(place, [])], tests


def _logged(work: Callable[[], str]) -> reached.Reached:
    """What is reached in a child."""
    with tempfile.NamedTemporaryFile() as log:
        os.environ[reached.LOG] = log.name
        failed = _child(work, 60 * SECONDS)
        assert failed is None, failed
        return reached.reading(Path(log.name))


def _all_cases(bodies: Mapping[str, ast.Module], built: Sequence[tuple[Any, Path]]) -> str:
    from tests.corpus.runner import judged

    _with(bodies)
    for number, (case, target) in enumerate(built):
        os.environ[reached.CASE] = str(number)
        judged(case, target)
    return ""


def noticed_by_corpus(mutant: Mutant, built: Sequence[tuple[Any, Path]]) -> str | None:
    """The first case that comes out differently without the check, or None.
    In a child: imports cannot be undone.
    """
    return _child(lambda: _first_difference(mutant, built), SECONDS)


def _child(work: Callable[[], str], seconds: int) -> str | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(seconds)
        try:
            os.write(writer, work().encode())
        except SystemExit:
            os._exit(0)
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return (said or None) if status == 0 else "never ends"


_KEPT = ("tests.corpus", "tests.corpus.mutations", "tests.corpus.reached")


def _with(bodies: Mapping[str, ast.Module]) -> None:
    """From here on the package has these bodies; this process is of no other use."""
    for name in list(sys.modules):
        if name.startswith(("sapmerge", "tests.")) and name not in _KEPT:
            del sys.modules[name]
    sys.meta_path.insert(0, _Finder(bodies))


def _first_difference(mutant: Mutant, built: Sequence[tuple[Any, Path]]) -> str:
    from tests.corpus.runner import judged, problems

    _with({mutant.file: mutated(mutant)})
    for case, target in built:
        # twice: a machine that is busy may be too slow for a clock of the reader once
        if problems(case, judged(case, target)) and problems(case, judged(case, target)):
            return f"{case.group}: {case.name}"
    return ""


def noticed_by_tests(mutant: Mutant, tests: Sequence[str]) -> str | None:
    """Which of these tests fails without the check."""
    if not tests:
        return None
    bodies = {mutant.file: mutated(mutant)}
    return _child(lambda: next(iter(_ran(bodies, ["-x", *tests])), ""), 10 * SECONDS)


def _ran(bodies: Mapping[str, ast.Module], tests: Sequence[str]) -> list[str]:
    """The tests that fail, in this process; programs that tests start are as they were."""
    import pytest

    failed = list[str]()

    class Failing:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    _with(bodies)
    os.chdir(ROOT)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    options = ["-q", "--tb=no", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *tests], plugins=[Failing()])
    if code not in (0, 1):  # nothing that could be called noticed
        raise SystemExit(f"pytest could not run: {code}")
    return failed


def noticed(mutant: Mutant, built: Sequence[tuple[Any, Path]], reach: Reach) -> tuple[str, str]:
    """("corpus" or "tests", who) or ("", "")."""
    cases, tests = reach.of(mutant)
    by = noticed_by_corpus(mutant, [built[number] for number in cases])
    if by is not None:
        return "corpus", by
    by = noticed_by_tests(mutant, tests)
    return ("", "") if by is None else ("tests", by)


def sample(chosen: Sequence[Mutant], place: Path) -> list[tuple[Mutant, str | None]]:
    """What the corpus says to some of the mutants."""
    built = prepare(place)
    return [(mutant, noticed_by_corpus(mutant, built)) for mutant in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--file", default="", help="only files with this in their name")
    parser.add_argument(
        "--beyond", action="store_true", help="only checks that no folder can reach"
    )
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    all_of_them = [
        mutant
        for mutant in mutants()
        if options.file in mutant.file and not (options.beyond and mutant.reachable)
    ]
    caught = 0
    with tempfile.TemporaryDirectory() as place:
        built = prepare(Path(place))
        reach = Reach(built, options.tests)
        for mutant in all_of_them:
            kind, by = noticed(mutant, built, reach)
            caught += bool(kind)
            print(f"{'caught' if kind else 'MISSED'}  {mutant}  [{by}]", flush=True)
    print(f"{caught} of {len(all_of_them)} removed checks were noticed")


if __name__ == "__main__":
    main()
