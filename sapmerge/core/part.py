"""A method prints as its recipe, and a recipe reads back as the method.

`part` is the decorator of every primitive: a frozen dataclass whose repr is Python source over public names. `parse`
reads such source with `ast` and a closed table of names; nothing is ever evaluated or imported because a text says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TypeVar, cast

from typing_extensions import dataclass_transform

from sapmerge.core.layer import Layer
from sapmerge.core.protocols import LayerStream

__all__ = ["Mapped", "part", "parts", "prepare", "recipe"]

P = TypeVar("P")


def prepare(part_or_function: P, layers: LayerStream) -> P:
    """Run the pre-pass of a part, if it has one."""
    pre_pass = getattr(part_or_function, "prepare", None)
    return part_or_function if pre_pass is None else pre_pass(layers)


@dataclass(frozen=True)
class Mapped:
    """Layers seen through a function; can be iterated again and again."""

    layers: LayerStream
    function: Callable[[Layer], Layer | None]

    def __iter__(self) -> Iterator[Layer]:
        for layer in self.layers:
            mapped = self.function(layer)
            if mapped is not None:
                yield mapped


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
        return name if module == "sapmerge.losses" else repr(f"{module}:{name}")
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
