"""Composition: Chain, and the wrappers that map a method to a method. (`Prune` is in prune.py.)

    method = Chain(Prune(scorer, mask, rescaler, units=...), transform, ..., merger)

What needs to see the whole adapter defines `prepare(layers) -> part`: a pre-pass over re-iterable
layers that returns a part for which every layer is a pure function. Wrappers forward it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

from sapmerge.core.frames import Frames
from sapmerge.core.layer import Layer
from sapmerge.core.part import part, prepare, recipe
from sapmerge.core.protocols import Basis, LayerStream, Merger, Method, Transform
from sapmerge.core.stream import Mapped
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.linear import Mean, Sum, sum_of
from sapmerge.parts.prune import Prune, pruned_in_turn

__all__ = ["ByModule", "Chain", "In"]


@dataclass(frozen=True, init=False, repr=False)
class Chain:
    """Transforms, then one merger.

    Args:
        steps: each maps a Layer to a Layer; the last maps a Layer to one update.

    Example:
        >>> import sapmerge as sm
        >>> prune = sm.Prune(sm.Magnitude(), sm.TopFraction(0.2))
        >>> ties = sm.Chain(prune, sm.ElectSign(), sm.DisjointMean())
    """

    steps: tuple[Transform | Merger, ...]

    def __init__(self, *steps: Transform | Merger) -> None:
        if not steps:
            raise MethodError(
                "an empty Chain merges nothing; end it with a merger, e.g. Chain(Mean())"
            )
        object.__setattr__(self, "steps", steps)

    def __repr__(self) -> str:
        return recipe(self)

    def prepare(self, layers: LayerStream) -> Chain:
        done: list[Transform | Merger] = []
        for step in self.steps:
            done.append(prepare(step, Mapped(layers, _transforms(tuple(done))) if done else layers))
        return Chain(*done)

    def __call__(self, layer: Layer) -> Update:
        *transforms, merger = self.steps
        if self.in_turn:
            updates = pruned_in_turn(cast("list[Prune]", transforms), layer)
            return sum_of(cast("Sum | Mean", merger), layer, updates)
        merged = merger(_transforms(tuple(transforms))(layer))
        if not isinstance(merged, (LowRank, Dense)):
            raise MethodError(
                f"the last step of a Chain must be a merger (Layer -> update); {merger!r} is not"
            )
        return merged

    @property
    def in_turn(self) -> bool:
        """Whether it adds up updates that are made one after the other, each from its own adapter:
        of so many matrices it holds one.
        """
        *transforms, merger = self.steps
        return isinstance(merger, (Sum, Mean)) and all(isinstance(t, Prune) for t in transforms)


def _transforms(steps: tuple[Transform | Merger, ...]) -> Callable[[Layer], Layer]:
    def run(layer: Layer) -> Layer:
        for step in steps:
            mapped = step(layer)
            if not isinstance(mapped, Layer):
                raise MethodError(
                    f"{step!r} must map a Layer to a Layer: only the last step of a Chain is a "
                    "merger"
                )
            layer = mapped
        return layer

    return run


@part
class In:
    """Run a method in other coordinates and bring its result back.

    Args:
        basis: Layer -> Frames, e.g. SharedBasis() (KnOTS) or CoreSpace().
        method: any method; it sees the coordinates U^T D V of every update.
    """

    basis: Basis
    method: Method

    def prepare(self, layers: LayerStream) -> In:
        inside = Mapped(layers, lambda layer: self._inside(layer)[1], layers.anchors)
        return replace(self, method=prepare(self.method, inside))

    def __call__(self, layer: Layer) -> Update:
        frames, inside = self._inside(layer)
        return frames.outside(self.method(inside))

    def _inside(self, layer: Layer) -> tuple[Frames, Layer]:
        frames = self.basis(layer)
        return frames, layer.inside(frames)


@part
class ByModule:
    """A method per group of modules, e.g. one for a vision tower and one for a language model.

    Args:
        methods: glob pattern on the module's name -> method; the first pattern that matches is
            taken.
        default: the method of every other module.

    Raises:
        MethodError: a pattern that matches no module.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.ByModule({"*vision_tower*": sm.mean()}, default=sm.ties(density=0.2))
    """

    methods: Mapping[str, Method]
    default: Method

    def prepare(self, layers: LayerStream) -> ByModule:
        names = [layer.name for layer in layers]
        for pattern in self.methods:
            if not any(self._pattern(name) == pattern for name in names):
                raise MethodError(
                    f"ByModule: no module is left for the pattern {pattern!r}; modules: "
                    f"{names[:5]}, ..."
                )

        def group(pattern: str | None) -> Mapped:
            return Mapped(
                layers,
                lambda layer: layer if self._pattern(layer.name) == pattern else None,
                layers.anchors,
            )

        prepared = {
            pattern: prepare(method, group(pattern)) for pattern, method in self.methods.items()
        }
        rest = any(self._pattern(name) is None for name in names)
        return ByModule(prepared, prepare(self.default, group(None)) if rest else self.default)

    def __call__(self, layer: Layer) -> Update:
        return self.of(layer.name)(layer)

    def of(self, name: str) -> Method:
        """The method of a module."""
        pattern = self._pattern(name)
        return self.default if pattern is None else self.methods[pattern]

    def _pattern(self, name: str) -> str | None:
        return next((pattern for pattern in self.methods if fnmatchcase(name, pattern)), None)
