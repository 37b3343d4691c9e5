"""A method prints as its recipe, and a recipe reads back as the method.

`part` is the decorator of every primitive: a frozen dataclass whose repr is Python source over public names. `parse`
reads such source with `ast` and a closed table of names; nothing is ever evaluated or imported because a text says so.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast

from typing_extensions import dataclass_transform

from sapmerge.errors import MethodError

__all__ = ["parse", "part", "parts", "recipe"]

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def part(cls: type[T]) -> type[T]:
    """A frozen dataclass whose repr is its recipe: `TopFraction(density=0.2, scope='layer')`."""
    made = dataclass(frozen=True, repr=False)(cls)
    made.__repr__ = lambda self: recipe(self)
    return made


def recipe(value: object) -> str:
    """The source text of a part. A public loss prints as its name, a user's function as the text 'module:qualname'."""
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(steps := getattr(value, "steps", None), tuple):
            return f"{type(value).__name__}({', '.join(recipe(step) for step in cast('tuple[object, ...]', steps))})"
        shown = [f"{f.name}={recipe(getattr(value, f.name))}" for f in fields(value) if f.repr]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return "{" + ", ".join(f"{recipe(key)}: {recipe(entry)}" for key, entry in items) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{recipe(entry)}, " for entry in cast("tuple[object, ...]", value)).rstrip(" ") + ")"
    if callable(value):
        module = getattr(value, "__module__", type(value).__module__)
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return name if module == "sapmerge.anchors.losses" else repr(f"{module}:{name}")
    return repr(value)


def parts(value: object) -> Iterator[object]:
    """Every part of a method, itself first, depth first. A user's function is one part."""
    if isinstance(value, Mapping):
        for entry in cast("Mapping[object, object]", value).values():
            yield from parts(entry)
    elif isinstance(value, tuple):
        for entry in cast("tuple[object, ...]", value):
            yield from parts(entry)
    else:
        yield value
        if is_dataclass(value) and not isinstance(value, type):
            for f in fields(value):
                if f.repr:
                    yield from parts(getattr(value, f.name))


def parse(text: str, functions: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The method that a recipe describes.

    Args:
        text: e.g. "ties(density=0.2)" or "Chain(Prune(Magnitude(), TopFraction(0.2)), Mean())".
        functions: your own functions, by the "module:qualname" under which the recipe names them.

    Raises:
        MethodError: a name that is not public, a function that was not passed, or anything but calls and literals.

    Example:
        >>> import sapmerge as sm
        >>> sm.parse("Chain(Mean())")
        Chain(Mean())
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, functions or {}, text[:200])
    except MethodError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MethodError(f"the recipe {text[:200]!r} is not Python syntax: {error}") from None


def _build(node: ast.expr, functions: Mapping[str, Callable[..., Any]], text: str) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            made = _public(name, text)
            positional = [_build(argument, functions, text) for argument in node.args]
            if any(keyword.arg is None for keyword in node.keywords):
                raise MethodError(f"the recipe {text!r} uses **, which is not allowed")
            named = {str(keyword.arg): _build(keyword.value, functions, text) for keyword in node.keywords}
            try:
                return made(*positional, **named)
            except TypeError as error:
                raise MethodError(f"the recipe {text!r} calls {name} wrongly: {error}") from None
        case ast.Constant(value=str() as name) if ":" in name:
            if name not in functions:
                raise MethodError(
                    f"the recipe names the function {name!r}; pass it yourself: parse(text, functions={{{name!r}: f}})"
                )
            return functions[name]
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Name(id=name):
            return _loss(name, text)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            return tuple(_build(element, functions, text) for element in elements)
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {
                _build(cast("ast.expr", key), functions, text): _build(value, functions, text)
                for key, value in zip(keys, values, strict=True)
            }
        case _:
            raise MethodError(
                f"the recipe {text!r} contains a {type(node).__name__}; only calls of public "
                "names and literals are read"
            )


def _loss(name: str, text: str) -> Callable[..., Any]:
    from sapmerge.anchors import losses

    if name not in losses.__all__:
        raise MethodError(f"the recipe {text!r} uses the bare name {name!r}; only losses stand without parentheses")
    return getattr(losses, name)


def _public(name: str, text: str) -> Callable[..., Any]:
    import sapmerge

    if name not in sapmerge.RECIPE_NAMES:
        raise MethodError(f"the recipe {text!r} uses {name!r}, which is not a public primitive or method of sapmerge")
    return getattr(sapmerge, name)
