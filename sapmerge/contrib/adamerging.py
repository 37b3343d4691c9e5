"""AdaMerging: coefficients per layer and adapter, learnt on the anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.layer import Layer, outermost
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import anchors_of
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.linear import Sum
from sapmerge.parts.wrappers import Chain

__all__ = ["FitCoefficients", "adamerging"]


@part
class FitCoefficients:
    """D_k -> c_k D_k in every layer, c by steps of Adam on the anchor loss at base +
    sum_k c_k w_k D_k.

    The derivative of the loss in c_k is w_k <G, D_k>: one forward and one backward pass per step,
    over all anchors. After every step c is clamped to [0, 1]. Float64, no randomness. Follow it
    with `Sum()`, which is what is learnt for. The report has "coefficients" per layer and adapter,
    and "fit_loss", the loss before every step.

    Args:
        scope: "layer", a coefficient for every layer and adapter; "adapter", one for every adapter.
        loss: (model, batch) -> scalar, e.g. `entropy`; None: the anchors' own.
        init: where all coefficients start, in [0, 1].
        lr: the length of a step.
        steps: how many.

    Raises:
        MethodError: there are no anchors.
    """

    scope: Literal["layer", "adapter"] = "layer"
    loss: Callable[..., Tensor] | None = None
    init: float = 0.3
    lr: float = 0.02
    steps: int = 20
    coefficients: Mapping[str, tuple[float, ...]] | None = field(default=None, repr=False)
    losses: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.init <= 1 or not self.lr > 0 or self.steps < 0:
            raise MethodError(
                "FitCoefficients takes init in [0, 1], lr > 0 and steps >= 0; got "
                f"init={self.init!r}, lr={self.lr!r}, steps={self.steps!r}"
            )

    def prepare(self, layers: LayerStream) -> FitCoefficients:
        anchors = anchors_of(layers, "FitCoefficients")
        given_weights = {layer.name: layer.weights for layer in layers}
        names = sorted(given_weights)
        if not names:
            return self
        weights = torch.tensor(given_weights[names[0]], dtype=torch.float64)
        start = torch.full((len(names), len(weights)), float(self.init), dtype=torch.float64)
        state, losses = _Adam(start, self.lr), list[float]()
        for _ in range(self.steps):
            given = dict(zip(names, state.rows(), strict=True))
            updates = {
                x.name: outermost(x, weighted_sum(x, _products(x.weights, given[x.name])))
                for x in layers
            }
            directions = {x.name: [outermost(x, update) for update in x] for x in layers}
            loss, slopes = anchors.slopes(updates, directions, self.loss)
            losses.append(loss)
            gradient = torch.stack([slopes[name] * weights for name in names])
            if self.scope == "adapter":
                gradient = gradient.sum(0, keepdim=True).expand_as(gradient)
            state = state.step(gradient)
        return replace(
            self, coefficients=dict(zip(names, state.rows(), strict=True)), losses=tuple(losses)
        )

    def __call__(self, layer: Layer) -> Layer:
        if self.coefficients is None:
            raise unprepared(self)
        coefficients = self.coefficients[layer.name]
        layer.record("coefficients", dict(zip(layer.adapters, coefficients, strict=True)))
        layer.record("fit_loss", self.losses)
        return layer.with_updates(
            [update.scaled(c) for update, c in zip(layer, coefficients, strict=True)]
        )


def adamerging(
    scope: Literal["layer", "adapter"] = "layer",
    loss: Callable[..., Tensor] | None = None,
    init: float = 0.3,
    lr: float = 0.02,
    steps: int = 20,
) -> Method:
    """AdaMerging: sum_k c_k w_k D_k with coefficients per layer and adapter that lower the loss of
    the merged model.

    Args:
        scope: "layer" (layer-wise AdaMerging) or "adapter" (task-wise).
        loss: what is lowered: the anchors' loss, any (model, batch) -> scalar, or `entropy` as in
            the paper.
        init: of all coefficients.
        lr: of Adam.
        steps: of Adam, each with all anchors.

    The authors take 500 steps with lr 1e-3 on unlabelled test batches of every task, the gradient
    of their sum, in [0, 1], from 0.3: adamerging(loss=entropy, lr=1e-3, steps=500). A few longer
    steps go as far on a few anchors. One adapter does not come back whole:
    it is given a coefficient too.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.adamerging()
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: Yang et al., "AdaMerging: adaptive model merging for multi-task learning",
    https://arxiv.org/abs/2310.02575
    """
    return Chain(FitCoefficients(scope, loss, init, lr, steps), Sum())


@dataclass(frozen=True)
class _Adam:
    """Adam on values in [0, 1]; betas 0.9 and 0.999, eps 1e-8."""

    values: Tensor
    lr: float
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0
    taken: int = 0

    def rows(self) -> list[tuple[float, ...]]:
        """The values of every layer."""
        return [tuple(float(value) for value in row) for row in self.values.unbind()]

    def step(self, gradient: Tensor) -> _Adam:
        taken = self.taken + 1
        mean = 0.9 * self.mean + 0.1 * gradient
        square = 0.999 * self.square + 0.001 * gradient.square()
        size = (square / (1 - 0.999**taken)).sqrt() + 1e-8
        values = (self.values - self.lr * (mean / (1 - 0.9**taken)) / size).clamp(0.0, 1.0)
        return _Adam(values, self.lr, mean, square, taken)


def _products(weights: tuple[float, ...], coefficients: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(weight * c for weight, c in zip(weights, coefficients, strict=True))
