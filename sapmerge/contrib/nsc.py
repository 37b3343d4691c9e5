"""NSC: coefficients by how much of the layers' inputs the adapters read at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from sapmerge.contrib.adamerging import FitCoefficients
from sapmerge.core.layer import outermost
from sapmerge.core.linalg import numerical_rank, wide
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.errors import AnchorError
from sapmerge.losses import WEIGHT, embeddings
from sapmerge.parts.mergers.linear import Sum
from sapmerge.parts.wrappers import Chain

__all__ = ["NullSpaceRatio", "nsc"]

_NOT_ROWS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@part
class NullSpaceRatio:
    """A loss without texts and labels: mean sqrt(1 - |V^T x|^2 / |x|^2), the share of each layer's
    inputs x that each adapter does not read.

    V is an orthonormal basis of the row space of the adapter's update: that of its factor A if B
    has full rank. The mean is over samples, tokens, and all pairs of layers and adapters. It
    has to know the adapters, so only `FitCoefficients` and `SearchCoefficients` can use it.

    Raises:
        AnchorError: the model has no module of an adapted layer's name, or none that is linear ran.
    """

    bases: Mapping[str, Sequence[Tensor]] | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> NullSpaceRatio:
        bases: dict[str, list[Tensor]] = {}
        for layer in layers:
            for member in layer.members:
                if member.counts:
                    _, sigma, Vh = outermost(layer, member.update).svd()
                    if keep := numerical_rank(sigma):
                        bases.setdefault(layer.name, []).append(Vh[:keep].T)
        return replace(self, bases=bases)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if self.bases is None:
            raise unprepared(self)
        weights, ratios = batch.get(WEIGHT), list[Tensor]()

        def hook(bases: Sequence[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                x = wide(inputs[0])
                ratios.extend(_unread(x, V.to(x), weights) for V in bases)

            return look

        modules: dict[str, nn.Module] = dict(cast("Any", model.named_modules()))
        handles = list[Any]()
        try:
            for name, bases in self.bases.items():
                if name not in modules:
                    raise AnchorError(
                        f"the model has no module {name!r}, whose inputs are asked for"
                    )
                if not isinstance(modules[name], _NOT_ROWS):
                    handles.append(modules[name].register_forward_pre_hook(hook(bases)))
            _run(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not ratios:
            raise AnchorError("no adapted linear layer ran, so there is no input to look at")
        return torch.stack(ratios).mean()


def _run(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """A forward pass; of both towers, where embeddings may stand in for the inputs of one."""
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        embeddings(model, batch)
    else:
        model(**{key: value for key, value in batch.items() if key != WEIGHT})


def _unread(x: Tensor, V: Tensor, weights: Tensor | None) -> Tensor:
    """The mean share of the rows of x outside of the span of V; x (samples, ..., n), V (n, r)."""
    size = x.square().sum(-1).clamp_min(1e-30)
    share = (1 - (x @ V).square().sum(-1) / size).clamp_min(1e-12).sqrt()
    if weights is not None and len(weights) == len(share):
        share = share * weights.to(share).reshape(-1, *[1] * (share.ndim - 1))
    return share.mean()


def nsc(
    scope: Literal["layer", "adapter", "direction"] = "layer",
    init: float = 0.3,
    lr: float = 0.02,
    steps: int = 20,
) -> Method:
    """NSC: sum_k c_k w_k D_k with coefficients by which the merged model's activations fall into
    what the adapters read.

        loss = mean sqrt(1 - |proj_row(A) x|^2 / |x|^2)   over layers, adapters and tokens

    Args:
        scope: a coefficient per "layer" and adapter, per "adapter", or per "direction".
        init: of all coefficients.
        lr: of Adam.
        steps: of Adam, each with all anchors.

    Needs neither captions nor labels that mean anything, but batches that the model runs on:
    `model(**batch)`, or both towers. What the last layers do is not seen, as nothing adapted reads
    their outputs: their coefficients stay at `init`.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch"], loader, model, method=sm.nsc(steps=3))

    Source: Lee et al., "Label-free cross-task LoRA merging with null-space compression",
    https://arxiv.org/abs/2603.26317. The authors' optimiser and its steps are not ours.
    """
    return Chain(FitCoefficients(scope, NullSpaceRatio(), init, lr, steps), Sum())
