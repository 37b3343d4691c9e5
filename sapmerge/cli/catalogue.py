"""What methods there are, read from their source as text: nothing of it is imported, so a list of
a hundred names does not wait for torch.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sapmerge.method_names import ALIASES

__all__ = ["Described", "catalogue"]


@dataclass(frozen=True)
class Described:
    """One method.

    Args:
        name: of the function that makes it.
        anchors: whether it is one of `methods.anchored`, which read anchors.
        arguments: name -> its default as it is written, None without one.
        text: the docstring.
    """

    name: str
    anchors: bool
    arguments: dict[str, str | None]
    text: str

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return " ".join(self.text.split("\n\n")[0].split())

    @property
    def aliases(self) -> list[str]:
        """What PEFT and mergekit call it."""
        return [alias for alias, real in ALIASES.items() if real == self.name]


def catalogue() -> dict[str, Described]:
    """Name -> method, in the order of `sapmerge.method_names.names()`."""
    package = Path(__file__).parents[1]
    found = [one for name in ("methods", "contrib") for one in _package(package / name)]
    return {one.name: one for one in found}


def _package(folder: Path) -> Iterator[Described]:
    """The methods of a package, in the order in which it lists its files."""
    for line in _tree(folder / "__init__.py").body:
        if isinstance(line, ast.ImportFrom) and line.names[0].name == "*":
            yield from _file(folder / f"{str(line.module).rpartition('.')[2]}.py")


def _file(path: Path) -> Iterator[Described]:
    body = _tree(path).body
    functions = {line.name: line for line in body if isinstance(line, ast.FunctionDef)}
    values = {ast.unparse(target): value for line in body for target, value in _assigned(line)}
    for name in ast.literal_eval(values["__all__"]):
        if name in functions:
            yield _described(functions[name], values, path.stem == "anchored")


def _assigned(line: ast.stmt) -> Iterator[tuple[ast.expr, ast.expr]]:
    """`a = 1` and `a, b = 1, 2`."""
    if isinstance(line, ast.Assign):
        target, value = line.targets[0], line.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            yield from zip(target.elts, value.elts, strict=True)
        else:
            yield target, value


def _described(
    function: ast.FunctionDef, values: Mapping[str, ast.expr], anchors: bool
) -> Described:
    taken, kw = function.args, function.args.kwonlyargs
    plain = [*taken.posonlyargs, *taken.args]
    defaults = [*[None] * (len(plain) - len(taken.defaults)), *taken.defaults, *taken.kw_defaults]
    written = {
        argument.arg: None if default is None else _written(default, values)
        for argument, default in zip([*plain, *kw], defaults, strict=True)
    }
    text = inspect.cleandoc(ast.get_docstring(function) or "")
    return Described(function.name, anchors, written, text)


def _written(default: ast.expr, values: Mapping[str, ast.expr]) -> str:
    """A default; a constant of the file as what it stands for."""
    text = ast.unparse(default)
    return ast.unparse(values[text]) if text in values else text


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
