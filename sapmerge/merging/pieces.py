"""Sums of so many adapters that no layer of all of them is held: some adapters at a time."""

from __future__ import annotations

import torch

from sapmerge.core.geometry import Crowd
from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import add_by_columns
from sapmerge.core.protocols import Method
from sapmerge.core.updates import Dense, LowRank
from sapmerge.merging.report import PAIRED, LayerReport, energies_of
from sapmerge.merging.stream import AdapterLayers
from sapmerge.parts.mergers.linear import Mean, Sum
from sapmerge.parts.wrappers import Chain

__all__ = ["in_pieces", "summed"]

_AT_ONCE = 64  # adapters whose updates of a layer are held


def in_pieces(stream: AdapterLayers, method: Method, name: str) -> Mean | Sum | None:
    """The merger, where a method is a plain sum, and a layer has so many updates of so high a rank
    that nothing of them is needed but their sum as a matrix.
    """
    merger = method.steps[0] if isinstance(method, Chain) and len(method.steps) == 1 else method
    if len(stream.adapters) <= PAIRED or not isinstance(merger, (Mean, Sum)):
        return None
    there = [adapter.modules[name] for adapter in stream.adapters if name in adapter.modules]
    full = sum(module.rank for module in there) >= min(there[0].shape)
    return merger if full and len(there) > PAIRED else None


def summed(
    stream: AdapterLayers, merger: Mean | Sum, name: str, scale: float
) -> tuple[Dense, LayerReport]:
    """The merged update in float64, and its report; some adapters are held at a time."""
    shape = stream.modules[name].shape
    shares = merger.shares(stream.weights)
    total = torch.zeros(shape, dtype=torch.float64, device=stream.device)
    crowd, energies, labels = Crowd(shape), dict[str, float](), list[str]()
    for start in range(0, len(shares), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        piece = Layer(name, stream.members(name, some))
        energies |= energies_of(piece)
        labels += [member.label for member in piece.members if not member.absent]
        there = [
            (member.update, share * scale)
            for member, share in zip(piece.members, shares[some], strict=True)
            if not member.absent
        ]
        low = [(update, share) for update, share in there if isinstance(update, LowRank)]
        add_by_columns(total, low)
        for update, share in there:
            if isinstance(update, Dense):
                total.add_(update.matrix, alpha=share)
        crowd.add([update for update, _ in there])
    merged = Dense(total)
    row = LayerReport(
        name=name,
        shape=shape,
        adapters=tuple(labels),
        rank=merged.rank,
        energy_kept=1.0,
        norm=merged.norm(),
        cosine=crowd.cosine(),
        sign_conflict=crowd.sign_conflict(),
        energies=energies,
    )
    return merged, row
