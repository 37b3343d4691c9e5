"""What all primitives have in common: they are frozen data, print as their recipe,
and may have a pre-pass.

`part` is the decorator of every primitive: a frozen dataclass whose repr is Python source over
public names (`parsing` reads it back). `prepare` runs the pre-pass of a part that needs
whole adapters.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from inspect import signature
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from sapmerge.core.layer import Layer
from sapmerge.core.protocols import AnchorPass, LayerStream
from sapmerge.core.scalars import plain
from sapmerge.core.stream import Stream, stream_of
from sapmerge.errors import MethodError

__all__ = ["on_one_layer", "part", "parts", "prepare", "recipe", "unprepared"]

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")


def prepare(part_or_function: P, layers: LayerStream | Iterable[Layer]) -> P:
    """Run the pre-pass of a part, if it has one.

    Args:
        part_or_function: any part, or a function, which is returned as it is.
        layers: a stream, or a list of layers.

    Example:
        >>> import torch, sapmerge as sm
        >>> layers = [sm.Layer("l", [sm.Dense(torch.eye(2)), sm.Dense(9 * torch.eye(2))])]
        >>> sm.prepare(sm.ClipNorms(sm.mean()), layers).scales  # of two, neither is clipped
        (1.0, 1.0)
    """
    pre_pass = getattr(part_or_function, "prepare", None)
    return part_or_function if pre_pass is None else pre_pass(stream_of(layers))


def on_one_layer(
    part_or_function: Callable[[Layer], R], layer: Layer, anchors: AnchorPass | None = None
) -> R:
    """Run a transform, a merger or a method on one layer alone, as if it were the whole adapter.

    Example:
        >>> import torch, sapmerge as sm
        >>> rows = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 3.0]])
        >>> layer = sm.Layer("l", [sm.Dense(row) for row in rows])
        >>> merged = sm.on_one_layer(sm.MatchEnergy(sm.mean()), layer)
        >>> round(merged.norm() / layer.updates[0].norm(), 6)
        1.0
    """
    return prepare(part_or_function, Stream((layer,), anchors))(layer)


def unprepared(owner: object) -> MethodError:
    """The error of a part that needs the whole adapter,
    and is called on a layer before it has seen it.
    """
    return MethodError(
        f"{type(owner).__name__} looks at whole adapters, and has not seen them: a part that is "
        "called inside a function of your own cannot prepare itself. Give the part itself to "
        "merge, Chain or a wrapper; prepare it yourself, sm.prepare(part, layers); or run it on "
        "a single layer with sm.on_one_layer(part, layer)"
    )


@dataclass_transform(frozen_default=True)
def part(cls: type[T]) -> type[T]:
    """A frozen dataclass whose repr is its recipe: `TopFraction(density=0.2, scope='layer')`."""
    own = cls.__dict__.get("__post_init__")

    def checked(self: Any) -> None:
        for f in fields(self):
            if f.repr:
                object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        _check_arguments(self)
        if own is not None:
            own(self)

    cls.__post_init__ = checked  # type: ignore[attr-defined]
    made = dataclass(frozen=True, repr=False)(cls)
    made.__repr__ = lambda self: recipe(self)
    return made


def _check_arguments(made: Any) -> None:
    """Modes are among their choices, and where a part or a function is wanted there is one.

    Raises:
        MethodError: names the part, the argument, what it may be, and what it is.
    """
    for f in fields(made):
        if f.repr:
            hint, value = _hints(made.__class__)[f.name], getattr(made, f.name)
            if get_origin(hint) is Literal and not (
                isinstance(value, Hashable) and value in get_args(hint)
            ):
                choices = " or ".join(map(repr, get_args(hint)))
                raise MethodError(f"{type(made).__name__}'s {f.name} is {choices}; got {value!r}")
            if _wants_function(hint) and (isinstance(value, type) or not callable(value)):
                raise MethodError(
                    f"{type(made).__name__}'s {f.name} is a part or a function, e.g. Magnitude(); "
                    f"got {value!r:.80}"
                )
            given = get_args(hint)
            if given and isinstance(given[0], list):
                _check_call(made, f.name, cast("list[Any]", given[0]), value)


def _check_call(made: Any, name: str, wanted: list[Any], value: Any) -> None:
    """A function takes as many arguments as it will be given."""
    try:
        own = signature(value)
    except ValueError:  # it has none that can be read
        return
    try:
        own.bind(*wanted)
    except TypeError:
        kinds = ", ".join(getattr(kind, "__name__", str(kind)) for kind in wanted)
        raise MethodError(
            f"{type(made).__name__}'s {name} is called with {len(wanted)} arguments, ({kinds}); "
            f"{recipe(value):.80} takes {own}"
        ) from None


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _wants_function(hint: Any) -> bool:
    """Whether an annotation is that of a function, or of a protocol that is called."""
    return get_origin(hint) is abc.Callable or getattr(hint, "_is_protocol", False)  # pyright: ignore[reportUnknownMemberType]


def recipe(value: object) -> str:
    """The source text of a part. A public loss prints as its name,
    a user's function as the text 'module:qualname'.
    """
    if is_dataclass(value) and not isinstance(value, type):
        if isinstance(steps := getattr(value, "steps", None), tuple):
            texts = (recipe(step) for step in cast("tuple[object, ...]", steps))
            return f"{type(value).__name__}({', '.join(texts)})"
        shown = [f"{f.name}={recipe(getattr(value, f.name))}" for f in fields(value) if f.repr]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return "{" + ", ".join(f"{recipe(key)}: {recipe(entry)}" for key, entry in items) + "}"
    if isinstance(value, tuple):
        return (
            "("
            + "".join(f"{recipe(entry)}, " for entry in cast("tuple[object, ...]", value)).rstrip(
                " "
            )
            + ")"
        )
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
