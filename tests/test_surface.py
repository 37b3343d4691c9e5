"""The shape of the package: what is public is documented, and each power has one place.

That imports point one way and in no circle is a contract in pyproject.toml (`lint-imports`).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

import pytest

import sapmerge
from sapmerge import contrib, methods
from sapmerge.parsing import CALLABLE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sapmerge"
README = (ROOT / "README.md").read_text()
DOCS = "\n".join([README, *(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))])

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Name below `sapmerge` -> file; the package itself is `__init__`."""

# What only some modules may do, and why those.
DISK = {
    "io": "reads and writes adapters",
    "cli": "is the user's shell",
    "demo": "writes its results",
    "display.tables": "asks a terminal for its width",
    "comparing": "keeps results and statistics in the folder that the user names",
    "merging.inputs": "asks whether the name of an adapter is a folder too",
    "anchors.folders": "reads the captions that the user names",
    "anchors.loading": "opens the images that the user names",
    "merging.sinks": "asks whether the output is one of the inputs",
    "merging.verification": "merges again into a temporary folder",
}
AUTOGRAD = {
    "anchors": "gradients of the anchors' loss",
    "demo": "trains",
    "routing.learning": "trains a router",
    "federated.pilot_client": "says which parts a client trains",
}
CODE = {
    (
        "io.pickles",
        "torch.load",
    ): "the one place that unpickles, tensors only, when the user says so",
    ("federated.extras", "importlib"): "packages of the extras, by constant names",
    ("anchors.folders", "importlib"): "whether pillow is installed",
    ("__init__", "importlib"): "its own modules, from the table of public names",
    ("cli.recipes", "importlib"): "a function that the user typed",
    ("demo.extras", "importlib"): "packages of the extra, by constant names",
}
NETWORK = {
    ("io.hub", "huggingface_hub"): "Adapter.from_hub, hf:// in the shell, Merged.push_to_hub",
}

