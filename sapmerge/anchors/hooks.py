"""Adapters in a model without changing a weight of it: a forward hook adds the update's output to the module's."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sapmerge.errors import AnchorError
from sapmerge.layer import LowRank, Update
from sapmerge.models import base_of, weight_view

__all__ = ["attached", "frozen"]

Sink: TypeAlias = Callable[[str, Tensor, Tensor], None]
"""(layer, input, gradient of the output): called once per call of the module, on the way back."""


@contextmanager
def frozen(model: Any) -> Generator[nn.Module]:
    """The base model in eval mode, with no parameter asking for a gradient; everything is put back on the way out."""
    base = base_of(model)
    training = {module: module.training for module in base.modules()}
    asking = [parameter for parameter in base.parameters() if parameter.requires_grad]
    disabled = model.disable_adapter() if hasattr(model, "peft_config") and base is not model else nullcontext()
    try:
        with disabled:
            base.eval()
            for parameter in asking:
                parameter.requires_grad_(False)
            yield base
    finally:
        for module, was in training.items():
            module.training = was
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def attached(
    modules: Mapping[str, nn.Module], updates: Mapping[str, Update], watched: Mapping[str, Sink] | None = None
) -> Generator[None]:
    """Add updates to the outputs of modules, and watch gradients; the hooks are gone on the way out.

    Args:
        modules: layer -> module.
        updates: layer -> update, for the layers that have one.
        watched: layer -> what to do with its input and the gradient of its output.
    """
    watched = watched or {}
    handles = [
        modules[name].register_forward_hook(_hook(name, updates.get(name), watched.get(name)))
        for name in {**updates, **watched}
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, update: Update | None, sink: Sink | None) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not inputs:
            raise AnchorError(f"layer {name!r} ({type(module).__name__}) gives no tensor; anchors cannot look at it")
        x = cast("Tensor", inputs[0])
        if update is not None:
            output = output + _output_of(module, x, update).to(output.dtype)
        if sink is not None and torch.is_grad_enabled():
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)  # the first adapted layer: nothing below has a gradient
            output.register_hook(partial(sink, name, x.detach()))  # pyright: ignore[reportUnknownMemberType]
        return output

    return hook


def _output_of(module: nn.Module, x: Tensor, update: Update) -> Tensor:
    """What the update alone makes of the module's input, in float32 or wider."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        weight = weight_view(module, update.dense())
        run = cast("Callable[..., Tensor]", module._conv_forward)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
        return run(x.to(weight.dtype), weight, None)
    if isinstance(module, nn.Embedding):
        if isinstance(update, LowRank):
            return functional.embedding(x, update.A.T) @ update.B.T
        return functional.embedding(x, update.dense().T)
    wide = x.to(torch.promote_types(x.dtype, update.dtype))
    if isinstance(update, LowRank):
        return (wide @ update.A.T.to(wide.dtype)) @ update.B.T.to(wide.dtype)
    return wide @ update.dense().T.to(wide.dtype)
