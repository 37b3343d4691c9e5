"""Adapters side by side in a live model: forward hooks add what the router makes of them to the
outputs of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sapmerge.anchors.hooks import looked_at
from sapmerge.core.layer import Layer
from sapmerge.core.undo import Undo, without_interrupts
from sapmerge.core.updates import Dense
from sapmerge.errors import MethodError, ModelMismatchError
from sapmerge.io.modules import Module
from sapmerge.models import Site, find_sites

__all__ = ["Attached", "Stack", "Weigh", "hooked", "sites_of"]

Weigh: TypeAlias = Callable[[str, Tensor], Tensor]
"""(layer, inputs (tokens, n) in float32 or wider) -> weights (tokens, K)."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The updates of all adapters of one layer, their factors stacked.

    Args:
        A: (R, n), R the sum of the ranks.
        B: (m, R).
        ranks: of the adapters; 0 where one lacks the layer.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]

    @staticmethod
    def of(layer: Layer) -> Stack:
        """The stack of a layer.

        Raises:
            MethodError: an update is dense.
        """
        A, B = list[Tensor](), list[Tensor]()
        for member in layer.members:
            if isinstance(member.update, Dense):
                raise MethodError(
                    f"adapter {member.label!r} has a dense update (DoRA, say) of layer "
                    f"{layer.name!r}, and a router mixes low-rank ones; merge it instead"
                )
            A.append(member.update.A)
            B.append(member.update.B)
        return Stack(torch.cat(A), torch.cat(B, 1), tuple(u.rank for u in layer))

    def to(self, device: torch.device) -> Stack:
        """The same on a device."""
        return Stack(self.A.to(device), self.B.to(device), self.ranks)

    def __call__(self, x: Tensor, weights: Tensor) -> Tensor:
        """sum_k weights_tk D_k x_t for tokens x (tokens, n) and weights (tokens, K): (tokens,
        m).
        """
        counts = torch.tensor(self.ranks, device=x.device)
        per_row = weights.to(x.dtype).repeat_interleave(counts, -1)
        return (x @ self.A.T.to(x.dtype) * per_row) @ self.B.T.to(x.dtype)


class Attached:
    """Adapters that are in a model until `remove`, or until the end of a `with` block. No weight is
    changed.
    """

    def __init__(self, undo: Undo) -> None:
        self._undo = undo

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the adapters out; once more does nothing."""
        self._undo.run()


def check_modules(modules: Mapping[str, Module]) -> None:
    """Refuse modules whose input is not a sequence of tokens.

    Raises:
        MethodError: an embedding, a convolution, an expert or a part of nn.MultiheadAttention.
    """
    for name, module in modules.items():
        if module.kind != "linear" or module.parameter != "weight":
            raise MethodError(
                f"a router sees what goes into a linear layer, and {name!r} is a weight of another "
                "kind "
                f"({module.kind}); merge these adapters, or leave that module out of them"
            )


def sites_of(model: Any, modules: Mapping[str, Module]) -> dict[str, Site]:
    """Where the layers are in a model.

    Raises:
        ModelMismatchError: the model lacks one, or uses its weight inside of another module's
            forward pass.
    """
    sites = find_sites(model, modules)
    for name, site in sites.items():
        if not site.hooked:
            raise ModelMismatchError(
                f"{type(site.module).__name__} uses the weight of {name!r} inside of its own "
                "forward pass, so nothing can be added to its output; merge the adapters instead"
            )
    return sites


def hooked(sites: Mapping[str, Site], stacks: Mapping[str, Stack], weigh: Weigh) -> Attached:
    """Add the weighed updates to the outputs of layers."""

    def hook(name: str, stack: Stack, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        x, output = looked_at(name, module, inputs, output)
        tokens = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
        added = stack(tokens, weigh(name, tokens)).reshape(output.shape)
        return (output + added).to(output.dtype)

    undo = Undo()
    try:
        with without_interrupts():
            for name, site in sites.items():
                stack = stacks[name].to(site.weight.device)
                handle = site.module.register_forward_hook(partial(hook, name, stack))
                undo.add(handle.remove)
    except BaseException:
        undo.run()
        raise
    return Attached(undo)
