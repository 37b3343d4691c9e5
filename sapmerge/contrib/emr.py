"""EMR: one unified update for all adapters, with a mask and a scalar that turn it back
into each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

import torch

from sapmerge.core.layer import Layer
from sapmerge.core.part import part
from sapmerge.core.protocols import LayerStream, Method
from sapmerge.core.updates import Dense, Update
from sapmerge.parts.mergers.linear import DisjointMax
from sapmerge.parts.transforms import ElectSign
from sapmerge.parts.wrappers import Chain

__all__ = ["Unify", "emr"]


@part
class Unify:
    """EMR's unified update: in every entry the elected sign times the largest magnitude of the
    adapters that agree.

    The update for one task is `restore(unified, D_k, scalar)` = scalar_k * (D_k * unified >
    0) * unified with

        scalar_k = sum over layers of mean|D_k| / sum over layers of mean|unified * mask_k|.

    The pre-pass finds the scalars. The report has, for every layer, "emr_scalar" and "emr_mask"
    (the share of the entries in the mask) per adapter;
    the masks themselves follow from the adapters by the formula.

    Source: Huang et al., "EMR-Merging", https://arxiv.org/abs/2405.17461. The text divides sums
    over all entries, the code sums of means per tensor, as here.
    An entry whose weighted sum is 0 takes the majority sign (theirs: -).
    """

    scalars: Mapping[str, float] | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> Unify:
        sizes, unified_sizes = dict[str, float](), dict[str, float]()
        for layer in layers:
            unified = _unified(layer)
            for label, update in zip(layer.adapters, layer.updates, strict=True):
                size, kept = (
                    float(x.dense().double().abs().mean())
                    for x in (update, _masked(unified, update))
                )
                sizes[label] = sizes.get(label, 0.0) + size
                unified_sizes[label] = unified_sizes.get(label, 0.0) + kept
        return replace(
            self,
            scalars={k: sizes[k] / unified_sizes[k] if unified_sizes[k] else 1.0 for k in sizes},
        )

    def __call__(self, layer: Layer) -> Update:
        unified = _unified(layer)
        shares = [
            float((_masked(unified, update).dense() != 0).double().mean()) for update in layer
        ]
        layer.record("emr_mask", dict(zip(layer.adapters, shares, strict=True)))
        if self.scalars is not None:
            layer.record(
                "emr_scalar", {adapter: self.scalars[adapter] for adapter in layer.adapters}
            )
        return unified

    @staticmethod
    def restore(unified: Update, update: Update, scalar: float) -> Update:
        """The update for the task of one adapter, from the unified one, its own, and its scalar."""
        return _masked(unified, update).scaled(scalar)


def emr() -> Method:
    """EMR-Merging: elect a sign per entry, and take the largest magnitude that agrees with it.

    unified = sign(sum_k w_k D_k) max{|D_k|: D_k agrees}. The masks and scalars with which it stands
    in for every single adapter: see `Unify`. Weights vote; a magnitude is that of an adapter.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.emr())

    Source: Huang et al., "EMR-Merging: tuning-free high-performance model merging",
    https://arxiv.org/abs/2405.17461
    """
    return Chain(Unify())


def _unified(layer: Layer) -> Update:
    return DisjointMax()(ElectSign()(layer))


def _masked(unified: Update, update: Update) -> Update:
    """The unified update where it has the sign of an adapter's own."""
    matrix = unified.dense()
    return Dense(torch.where(torch.sign(matrix) * torch.sign(update.dense()) > 0, matrix, 0.0))
