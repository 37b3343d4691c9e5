"""Routers: how much of every adapter a token gets, from what goes into the layer.

A router is settings. What it knows of a layer is one tensor, its state, which a checkpoint holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import size_of
from sapmerge.errors import MethodError

__all__ = ["ArrowRouter", "FixedRouter", "LearnedRouter", "Router", "RouterLike", "router_from"]


class Router(Protocol):
    """Maps the input of a layer to one weight per adapter and token."""

    def state(self, layer: Layer) -> Tensor:
        """What the router knows of a layer, float32: (K,) or (K, n)."""
        ...

    def weigh(self, state: Tensor, x: Tensor) -> Tensor:
        """The weights (tokens, K) of the adapters, from inputs x (tokens, n)."""
        ...


@dataclass(frozen=True)
class FixedRouter:
    """The same weights for all tokens; by default 1 / K for each of K adapters: the mean.

    Args:
        weights: label -> weight, any finite numbers; those that are not named get 0. {"medical": 1}
            is that adapter.

    Raises:
        MethodError: no numbers, or (when it meets the adapters) an unknown label.

    Example:
        >>> import sapmerge as sm
        >>> router = sm.FixedRouter({"a": 0.7, "b": 0.3})
        >>> sm.routed(["a", "b"], router=router)  # doctest: +SKIP
    """

    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for label, weight in (self.weights or {}).items():
            if isinstance(weight, bool) or not math.isfinite(weight):
                raise MethodError(f"the weight of {label!r} is a finite number; got {weight!r}")

    def state(self, layer: Layer) -> Tensor:
        """The weights, in the order of the adapters: (K,)."""
        if self.weights is None:
            return torch.full((len(layer),), 1 / len(layer))
        unknown = sorted(set(self.weights) - set(layer.adapters))
        if unknown:
            raise MethodError(
                f"the router names {unknown}, the adapters are {sorted(layer.adapters)}"
            )
        return torch.tensor([float(self.weights.get(label, 0.0)) for label in layer.adapters])

    def weigh(self, state: Tensor, x: Tensor) -> Tensor:
        """The same for every token: (tokens, K)."""
        return state.expand(len(x), -1)


@dataclass(frozen=True)
class ArrowRouter:
    """Arrow: a token goes to the adapters whose update it would excite most; needs no data.

        s_k = |x . v_k|,   weights = softmax(s / temperature) over the `top_k` largest s_k

    with v_k the first right singular vector of adapter k's update of the layer. An adapter that
    lacks the layer, or does nothing there, gets no token.

    Args:
        top_k: adapters per token; all of them if there are fewer.
        temperature: above 0; s grows with the norm of x, and so does the contrast.

    Raises:
        MethodError: an argument out of range.

    PEFT's (`create_arrow_model`) finds v_k by 15 power iterations from a random start, which
    differs where the first two singular values are close; ours is exact, and ranks and target
    modules may differ.

    Source: Ostapenko et al., "Towards modular LLMs by building and reusing a library of LoRAs"
    (ICML 2024), https://arxiv.org/abs/2405.11157

    Example:
        >>> import sapmerge as sm
        >>> sm.ArrowRouter(top_k=2)
        ArrowRouter(top_k=2, temperature=1.0)
    """

    top_k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_top_k(self.top_k)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise MethodError(f"the temperature of a router is above 0; got {self.temperature!r}")

    def state(self, layer: Layer) -> Tensor:
        """The prototypes v_k, 0 for an adapter that does nothing: (K, n)."""
        first = [
            u.svd(1)[2][0].float() if size_of(u) else torch.zeros(layer.shape[1]) for u in layer
        ]
        return torch.stack([v.cpu() for v in first])

    def weigh(self, state: Tensor, x: Tensor) -> Tensor:
        """softmax over the largest |x . v_k|: (tokens, K)."""
        known = state.square().sum(-1) > 0
        scores = (x @ state.T).abs().masked_fill(~known, -math.inf)
        # Where no adapter does anything there is nothing to weigh.
        return torch.nan_to_num(torch.softmax(_largest(scores, self.top_k) / self.temperature, -1))


@dataclass(frozen=True)
class LearnedRouter:
    """A linear router per layer, softmax(W x), trained on the anchors; it begins as the mean, W =
    0.

    Minimised is the anchors' loss of the model with all adapters in it, plus `balance` times the
    load-balancing loss and `z` times the z-loss, both averaged over the layers. The model and the
    adapters stay as they are.

    Args:
        steps: passes over the anchors, of Adam.
        lr: the learning rate.
        balance: of `balance_loss` (1 for an even router, K for one that uses a single adapter).
        z: of `z_loss`, the mean squared logsumexp of the logits.
        top_k: adapters per token once it is trained, their weights made to sum to 1; None: all.

    Raises:
        MethodError: an argument out of range.

    Padding tokens count as tokens. A handful of anchors trains K n numbers per layer: hold some
    back and look at the loss there before you believe it.

    Source: the shape of the CT-MoA of Xiong et al., "Pilot" (AAAI 2025),
    https://arxiv.org/abs/2501.13985; learned mixtures of fixed adapters: Prabhakar et al., "LoRA
    soups" (2024), https://arxiv.org/abs/2410.13025

    Example:
        >>> import sapmerge as sm
        >>> sm.LearnedRouter(steps=50).lr
        0.01
    """

    steps: int = 100
    lr: float = 0.01
    balance: float = 0.01
    z: float = 0.001
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None:
            _check_top_k(self.top_k)
        if isinstance(self.steps, bool) or self.steps < 0 or self.steps != int(self.steps):
            raise MethodError(f"steps is a whole number, 0 or more; got {self.steps!r}")
        for name in ("lr", "balance", "z"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise MethodError(f"{name} is a number, 0 or more; got {value!r}")

    def state(self, layer: Layer) -> Tensor:
        """Where training begins: 0, (K, n)."""
        return torch.zeros(len(layer), layer.shape[1])

    def weigh(self, state: Tensor, x: Tensor) -> Tensor:
        """softmax(W x): (tokens, K)."""
        return torch.softmax(_largest(x @ state.T, self.top_k), -1)


RouterLike: TypeAlias = "Router | str"
"""A router, or "uniform" or "arrow" for those with their defaults."""


def router_from(router: RouterLike) -> Router:
    """The router that was asked for.

    Raises:
        MethodError: it is none.
    """
    if router == "uniform":
        return FixedRouter()
    if router == "arrow":
        return ArrowRouter()
    if not isinstance(router, str) and hasattr(router, "weigh") and hasattr(router, "state"):
        return router
    raise MethodError(
        "router is 'uniform', 'arrow', FixedRouter(...), ArrowRouter(...) or LearnedRouter(...); "
        f"got {router!r}"
    )


def _largest(scores: Tensor, count: int | None) -> Tensor:
    """The scores, -inf but for the `count` largest of each row."""
    if count is None or count >= scores.shape[-1]:
        return scores
    values, index = scores.topk(count, -1)
    return torch.full_like(scores, -math.inf).scatter(-1, index, values)


def _check_top_k(top_k: int) -> None:
    if isinstance(top_k, bool) or top_k < 1 or top_k != int(top_k):
        raise MethodError(f"top_k is a number of adapters, from 1 on; got {top_k!r}")
