"""What the layers see on the anchors: Gram matrices and sizes of their inputs,
by forward passes without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.anchors.gradients import TokenGradient
from sapmerge.anchors.runner import Runner
from sapmerge.core.frames import Frames
from sapmerge.core.layer import Layer
from sapmerge.core.protocols import Coordinates, LayerStream, Units
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.parts.units import Layers

__all__ = ["InputSizes", "stream_grams"]


class InputSizes:
    """Per coordinate of a unit, the mean over the anchors of |x_j|^2,
    x_j the inputs that the coordinate multiplies.
    """

    def __init__(self, anchors: Runner, layers: LayerStream, units: Units) -> None:
        if isinstance(units, Layers):
            raise MethodError(
                "activations belong to single inputs of a layer: use Entries(), Factors() or "
                "Directions()"
            )
        self._anchors, self._layers, self._units = anchors, layers, units
        self._found: dict[int, dict[str, dict[str, tuple[Tensor, Tensor]]]] = {}

    def halves(self, layer: str, adapter: int, part: str) -> tuple[Tensor, Tensor]:
        """The mean square over every other sample, and over the rest, at base + adapter;
        broadcasts to the values.
        """
        if adapter not in self._found:
            sums = {
                one.name: _Squares(
                    self._units(one.updates[adapter]),
                    one.frames,
                    self._anchors.modules[one.name].shape,
                )
                for one in self._layers
                if not one.updates[adapter].absent
            }
            count = self._anchors.forward(
                adapter, {name: total.add for name, total in sums.items()}
            )
            self._found[adapter] = {name: total.halves(count) for name, total in sums.items()}
        return self._found[adapter][layer][part]


class _Squares:
    """Sums of squared inputs over the samples of even and of odd number."""

    def __init__(
        self, coordinates: Coordinates, frames: tuple[Frames, ...], shape: tuple[int, int]
    ) -> None:
        self._pull, self._frames, self._shape = coordinates.pull, frames, shape
        self._device = next(iter(coordinates.values.values())).device
        self._sums: list[dict[str, Tensor]] = [{}, {}]

    def add(self, inputs: TokenGradient, size: int, before: int) -> None:
        inputs = inputs.inside(self._frames)
        for half in (0, 1):
            if len(inputs.x) == size:
                self._accumulate((before + half) % 2, inputs.samples(slice(half, None, 2)), 1.0)
            else:  # the samples cannot be told apart: both halves are the whole
                self._accumulate(half, inputs, 0.5)

    def _accumulate(self, half: int, inputs: TokenGradient, factor: float) -> None:
        sums = self._sums[half]
        for name, value in self._pull(_InputView(inputs)).items():
            sums[name] = sums.get(name, 0.0) + value[0] * factor

    def halves(self, count: int) -> dict[str, tuple[Tensor, Tensor]]:
        nothing = TokenGradient(
            torch.zeros(1, 0, self._shape[1]), torch.zeros(1, 0, self._shape[0])
        )
        for half in (0, 1):
            if not self._sums[half]:
                self._accumulate(half, nothing.inside(self._frames), 0.0)
        one, other = (
            {name: value.to(self._device) for name, value in sums.items()} for sums in self._sums
        )
        if count == 1:  # one sample has no halves
            return {name: (one[name] + other[name], one[name] + other[name]) for name in one}
        return {name: (one[name] * (2 / count), other[name] * (2 / count)) for name in one}


@dataclass(frozen=True)
class _InputView:
    """A `GradientView` without the side of the outputs:
    the sums of squares of the inputs on each coordinate.
    """

    inputs: TokenGradient

    def left(self, B: Tensor) -> Tensor:
        return self.dense()

    def right(self, A: Tensor) -> Tensor:
        return self._through(A)[None, None]

    def diagonal(self, U: Tensor, Vh: Tensor) -> Tensor:
        return self._through(Vh)[None]

    def dense(self) -> Tensor:
        x, rows = self.inputs.x, self.inputs.rows
        if rows is not None:
            return torch.bincount(x.flatten(), minlength=rows).to(self.inputs.g.dtype)[None, None]
        return x.double().square().sum((0, 1))[None, None]

    def _through(self, A: Tensor) -> Tensor:
        return self.inputs.inside((Frames(V=A.T),)).x.double().square().sum((0, 1))


def stream_grams(
    anchors: Runner, layers: LayerStream, fold: Callable[[Layer, int, Tensor], None]
) -> None:
    """See `sapmerge.core.protocols.AnchorPass.grams`:
    one pass per adapter and group of layers that fits the budget.
    """
    for group in _groups(layers, anchors.budget):
        for k in range(len(group[0])):
            sums = {layer.name: _Gram(layer.frames) for layer in group}
            anchors.forward(k, {name: total.add for name, total in sums.items()})
            for layer in group:
                fold(layer, k, sums.pop(layer.name).mean(layer))


def _groups(layers: LayerStream, budget: int) -> Generator[Sequence[Layer]]:
    """Layers whose Gram matrices, and sums of them, fit the budget."""
    group, size = list[Layer](), 0
    for layer in layers:
        need = 16 * layer.shape[1] ** 2
        if group and size + need > budget:
            yield group
            group, size = [], 0
        group.append(layer)
        size += need
    if group:
        yield group


class _Gram:
    """sum x x^T over all tokens, float64; of an embedding, whose inputs are one-hot,
    only the diagonal.
    """

    def __init__(self, frames: tuple[Frames, ...]) -> None:
        self._frames, self._tokens = frames, 0
        self._sum: Tensor | None = None

    def add(self, inputs: TokenGradient, size: int, before: int) -> None:
        inputs = inputs.inside(self._frames)
        if inputs.rows is not None:
            moment = torch.bincount(inputs.x.flatten(), minlength=inputs.rows).double()
        else:
            x = inputs.x.flatten(0, 1).double()
            moment = x.T @ x
        self._tokens += inputs.x.shape[0] * inputs.x.shape[1]
        self._sum = moment if self._sum is None else self._sum.add_(moment)

    def mean(self, layer: Layer) -> Tensor:
        device, n = layer.updates[0].device, layer.shape[1]
        if self._sum is None:
            return torch.zeros(n, dtype=torch.float64, device=device)
        if not bool(torch.isfinite(self._sum).all()):
            raise NonFiniteError(
                f"the inputs of layer {layer.name!r} on the anchors are NaN or infinite"
            )
        return (self._sum / max(self._tokens, 1)).to(device)
