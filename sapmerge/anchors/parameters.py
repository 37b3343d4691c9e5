"""Adapters in weights that no module's output shows:
experts, and the projections of an nn.MultiheadAttention.

There the update cannot be added to an output, so for the length of a pass the weight itself is
another tensor, W + D. The parameter stays where it is: a tensor of the same name in the module's
`__dict__` is found first. Its gradient is the whole dL/dW,
which is handed on as the tokens of an identity: G = sum_t (G e_t) e_t^T.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sapmerge.anchors.gradients import Call
from sapmerge.core.undo import restoring
from sapmerge.core.updates import Update
from sapmerge.errors import NonFiniteError
from sapmerge.models import Site, unwrapped

__all__ = ["Leaf", "substituted"]


@dataclass(frozen=True)
class Leaf:
    """A zero that was added to a whole parameter, to be differentiated by.

    Args:
        zero: of the parameter's shape.
        layers: the watched layers that lie in it.
    """

    zero: Tensor
    layers: Mapping[str, Site]

    def calls(self, gradient: Tensor) -> dict[str, list[Call]]:
        """Layer -> its gradient, as one call whose inputs are an identity."""
        by_name: dict[str, list[Call]] = {}
        for name, site in self.layers.items():
            part = gradient[site.part] if site.part else gradient
            matrix = part.T if site.transposed else part.reshape(part.shape[0], -1)
            identity = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
            by_name[name] = [(identity[None], matrix.T.detach()[None])]
        return by_name


@contextmanager
def substituted(
    sites: Mapping[str, Site], updates: Mapping[str, Update], watched: set[str], who: str
) -> Generator[list[Leaf]]:
    """Put W + D in the place of weights; they are back on the way out.

    Args:
        sites: the layers of that kind.
        updates: layer -> update, for the layers that have one.
        watched: the layers whose gradient is wanted.
        who: what messages call the updates.

    Raises:
        NonFiniteError: a weight plus its update is not finite.
    """
    groups: dict[int, dict[str, Site]] = {}
    for name, site in sites.items():
        if name in updates or name in watched:
            groups.setdefault(id(site.parameter), {})[name] = site
    leaves = list[Leaf]()
    with restoring() as undo:
        for layers in groups.values():
            first = next(iter(layers.values()))
            value = first.parameter.detach().clone()
            for name, site in layers.items():
                if name in updates:
                    (value[site.part] if site.part else value).add_(
                        site.view(updates[name].dense()).to(value)
                    )
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"the weight of {next(iter(layers))!r} plus its update is not finite in {who}"
                )
            wanted = {name: site for name, site in layers.items() if name in watched}
            if wanted:
                leaf = Leaf(torch.zeros_like(value, requires_grad=True), wanted)
                leaves.append(leaf)
                value = value + leaf.zero
            owner, attribute = _holder(first)
            undo.add(partial(owner.__dict__.pop, attribute, None))
            owner.__dict__[attribute] = value
        yield leaves


def _holder(site: Site) -> tuple[nn.Module, str]:
    """The module in which a parameter is looked up, and its name there."""
    *path, attribute = site.name.split(".")
    module = site.module
    for part in path:
        module = unwrapped(module.get_submodule(part))
    return module, attribute