LONGEST = 400  # lines of at most 100 columns


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def within(module: str, places: object) -> bool:
    """Whether a module is one of the places, or inside one."""
    return any(module == place or module.startswith(f"{place}.") for place in places)  # type: ignore[attr-defined]


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported:
    no function bodies, and nothing for type checkers only.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of what is imported: `a.b` for `import a.b`, `a.b` for `from a import b`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(names: Iterator[str]) -> set[str]:
    """The modules of this package among them."""
    found = set()
    for name in names:
        path = name.split(".")
        if path[0] == "sapmerge":
            longest = max(
                (n for n in range(1, len(path)) if ".".join(path[1 : n + 1]) in MODULES), default=0
            )
            found.add(".".join(path[1 : longest + 1]) or "__init__")
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` for an expression of that form; '?' for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def uses(module: str) -> set[str]:
    """Every dotted name that a module calls or mentions, and everything that it imports,
    functions included.
    """
    nodes = list(ast.walk(tree(module)))
    found = {dotted(node) for node in nodes if isinstance(node, (ast.Attribute, ast.Name))}
    return found | set(imported(iter(nodes)))


every_module = pytest.mark.parametrize("module", sorted(MODULES))


@every_module
def test_only_some_modules_touch_the_disk(module: str) -> None:
    disk = (
        r"open|(os|\w*[Pp]ath|\w*[Ff]older|Image|\?)\.(open|stat|lstat|listdir|scandir|walk|remove|unlink|rename|mkdir|"
        r"makedirs|rmdir|fsync|link|symlink|read_text|read_bytes|write_text|write_bytes|iterdir|glob|exists|is_dir|is_file)|"
        r"os\.path\.(exists|lexists|isfile|isdir|getsize|realpath)|(shutil|tempfile|safetensors)(\..*)?|"
        r"torch\.(save|load)"
    )
    found = {name for name in uses(module) if re.fullmatch(disk, name)}
    assert not found or within(module, DISK), f"sapmerge/{module} touches the disk: {sorted(found)}"


@every_module
def test_only_the_anchors_differentiate(module: str) -> None:
    gradients = (
        r"(.*\.)?(backward|autograd|enable_grad|requires_grad_|functional_call|optim)(\..*)?"
    )
    found = {name for name in uses(module) if re.fullmatch(gradients, name)}
    assert not found or within(module, AUTOGRAD), (
        f"sapmerge/{module} differentiates: {sorted(found)}"
    )


@every_module
def test_nothing_runs_code_of_others(module: str) -> None:
    running = (
        r"(eval|exec|compile|__import__|runpy|c?[pP]ickle|dill|marshal|shelve|subprocess|importlib"
        r"|torch.load)"
    )
    network = r"(requests|urllib|http|socket|ssl|ftplib|huggingface_hub)"
    found = {match[1] for name in uses(module) if (match := re.match(rf"{running}(?![\w])", name))}
    assert {(module, name) for name in found} <= set(CODE), f"sapmerge/{module}: {sorted(found)}"
    found = {match[1] for name in uses(module) if (match := re.match(rf"{network}(\.|$)", name))}
    assert {(module, name) for name in found} <= set(NETWORK), f"sapmerge/{module}: {sorted(found)}"


@every_module
def test_files_are_short(module: str) -> None:
    lines = MODULES[module].read_text().count("\n")
    assert lines <= LONGEST, f"sapmerge/{module} has {lines} lines: one that grows is two ideas"


@every_module
def test_modules_say_what_they_are(module: str) -> None:
    assert ast.get_docstring(tree(module)), f"sapmerge/{module} has no docstring"


# What is public.


def described(thing: object, name: str) -> bool:
    """Whether it has a docstring of its own; a dataclass without one is given its signature."""
    text = inspect.getdoc(thing) or ""
    return bool(text) and not text.startswith(f"{name}(")


def test_public_names_exist_once() -> None:
    assert len(sapmerge.__all__) == len(set(sapmerge.__all__))
    assert not [name for name in sapmerge.__all__ if not hasattr(sapmerge, name)]


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in sapmerge.__all__
        # Python 3.10 takes Callable[...] for a class
        if (inspect.isclass(getattr(sapmerge, n)) and get_origin(getattr(sapmerge, n)) is None)
        or inspect.isfunction(getattr(sapmerge, n))
    ],
)
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(sapmerge, name)
    assert described(thing, name)
    if not inspect.isclass(thing) or issubclass(thing, Exception):
        return
    for attribute, value in vars(thing).items():
        if (
            inspect.isfunction(value)
            and not attribute.startswith("_")
            and thing.__module__.startswith("sapmerge")
        ):
            # said by the protocol
            plain = attribute in (
                "shape",
                "dense",
                "rows",
                "scaled",
                "to",
                "norm",
                "prepare",
                "fit",
            )
            assert plain or value.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("name", [*methods.__all__, *contrib.__all__])
def test_methods_say_what_they_take(name: str) -> None:
    function = getattr(methods, name, None) or getattr(contrib, name)
    if not inspect.isfunction(function):
        pytest.skip("a part of a method")
    text = inspect.getdoc(function) or ""
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", text), (
            f"{name}: the docstring says nothing about {argument}"
        )


@pytest.mark.parametrize("name", sorted(CALLABLE))
def test_parts_and_methods_are_in_the_docs(name: str) -> None:
    assert re.search(rf"\b{name}\b", DOCS), f"no page of docs/ mentions {name}"


@pytest.mark.parametrize(
    "name", ["merge", "inspect", "parse", "Adapter", "Limits", "SapmergeWarning"]
)
def test_entry_points_are_in_the_docs(name: str) -> None:
    assert re.search(rf"\b{name}\b", DOCS)


@pytest.mark.parametrize("name", [n for n in sapmerge.__all__ if n.endswith("Error")])
def test_errors_are_in_the_docs(name: str) -> None:
    assert name in DOCS


def test_docs_name_nothing_that_does_not_exist() -> None:
    named = set(re.findall(r"\bsm\.([A-Za-z_]\w*)", DOCS))
    assert not sorted(name for name in named if not hasattr(sapmerge, name))
    assert named <= {*sapmerge.__all__, "anchors", "evaluation", "federated"}, (
        "docs use what is not public"
    )


def test_docs_name_files_that_exist() -> None:
    # it names others' files
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md") if page.stem != "methods"]
    for name in set(re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", "\n".join([README, *pages]))) - {
        "mine.py"
    }:
        assert any((base / name).exists() for base in (ROOT, PACKAGE)), f"the docs name {name}"


# The README is a first page.


def test_readme_is_short() -> None:
    assert README.count("\n") < 150
    first = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert first is not None
    assert first[1].count("\n") < 10


def test_readme_links_every_page() -> None:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\]\(([^)]+)\)", README)) == set()
