"""Statistics of the gradient over the anchors, in the coordinates of a unit,
within a budget of memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sapmerge.anchors.gradients import TokenGradient
from sapmerge.anchors.inputs import InputSizes
from sapmerge.anchors.runner import Runner
from sapmerge.core.frames import Frames
from sapmerge.core.protocols import Coordinates, LayerStream, Units
from sapmerge.core.updates import Update
from sapmerge.errors import AnchorError, MethodError, SapmergeWarning
from sapmerge.parts.units import Entries

__all__ = ["GradientStatistics", "in_turn", "slopes_along"]

Halves = dict[str, tuple[Tensor, Tensor]]

_LEAST, _TURNS = 64 << 20, 4
"""Bytes that are always held, and how many turns are worth their cost:
all layers are read again in each.
"""


def in_turn(
    anchors: Runner, layers: LayerStream, units: Units
) -> Iterator[tuple[Sequence[int], GradientStatistics]]:
    """Statistics of a quarter of the adapters at a time, or of as many as the budget holds.

    Every adapter runs once, unless its own statistics exceed the budget;
    and the base once, if those of all do not.
    """
    sizes = dict[int, int]()
    for layer in layers:
        for k, update in enumerate(layer):
            sizes[k] = sizes.get(k, 0) + _bytes_of(update, units)
    total = sum(sizes.values())
    enough = max(_LEAST, total / _TURNS)
    turns, held = list[list[int]](), 0
    for k, size in sizes.items():
        if turns and held < enough and held + size <= anchors.budget:
            turns[-1].append(k)
            held += size
        else:
            turns.append([k])
            held = size
    at_base = GradientStatistics(anchors, layers, units) if total <= anchors.budget else None
    for adapters in turns:
        yield adapters, GradientStatistics(anchors, layers, units, adapters, at_base)


def _bytes_of(update: Update, units: Units) -> int:
    """Of the two halves of a statistic, in float32."""
    m, n = update.shape
    return (
        8 * (m * n if isinstance(units, Entries) else update.rank * (m + n))
        if not update.absent
        else 0
    )


class GradientStatistics:
    """An `Observation`: computed a group of layers at a time,
    when the first of the group is asked for.

    Args:
        adapters: that will be asked for; by default all.
        at_base: whom to ask for gradients at the base, which are the same pass for all adapters;
            by default it runs.
    """

    def __init__(
        self,
        anchors: Runner,
        layers: LayerStream,
        units: Units,
        adapters: Sequence[int] | None = None,
        at_base: GradientStatistics | None = None,
    ) -> None:
        self._at_base = at_base
        self._anchors, self._layers, self._units, self._adapters = anchors, layers, units, adapters
        self._groups: dict[str, int] = {}
        self._held: dict[tuple[int, str, str], dict[tuple[str, int], Halves]] = {}
        self._sizes: InputSizes | None = None

    def moment(
        self, layer: str, adapter: int, part: str, statistic: str, at: str
    ) -> tuple[Tensor, Tensor]:
        """See `sapmerge.core.protocols.Observation`."""
        if statistic not in ("mean", "absolute", "square", "batch square") or at not in (
            "adapter",
            "base",
        ):
            raise MethodError(
                "a gradient statistic is 'mean', 'absolute' or 'square' (or 'batch square'), at "
                f"the 'adapter' or at the 'base'; got {statistic!r} at {at!r}"
            )
        if at == "base" and self._at_base is not None:
            return self._at_base.moment(layer, adapter, part, statistic, at)
        if not self._groups:
            self._plan()
        key = (self._groups[layer], statistic, at)
        if key not in self._held:
            self._held = {held: halves for held, halves in self._held.items() if held[0] == key[0]}
            self._held[key] = self._run(*key)
        return self._held[key][layer, adapter][part]

    def activations(self, layer: str, adapter: int, part: str) -> tuple[Tensor, Tensor]:
        """See `sapmerge.core.protocols.Observation`."""
        if self._sizes is None:
            self._sizes = InputSizes(self._anchors, self._layers, self._units)
        return self._sizes.halves(layer, adapter, part)

    def _plan(self) -> None:
        """Split the layers into groups whose statistics fit the budget."""
        group, size = 0, 0
        for layer in self._layers:
            need = sum(
                _bytes_of(update, self._units) for k, update in enumerate(layer) if self._asked(k)
            )
            if size and size + need > self._anchors.budget:
                group, size = group + 1, 0
            self._groups[layer.name], size = group, size + need

    def _asked(self, adapter: int) -> bool:
        return self._adapters is None or adapter in self._adapters

    def _run(self, group: int, statistic: str, at: str) -> dict[tuple[str, int], Halves]:
        resume = self._anchors.resume if at == "adapter" else None
        sums: dict[int, dict[str, _Sums]] = {}  # adapter -> layer -> its sums
        contents: dict[int, dict[str, str]] = {}
        for layer in self._layers:
            if self._groups[layer.name] == group:
                for k, update in enumerate(layer):
                    if not update.absent and self._asked(k):
                        unit, shape = self._units(update), self._anchors.modules[layer.name].shape
                        total = _Sums(unit, layer.frames, statistic, shape, update.device)
                        sums.setdefault(k, {})[layer.name] = total
                        if resume is not None:
                            contents.setdefault(k, {})[layer.name] = resume.content(
                                update, layer.frames
                            )
        if at == "base":
            return self._at_the_base(sums)
        return {
            (name, k): halves
            for k, mine in sorted(sums.items())
            for name, halves in self._of_adapter(k, mine, statistic, contents.get(k, {})).items()
        }

    def _at_the_base(
        self, sums: Mapping[int, Mapping[str, _Sums]]
    ) -> dict[tuple[str, int], Halves]:
        """All adapters' statistics from one pass."""
        of_layer: dict[str, list[_Sums]] = {}
        for mine in sums.values():
            for name, total in mine.items():
                of_layer.setdefault(name, []).append(total)
        count = self._anchors.backward(
            None, {name: _all(total) for name, total in of_layer.items()}
        )
        self._warn_of_unused({name for name, total in of_layer.items() if not total[0].seen})
        return {
            (name, k): total.halves(count)
            for k, mine in sums.items()
            for name, total in mine.items()
        }

    def _of_adapter(
        self, k: int, sums: Mapping[str, _Sums], statistic: str, contents: Mapping[str, str]
    ) -> Mapping[str, Halves]:
        """One adapter's statistics: from an earlier run if a cache holds them,
        else from a pass over the anchors.
        """
        resume = self._anchors.resume
        key = "" if resume is None else resume.key(k, statistic, self._units, contents)
        kept = None if resume is None else resume.get(key)
        if kept is not None:
            totals, notes = kept
            self._anchors.note_loss(k, notes["loss"])
            self._warn_of_unused(set(notes["unused"]))
            return {name: _on(halves, sums[name].device) for name, halves in totals.items()}
        if not self._anchors.mine(k):
            return {name: total.halves(1) for name, total in sums.items()}  # of nobody: zeros
        count = self._anchors.backward(k, {name: total.add for name, total in sums.items()})
        unused = {name for name, total in sums.items() if not total.seen}
        self._warn_of_unused(unused)
        halves = {name: total.halves(count) for name, total in sums.items()}
        if resume is not None:
            resume.put(key, halves, {"loss": self._anchors.loss_at(k), "unused": sorted(unused)})
        return halves

    def _warn_of_unused(self, names: set[str]) -> None:
        new = sorted(names - self._anchors.unused)
        self._anchors.unused.update(new)
        if new:
            warnings.warn(
                (
                    f"{len(new)} layers take no part in the anchor loss, their scores are 0: "
                    f"{', '.join(new[:3])}"
                )
                + (", ..." if len(new) > 3 else ""),
                SapmergeWarning,
                stacklevel=2,
            )


