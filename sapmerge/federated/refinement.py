"""CLAIR's results for single clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.part import prepare
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import MethodError
from sapmerge.federated.personal import Personal
from sapmerge.merging.heads import HeadPolicy
from sapmerge.merging.inputs import Adapters, load_adapters, resolve_weights
from sapmerge.merging.merge import merge
from sapmerge.merging.stream import AdapterLayers
from sapmerge.methods.averaging import mean
from sapmerge.parts.contaminated import FlagContaminated

__all__ = ["refine"]


def refine(
    adapters: Adapters,
    method: FlagContaminated | None = None,
    samples: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | float | str | None = None,
    modules_to_save: HeadPolicy = None,
) -> Personal:
    """CLAIR's refinement: what a client shares with the others from itself,
    what it does not from their mean.

        D_k' = P D_k + (I - P) mean_benign(D)

    with P the projection on the shared subspace of a layer's outputs (or inputs, from the right).
    The mean over the benign clients stays what it was:
    the refined results are for the clients themselves.

    Args:
        adapters: as for `merge`.
        method: who is contaminated, and the subspaces; `clair()` by default.
        samples: per client.
        rank, modules_to_save: as for `merge`.

    Returns:
        Client -> result, for those who are not contaminated.

    Raises:
        MethodError: the method does not look for a shared subspace.
    """
    opened = load_adapters(adapters)
    asked = FlagContaminated(mean(), ("shared",)) if method is None else method
    if "shared" not in asked.tests:
        raise MethodError(f"refine needs shared subspaces; {asked!r} does not look for any")
    prepared = prepare(
        asked, AdapterLayers.of(opened, resolve_weights(samples, opened), torch.device("cpu"))
    )
    bad = set(prepared.findings["contaminated"])
    good = [adapter for adapter in opened if adapter.label not in bad]
    weights = dict(zip((a.label for a in opened), resolve_weights(samples, opened)))
    shared = Personal.sharing(good)
    return Personal(
        {
            adapter.label: merge(
                shared,
                method=_Refined(adapter.label, prepared.bases, asked.side == "left"),
                weights=[weights[other.label] for other in good],
                rank=rank,
                modules_to_save=modules_to_save,
                progress=False,
            )
            for adapter in good
        }
    )


@dataclass(frozen=True, eq=False, repr=False)
class _Refined:
    """A merger for one client: its own part in the shared subspace, the mean's outside."""

    label: str
    bases: Mapping[str, Tensor]
    left: bool

    def __repr__(self) -> str:
        return f"_Refined({self.label!r})"

    def __call__(self, layer: Layer) -> Update:
        average = mean()(layer)
        basis = self.bases.get(layer.name)
        own = layer.updates[layer.adapters.index(self.label)]
        if basis is None:  # hardly anybody has the layer
            return average
        change = weighted_sum(Layer(layer.name, (own, average)), (1.0, -1.0))
        U = basis.to(change.dtype)
        if isinstance(change, LowRank):
            B, A = change.B, change.A
            inside = LowRank(U, (U.T @ B) @ A) if self.left else LowRank(B @ (A @ U), U.T)
        else:
            matrix = change.dense()
            inside = LowRank(U, U.T @ matrix) if self.left else LowRank(matrix @ U, U.T)
        return weighted_sum(Layer(layer.name, (average, inside)), (1.0, 1.0))
