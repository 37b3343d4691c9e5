"""AdaMerging and TARA: coefficients per adapter, layer or direction, learnt on the anchors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from sapmerge.core.layer import Layer, outermost
from sapmerge.core.linalg import numerical_rank
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.part import part, prepare, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.stream import anchors_of
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.linear import Sum
from sapmerge.parts.wrappers import Chain

__all__ = ["FitCoefficients", "adamerging", "tara"]


@part
class FitCoefficients:
    """D_k -> c_k D_k in every layer, c by steps of Adam on the anchor loss at base +
    sum_k c_k w_k D_k.

    The derivative of the loss in c_k is w_k <G, D_k>: one forward and one backward pass per step,
    over all anchors. With a coefficient per direction D_k = sum_i s_i u_i v_i^T becomes
    sum_i c_ki s_i u_i v_i^T, and the derivative is w_k s_i u_i^T G v_i. After every step c is
    clamped to [0, 1]. Float64, no randomness. Follow it with `Sum()`, which is what is learnt for.
    The report has "coefficients" per layer and adapter ("direction_coefficients", of each), and
    "fit_loss", the loss before every step.

    Args:
        scope: "layer", a coefficient for every layer and adapter; "adapter", one for every adapter;
            "direction", one for every singular direction of every update.
        loss: (model, batch) -> scalar, e.g. `entropy`; None: the anchors' own.
        init: where all coefficients start, in [0, 1].
        lr: the length of a step.
        steps: how many.

    Raises:
        MethodError: there are no anchors.
    """

    scope: Literal["layer", "adapter", "direction"] = "layer"
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
        loss_given = prepare(self.loss, layers)
        weights = {layer.name: self._terms(layer).weights for layer in layers}
        names = sorted(weights)
        if not names:
            return self
        sizes = [len(weights[name]) for name in names]
        factors = torch.tensor([w for name in names for w in weights[name]], dtype=torch.float64)
        state, losses = _Adam(torch.full_like(factors, float(self.init)), self.lr), list[float]()
        for _ in range(self.steps):
            given = dict(zip(names, state.parts(sizes), strict=True))
            updates, directions = dict[str, Update](), dict[str, list[Update]]()
            for layer in layers:
                x = self._terms(layer)
                merged = weighted_sum(x, _products(x.weights, given[x.name]))
                updates[x.name] = outermost(x, merged)
                directions[x.name] = [outermost(x, update) for update in x]
            loss, slopes = anchors.slopes(updates, directions, loss_given)
            losses.append(loss)
            gradient = torch.cat([slopes[name] for name in names]) * factors
            if self.scope == "adapter":
                gradient = gradient.view(len(names), -1).sum(0).repeat(len(names))
            state = state.step(gradient)
        return replace(
            self,
            coefficients=dict(zip(names, state.parts(sizes), strict=True)),
            losses=tuple(losses),
        )

    def __call__(self, layer: Layer) -> Layer:
        if self.coefficients is None:
            raise unprepared(self)
        left = iter(self.coefficients[layer.name])
        groups = [self._split(update) for update in layer]
        given = [tuple(next(left) for _ in group) for group in groups]
        if self.scope == "direction":
            said = dict(zip(layer.adapters, given, strict=True))
            layer.record("direction_coefficients", said)
        else:
            layer.record(
                "coefficients", dict(zip(layer.adapters, (c for (c,) in given), strict=True))
            )
        layer.record("fit_loss", self.losses)
        return layer.with_updates([_joined(*pair) for pair in zip(groups, given, strict=True)])

    def _split(self, update: Update) -> list[Update]:
        """The terms of an update that have coefficients of their own; at least one."""
        return _directions(update) if self.scope == "direction" else [update]

    def _terms(self, layer: Layer) -> Layer:
        """The layer with these terms as its members."""
        return layer.with_members(
            replace(member, update=term)
            for member in layer.members
            for term in self._split(member.update)
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


def tara(
    loss: Callable[..., Tensor] | None = None,
    init: float = 0.3,
    lr: float = 0.02,
    steps: int = 20,
) -> Method:
    """TARA: sum_k w_k sum_i c_ki s_i u_i v_i^T, a coefficient for every direction of every adapter
    and layer, learnt on the anchors.

    Args:
        loss: what is lowered: the anchors' loss, or any (model, batch) -> scalar.
        init: of all coefficients.
        lr: of Adam.
        steps: of Adam, each with all anchors.

    sum r coefficients per layer are many for a few anchors: `adamerging` has one per adapter. One
    adapter does not come back whole: its directions get coefficients, too.

    Example:
        >>> import sapmerge as sm
        >>> method = sm.tara(steps=5)
        >>> merged = sm.merge(["art", "sketch", "cartoon"], loader, model, method=method)

    Source: Jeong et al., "Preference-aligned LoRA merging" (TARA),
    https://arxiv.org/abs/2603.26299. The authors weigh the rank-one terms of LoRA by a
    preference-weighted cross-entropy pseudo-loss over tasks; ours are the singular directions,
    which do not depend on how an update is split into factors, and there is one loss, that of the
    anchors.
    """
    return Chain(FitCoefficients("direction", loss, init, lr, steps), Sum())


@dataclass(frozen=True)
class _Adam:
    """Adam on values in [0, 1]; betas 0.9 and 0.999, eps 1e-8."""

    values: Tensor
    lr: float
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0
    taken: int = 0

    def parts(self, sizes: list[int]) -> list[tuple[float, ...]]:
        """The values of every layer."""
        left = (float(value) for value in self.values.unbind())
        return [tuple(islice(left, size)) for size in sizes]

    def step(self, gradient: Tensor) -> _Adam:
        taken = self.taken + 1
        mean = 0.9 * self.mean + 0.1 * gradient
        square = 0.999 * self.square + 0.001 * gradient.square()
        size = (square / (1 - 0.999**taken)).sqrt() + 1e-8
        values = (self.values - self.lr * (mean / (1 - 0.9**taken)) / size).clamp(0.0, 1.0)
        return _Adam(values, self.lr, mean, square, taken)


def _products(weights: tuple[float, ...], coefficients: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(weight * c for weight, c in zip(weights, coefficients, strict=True))


def _directions(update: Update) -> list[Update]:
    """s_i u_i v_i^T for each singular value; an update of zero is one term."""
    U, sigma, Vh = update.svd()
    keep = numerical_rank(sigma)
    left, right = (U[:, :keep] * sigma[:keep]).to(update.dtype), Vh[:keep].to(update.dtype)
    return [LowRank(left[:, i : i + 1], right[i : i + 1]) for i in range(keep)] or [update]


def _joined(terms: list[Update], coefficients: tuple[float, ...]) -> Update:
    """sum c_i D_i of the terms of one update."""
    if len(terms) == 1:
        return terms[0].scaled(coefficients[0])
    low = [term.scaled(c) for term, c in zip(terms, coefficients, strict=True)]
    factors = [term for term in low if isinstance(term, LowRank)]
    return LowRank(torch.cat([u.B for u in factors], 1), torch.cat([u.A for u in factors]))
