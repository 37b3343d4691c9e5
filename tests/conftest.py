"""What every test module shares: one thread, fixed seeds, and small layers to merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.core.stream import scaled

SHAPES = {"model.0.q_proj": (12, 10), "model.0.v_proj": (7, 13), "model.1.up_proj": (9, 9)}


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def low_rank(
    shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype = torch.float64
) -> sm.LowRank:
    """A random low-rank update; drawn in float64, so both dtypes hold the same numbers
    up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)
    A = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return sm.LowRank(B.to(dtype), A.to(dtype))


def make_layers(
    ranks: Sequence[int] = (2, 4, 3),
    shapes: dict[str, tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float64,
    weights: Sequence[float] = (),
    seed: int = 0,
) -> list[sm.Layer]:
    """Layers for len(ranks) adapters called a0, a1, ...;
    rank 0 means that the adapter lacks the layer.
    """
    layers = []
    for number, (name, shape) in enumerate((shapes or SHAPES).items()):
        updates = [
            low_rank(shape, rank, 1000 * seed + 100 * number + k, dtype)
            for k, rank in enumerate(ranks)
        ]
        labels = tuple(f"a{k}" for k in range(len(ranks)))
        layers.append(sm.Layer(name, tuple(updates), adapters=labels, weights=tuple(weights)))
    return layers


class Anchored(list[sm.Layer]):
    """A list of layers that is a stream with anchors."""

    def __init__(self, layers: Iterable[sm.Layer], anchors: Any) -> None:
        super().__init__(layers)
        self.anchors = anchors


def changed(
    layer: sm.Layer,
    updates: Sequence[sm.Update] | None = None,
    adapters: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    digests: Sequence[str] | None = None,
    record: Callable[[str, object], None] | None = None,
) -> sm.Layer:
    """The layer with something else in it; empty labels,
    weights or digests stand for the defaults.
    """
    return sm.Layer(
        layer.name,
        layer.updates if updates is None else updates,
        layer.adapters if adapters is None else adapters,
        layer.weights if weights is None else weights,
        layer.digests if digests is None else digests,
        layer.frames,
        layer.record if record is None else record,
    )


class View:
    """A dense gradient G, one sample, seen through the products of `GradientView`."""

    def __init__(self, G: Tensor) -> None:
        self.G = G[None]

    def left(self, B: Tensor) -> Tensor:
        return B.T @ self.G

    def right(self, A: Tensor) -> Tensor:
        return self.G @ A.T

    def diagonal(self, U: Tensor, Vh: Tensor) -> Tensor:
        return ((U.T @ self.G) * Vh).sum(-1)

    def dense(self) -> Tensor:
        return self.G


class LinearLoss:
    """Anchors whose loss is linear in the weights, two of them:
    gradients that are the same wherever they are taken.

    Args:
        layers: whose adapters have `losses`.
    """

    pairs = False

    def __init__(self, layers: Sequence[sm.Layer] = ()) -> None:
        self.layers = layers

    def observe(self, layers: sm.LayerStream, units: sm.Units) -> LinearLoss._Seen:
        return self._Seen(layers, units)

    def in_turn(
        self, layers: sm.LayerStream, units: sm.Units
    ) -> Iterator[tuple[Sequence[int], LinearLoss._Seen]]:
        for k in range(max(len(layer) for layer in layers)):
            yield [k], self.observe(layers, units)

    def losses(self, loss: Callable[..., Tensor] | None = None) -> Sequence[float]:
        count = max(len(layer) for layer in self.layers)
        return [
            self.loss_of({layer.name: layer.updates[k] for layer in self.layers})
            for k in range(count)
        ]

    def loss_of(
        self, updates: Mapping[str, sm.Update], loss: Callable[..., Tensor] | None = None
    ) -> float:
        return sum(
            float((_gradient(name, u.shape, 1) * u.dense().double()).sum())
            for name, u in updates.items()
        )

    def slopes(
        self,
        updates: Mapping[str, sm.Update],
        directions: Mapping[str, Sequence[sm.Update]],
        loss: Callable[..., Tensor] | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        found = {
            name: torch.stack(
                [(_gradient(name, u.shape, 1) * u.dense().double()).sum() for u in along]
            )
            for name, along in directions.items()
        }
        return self.loss_of(updates), found

    def grams(self, layers: sm.LayerStream, fold: Callable[[sm.Layer, int, Tensor], None]) -> None:
        """Of a well-posed problem, and a little different for every adapter;
        a factor of its update is immaterial.
        """
        for layer in layers:
            n = _outer_shape(layer)[1]
            root = low_rank((n, n), n, sum(map(ord, layer.name))).dense()
            for k, update in enumerate(layer):
                D = _outer(layer, update)
                size = float(D.square().sum())
                gram = root.T @ root / n + torch.eye(n).double() + (D.T @ D / size if size else 0.0)
                for frames in layer.frames:
                    gram = (
                        gram if frames.V is None else frames.V.double().T @ gram @ frames.V.double()
                    )
                fold(layer, k, gram)

    def scaled(self, factors: Mapping[str, Sequence[float]]) -> LinearLoss:
        return LinearLoss([scaled(layer, factors.get(layer.name)) for layer in self.layers])

    def halves(self) -> tuple[LinearLoss, LinearLoss]:
        return self, self

    class _Seen:
        def __init__(self, layers: sm.LayerStream, units: sm.Units) -> None:
            self.layers, self.units = layers, units

        def moment(
            self, layer: str, adapter: int, part: str, statistic: str, at: str
        ) -> tuple[Tensor, Tensor]:
            found = next(x for x in self.layers if x.name == layer)
            update = found.updates[adapter]
            function = {"mean": lambda g: g, "absolute": torch.abs}.get(statistic, torch.square)
            both = []
            for half in (1, 2):
                G = _gradient(layer, _outer_shape(found), half).to(update.dtype)
                for frames in found.frames:
                    left = (
                        frames.U
                        if frames.scale is None or frames.U is None
                        else frames.U * frames.scale
                    )
                    G = G if left is None else left.T @ G
                    G = G if frames.V is None else G @ frames.V
                both.append(function(self.units(update).pull(View(G))[part][0]))
                size = update.norm()
                if isinstance(self.units, sm.Entries) and statistic.endswith("square") and size:
                    # no two adapters have the same
                    both[-1] = both[-1] + (update.dense() / size).square()
            return both[0], both[1]

        def activations(self, layer: str, adapter: int, part: str) -> tuple[Tensor, Tensor]:
            """E|x_j|^2 for inputs x of E[x x^T] = diag(1, 2, ...), on Entries."""
            found = next(x for x in self.layers if x.name == layer)
            sizes = torch.arange(1, found.shape[1] + 1).to(found.updates[adapter].dtype)
            return sizes, sizes


def _gradient(layer: str, shape: tuple[int, int], half: int) -> Tensor:
    return low_rank(shape, min(shape), sum(map(ord, layer)) + half).dense()


def _outer(layer: sm.Layer, update: sm.Update) -> Tensor:
    """The update of the weight itself, in float64."""
    for frames in reversed(layer.frames):
        update = frames.outside(update)
    return update.dense().double()


class QuadraticLoss(LinearLoss):
    """Anchors whose loss is the sum of |update - target|^2 / 2 over the layers."""

    def __init__(self, layers: Sequence[sm.Layer], targets: Mapping[str, Tensor]) -> None:
        super().__init__(layers)
        self.targets = targets

    def loss_of(
        self, updates: Mapping[str, sm.Update], loss: Callable[..., Tensor] | None = None
    ) -> float:
        gaps = [u.dense().double() - self.targets[name] for name, u in sorted(updates.items())]
        return sum(float(gap.square().sum()) / 2 for gap in gaps)

    def slopes(
        self,
        updates: Mapping[str, sm.Update],
        directions: Mapping[str, Sequence[sm.Update]],
        loss: Callable[..., Tensor] | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        found = {
            name: torch.stack(
                [
                    ((updates[name].dense() - self.targets[name]) * u.dense()).sum().double()
                    for u in along
                ]
            )
            for name, along in directions.items()
        }
        return self.loss_of(updates), found


def _outer_shape(layer: sm.Layer) -> tuple[int, int]:
    """The shape of the weight matrix itself, from the outermost frames that are there."""
    m = next((f.U.shape[0] for f in layer.frames if f.U is not None), layer.shape[0])
    n = next((f.V.shape[0] for f in layer.frames if f.V is not None), layer.shape[1])
    return m, n


def run(method: sm.Method, layers: Sequence[sm.Layer]) -> dict[str, sm.Update]:
    """Prepare a method on the layers, then run it on each: what `merge` does, without any file.

    Anchors are there for the methods that read gradients; the others must not look at them.
    """
    prepared = sm.prepare(method, Anchored(layers, LinearLoss(layers)))
    return {layer.name: prepared(layer) for layer in layers}


def dense(merged: dict[str, sm.Update]) -> dict[str, Tensor]:
    return {name: update.dense() for name, update in merged.items()}


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error in float64; absolute where the wanted matrix is zero."""
    size = float(torch.linalg.vector_norm(wanted.double()))
    return float(torch.linalg.vector_norm(got.double() - wanted.double())) / (size or 1.0)


CASE: list[pytest.Item] = []
"""The case that runs, for `hold` of the laws, which other tests call too."""


@pytest.fixture(autouse=True)
def _case(request: pytest.FixtureRequest) -> None:
    CASE[:] = [request.node]