def _on(halves: Mapping[str, tuple[Tensor, Tensor]], device: torch.device) -> Halves:
    return {part: (one.to(device), other.to(device)) for part, (one, other) in halves.items()}


class _Sums:
    """Sums of a gradient statistic over the samples of even and of odd number."""

    def __init__(
        self,
        unit: Coordinates,
        frames: tuple[Frames, ...],
        statistic: str,
        shape: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._pull, self._frames, self._statistic = unit.pull, frames, statistic
        self._count = sum(values.numel() for values in unit.values.values())
        self._shape, self.device = shape, device
        self._sums: list[dict[str, Tensor]] = [{}, {}]
        self.seen = 0

    def add(self, gradient: TokenGradient, size: int) -> None:
        """One batch. The loss is a mean over the batch,
        so a sample's own gradient is `size` times its part.
        """
        gradient = gradient.inside(self._frames)
        if self._statistic == "batch square":
            for half in (0, 1):  # a batch is not divided: both halves are the whole
                self._accumulate(half, gradient.together(), size)
        elif len(gradient.x) == size:
            self._add_samples(gradient, size)
        elif self._statistic == "mean":
            for half in (0, 1):  # the samples cannot be told apart: both halves are the whole
                self._accumulate(half, gradient.together(), size / 2)
        else:
            raise AnchorError(
                "the scorer reads gradients per sample, but a layer mixes the samples of a batch "
                f"({len(gradient.x)} rows for {size} samples); use batches of one sample, or "
                "Taylor()"
            )
        self.seen += size

    def _add_samples(self, gradient: TokenGradient, size: int) -> None:
        # all samples at once are no larger than x, g
        if self._count <= gradient.x[0].numel() + gradient.g[0].numel():
            parts = [(0, gradient)]
        elif self._statistic == "mean":
            parts = [
                (start, gradient.samples(slice(start, None, 2)).together())
                for start in range(min(size, 2))
            ]
        else:  # one at a time: a whole batch of dense gradients would not fit
            parts = [(start, gradient.samples(slice(start, start + 1))) for start in range(size)]
        for start, part in parts:
            self._accumulate((self.seen + start) % 2, part, size)

    def _accumulate(self, half: int, gradient: TokenGradient, factor: float) -> None:
        """Add the parts of the gradient to the two halves in turn, the first one to `half`."""
        for name, values in self._pull(gradient).items():
            for start in range(min(len(values), 2)):
                sums, each = self._sums[(half + start) % 2], self._of(values[start::2] * factor)
                sums[name] = sums[name].add_(each) if name in sums else each

    def _of(self, gradients: Tensor) -> Tensor:
        if self._statistic == "absolute":
            gradients = gradients.abs()
        elif self._statistic == "square":
            gradients = gradients.square()
        elif self._statistic == "batch square":
            gradients = gradients.square() / 2
        return gradients.sum(0) if len(gradients) > 1 else gradients[0]

    def halves(self, count: int) -> Halves:
        """Two estimates whose mean is the statistic over all `count` samples;
        zero for a layer without a gradient.
        """
        if not self.seen:
            nothing = TokenGradient(
                torch.zeros(1, 1, self._shape[1]), torch.zeros(1, 1, self._shape[0])
            )
            self._accumulate(0, nothing.inside(self._frames), 0.0)
        one, other = (
            {name: value.to(self.device) for name, value in sums.items()} for sums in self._sums
        )
        if count == 1:  # one sample has no halves
            return {name: (value, value) for name, value in (one | other).items()}
        for sums, opposite in ((one, other), (other, one)):
            for name, value in opposite.items():
                sums.setdefault(name, torch.zeros_like(value))
        return {name: (one[name].mul_(2 / count), other[name].mul_(2 / count)) for name in one}


def _all(sums: Sequence[_Sums]) -> Callable[[TokenGradient, int], None]:
    def add(gradient: TokenGradient, size: int) -> None:
        for total in sums:
            total.add(gradient, size)

    return add


def slopes_along(
    anchors: Runner, directions: Mapping[str, Sequence[Update]]
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss at base + the runner's only adapter, and its derivatives <G, D>:
    layer -> (K,), float64.
    """
    sums = {
        name: torch.zeros(len(along), dtype=torch.float64) for name, along in directions.items()
    }

    def along(name: str) -> Callable[[TokenGradient, int], None]:
        def add(gradient: TokenGradient, size: int) -> None:
            sums[name] += gradient.together().along(directions[name]) * size

        return add

    count = anchors.backward(0, {name: along(name) for name in directions})
    return anchors.loss_at(0), {name: total / count for name, total in sums.items()}
