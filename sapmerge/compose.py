"""Composition: Chain, and the wrappers that map a method to a method. (`Prune` is in prune.py.)

    method = Chain(Prune(scorer, mask, rescaler, units=...), transform, ..., merger)

What needs to see the whole adapter defines `prepare(layers) -> part`: a pre-pass over re-iterable layers that returns a
part for which every layer is a pure function. Wrappers forward it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeVar, cast

from sapmerge.bases import Basis, Frames
from sapmerge.errors import MethodError
from sapmerge.layer import AnchorPass, Dense, Layer, LayerStream, LowRank, Merger, Method, Transform, Update
from sapmerge.recipe import part, recipe

__all__ = ["ByModule", "CapShare", "Chain", "In", "Mapped", "MatchEnergy", "prepare"]

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


@dataclass(frozen=True, init=False, repr=False)
class Chain:
    """Transforms, then one merger.

    Args:
        steps: each maps a Layer to a Layer; the last maps a Layer to one update.

    Example:
        >>> import sapmerge as sm
        >>> ties = sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(0.2)), sm.ElectSign(), sm.DisjointMean())
    """

    steps: tuple[Transform | Merger, ...]

    def __init__(self, *steps: Transform | Merger) -> None:
        if not steps:
            raise MethodError("an empty Chain merges nothing; end it with a merger, e.g. Chain(Mean())")
        object.__setattr__(self, "steps", steps)

    def __repr__(self) -> str:
        return recipe(self)

    def prepare(self, layers: LayerStream) -> Chain:
        done: list[Transform | Merger] = []
        for step in self.steps:
            done.append(prepare(step, Mapped(layers, _transforms(tuple(done)))))
        return Chain(*done)

    def __call__(self, layer: Layer) -> Update:
        merged = self.steps[-1](_transforms(self.steps[:-1])(layer))
        if not isinstance(merged, (LowRank, Dense)):
            raise MethodError(f"the last step of a Chain must be a merger (Layer -> update); {self.steps[-1]!r} is not")
        return merged


def _transforms(steps: tuple[Transform | Merger, ...]) -> Callable[[Layer], Layer]:
    def run(layer: Layer) -> Layer:
        for step in steps:
            mapped = step(layer)
            if not isinstance(mapped, Layer):
                raise MethodError(f"{step!r} must map a Layer to a Layer: only the last step of a Chain is a merger")
            layer = mapped
        return layer

    return run


def anchors_of(layer: Layer | None, owner: str, advice: str = "") -> AnchorPass:
    """The anchors of a merge, from its first layer.

    Raises:
        MethodError: there are none; `owner` begins the message, `advice` ends it.
    """
    if layer is None or layer.anchors is None:
        raise MethodError(f"{owner} needs anchors and a model: merge(adapters, anchor_loader, model, ...){advice}")
    return layer.anchors


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
        return replace(self, method=prepare(self.method, Mapped(layers, lambda layer: self._inside(layer)[1])))

    def __call__(self, layer: Layer) -> Update:
        frames, inside = self._inside(layer)
        return frames.outside(self.method(inside))

    def _inside(self, layer: Layer) -> tuple[Frames, Layer]:
        frames = self.basis(layer)
        inside = tuple(frames.inside(update) for update in layer)
        return frames, replace(layer, updates=inside, frames=(*layer.frames, frames))


@part
class MatchEnergy:
    """Scale the result of a method so that the merged adapter's norm is the mean norm of its inputs.

    The mean of K nearly orthogonal updates is sqrt(K) shorter than each of them: averaging loses energy as pruning
    does. One factor for the whole adapter; norms are weighted by |weights|.

    Args:
        method: any method.
    """

    method: Method
    factor: float | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> MatchEnergy:
        method = prepare(self.method, layers)
        merged, squares, weights = 0.0, dict[str, float](), dict[str, float]()
        for layer in layers:
            merged += method(layer).norm() ** 2
            for digest, update, weight in zip(layer.adapters, layer, layer.weights, strict=True):
                squares[digest] = squares.get(digest, 0.0) + update.norm() ** 2
                weights[digest] = abs(weight)
        total = sum(weights.values())
        wanted = sum(weights[k] * squares[k] ** 0.5 for k in squares) / total if total else 0.0
        return MatchEnergy(method, wanted / merged**0.5 if merged > 0 else 1.0)

    def __call__(self, layer: Layer) -> Update:
        if self.factor is None:
            return self.prepare(cast("LayerStream", [layer]))(layer)
        layer.record("energy_factor", self.factor)
        return self.method(layer).scaled(self.factor)


@part
class CapShare:
    """Bound one adapter's influence: in no layer does it bring more than `share` of the energy sum_k ||w_k D_k||^2.

    Louder adapters are scaled down to the cap; the others are not touched. Where fewer than 1 / share adapters have an
    update, the cap is an equal share. This bounds how much one adapter can move the result, not in which direction: it
    is no defence against a backdoor.

    Args:
        method: any method.
        share: in (0, 1).
    """

    method: Method
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise MethodError(f"CapShare's share is a fraction of the energy, in (0, 1); got {self.share!r}")

    def prepare(self, layers: LayerStream) -> CapShare:
        return replace(self, method=prepare(self.method, Mapped(layers, self._capped)))

    def __call__(self, layer: Layer) -> Update:
        return self.method(self._capped(layer))

    def _capped(self, layer: Layer) -> Layer:
        norms = [abs(weight) * update.norm() for update, weight in zip(layer, layer.weights, strict=True)]
        limit = _cap([norm**2 for norm in norms], self.share) ** 0.5
        scales = [min(1.0, limit / norm) if norm > 0 else 1.0 for norm in norms]
        layer.record("capped", {label: scale for label, scale in zip(layer.adapters, scales) if scale < 1})
        capped = tuple(update.scaled(scale) if scale < 1 else update for update, scale in zip(layer, scales))
        return replace(layer, updates=capped)


def _cap(energies: Sequence[float], share: float) -> float:
    """The energy c for which the largest of min(e, c) is `share` of their sum; the largest energy if none has more."""
    loud = sorted((energy for energy in energies if energy > 0), reverse=True)
    if not loud:
        return 0.0
    share = max(share, 1 / len(loud))
    if loud[0] <= share * sum(loud):
        return loud[0]
    for count in range(1, len(loud)):  # cut the `count` loudest to one level
        if count * share < 1:
            cap = share * sum(loud[count:]) / (1 - count * share)
            if cap >= loud[count]:
                return cap
    return loud[-1]


@part
class ByModule:
    """A method per group of modules, e.g. one for a vision tower and one for a language model.

    Args:
        methods: glob pattern on the module's name -> method; the first pattern that matches is taken.
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
                raise MethodError(f"ByModule: no module is left for the pattern {pattern!r}; modules: {names[:5]}, ...")

        def group(pattern: str | None) -> Mapped:
            return Mapped(layers, lambda layer: layer if self._pattern(layer.name) == pattern else None)

        prepared = {pattern: prepare(method, group(pattern)) for pattern, method in self.methods.items()}
        rest = any(self._pattern(name) is None for name in names)
        return ByModule(prepared, prepare(self.default, group(None)) if rest else self.default)

    def __call__(self, layer: Layer) -> Update:
        pattern = self._pattern(layer.name)
        return (self.default if pattern is None else self.methods[pattern])(layer)

    def _pattern(self, name: str) -> str | None:
        return next((pattern for pattern in self.methods if fnmatchcase(name, pattern)), None)
