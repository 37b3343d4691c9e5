"""Units: in which pieces an update is pruned.

An update is written in coordinates v_i on atoms E_i. With G = dL/dD the gradient in a coordinate is
g_i = <G, E_i>, so v_i g_i is the first-order effect of dropping it.
A unit maps an update to its `Coordinates`.

    Entries      the entries of the update: v = D_ij.             Makes the update dense.
    Factors      the entries of A and of B, in balanced form.     Stays low-rank.
    Directions   the singular values: D = sum v_i u_i w_i^T.      Stays low-rank.
    Layers       the whole matrix: v = ||D||.                     Stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sapmerge.core.linalg import numerical_rank
from sapmerge.core.part import part
from sapmerge.core.protocols import Coordinates, GradientView
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import MethodError

__all__ = ["Directions", "Entries", "Factors", "Layers"]


@part
class Entries:
    """The entries D_ij of the update; their gradient is G itself."""

    def __call__(self, update: Update) -> Coordinates:
        return Coordinates(
            values={"entries": update.dense()},
            join=lambda parts: Dense(parts["entries"]),
            pull=lambda gradient: {"entries": gradient.dense()},
        )


@part
class Factors:
    """The entries of the LoRA parameters A and B, put in balanced form first (A = sqrt(S) V^T,
    B = U sqrt(S)).

    The one unit that is not linear in the update: without the balanced form its scores would depend
    on how the product is split into factors ((A c, B / c) is the same adapter).
    Refused for a dense update, which has no factors.
    """

    def __call__(self, update: Update) -> Coordinates:
        if isinstance(update, Dense):
            raise MethodError(
                "units=Factors() prunes LoRA factors, but this update is dense already; prune "
                "factors first, or use units=Entries()"
            )
        even = update.balanced
        return Coordinates(
            values={"A": even.A, "B": even.B},
            join=lambda parts: LowRank(parts["B"], parts["A"]),
            pull=lambda gradient: {"A": gradient.left(even.B), "B": gradient.right(even.A)},
        )


@part
class Directions:
    """The singular directions: v_i = sigma_i on u_i w_i^T, with gradient u_i^T G w_i.
    Independent of the factors.
    """

    def __call__(self, update: Update) -> Coordinates:
        U, sigma, Vh = update.svd()
        keep = numerical_rank(sigma)
        left, right = U[:, :keep].to(update.dtype), Vh[:keep].to(update.dtype)
        return Coordinates(
            values={"directions": sigma[:keep].to(update.dtype)},
            join=lambda parts: LowRank(left * parts["directions"], right),
            pull=lambda gradient: {"directions": gradient.diagonal(left, right)},
        )


@part
class Layers:
    """The whole matrix as one coordinate v = ||D||, with gradient <D, G> / ||D||.

    Only TopFraction(scope="adapter") or a threshold makes sense here: a layer holds one unit.
    """

    def __call__(self, update: Update) -> Coordinates:
        norm = update.norm()
        unit = update.scaled(1.0 / norm) if norm > 0 else update

        def pull(gradient: GradientView) -> Mapping[str, Tensor]:
            if isinstance(unit, LowRank):
                return {"layer": gradient.diagonal(unit.B, unit.A).sum(-1, keepdim=True)}
            return {"layer": (gradient.dense() * unit.dense()).sum((1, 2))[:, None]}

        return Coordinates(
            values={"layer": torch.tensor([norm], dtype=update.dtype, device=update.device)},
            join=lambda parts: unit.scaled(float(parts["layer"])),
            pull=pull,
        )
