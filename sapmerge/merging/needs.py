"""What a method would need for so many adapters, held against the machine before any work is done.

Nothing that works is refused: the counts are lower bounds, measured (docs/scale.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import TypeGuard, cast

from sapmerge.core.part import parts
from sapmerge.core.protocols import Method
from sapmerge.errors import LimitExceededError
from sapmerge.io.machine import memory_of
from sapmerge.merging.pieces import in_pieces
from sapmerge.merging.stream import AdapterLayers
from sapmerge.parts.bases import CoreSpace, SharedBasis
from sapmerge.parts.contaminated import FlagContaminated
from sapmerge.parts.mergers.cover_space import InCoverSpace
from sapmerge.parts.mergers.spectral import CART, Decorrelate, IsotropicCommonSpecific
from sapmerge.parts.prune import Prune
from sapmerge.parts.transforms import Consensus, ElectSign, Select
from sapmerge.parts.units import Entries
from sapmerge.parts.wrappers import ByModule, Chain, In

__all__ = ["HELD", "check_needs", "matrices_held"]

HELD: Mapping[type, int] = MappingProxyType(
    {
        Prune: 1,
        ElectSign: 1,
        Consensus: 2,
        Select: 5,
        SharedBasis: 10,
        CART: 6,
        Decorrelate: 5,
        InCoverSpace: 3,
        IsotropicCommonSpecific: 7,
    }
)
"""Part -> how many float32 matrices of a layer it holds of every adapter at the same time; `Prune`
by entries."""
ALWAYS = 1 << 28
"""Bytes that every machine has: it is not looked at for less."""
_CORE = (CART, CoreSpace, Decorrelate, InCoverSpace, IsotropicCommonSpecific)


def matrices_held(method: object) -> int:
    """How many matrices of a layer a method holds of every adapter, at least."""
    if isinstance(method, Mapping):  # of several methods one at a time
        return max(map(matrices_held, cast("Mapping[object, object]", method).values()), default=0)
    if isinstance(method, tuple):
        return sum(map(matrices_held, cast("tuple[object, ...]", method)))
    if isinstance(method, ByModule):
        return max(matrices_held(method.methods), matrices_held(method.default))
    if isinstance(method, Chain) and method.in_turn:
        return 0
    if isinstance(method, In) and not isinstance(method.basis, (SharedBasis, CoreSpace)):
        return 0  # the size of its coordinates is not known
    if isinstance(method, Prune):
        return HELD[Prune] if isinstance(method.units, Entries) else 0
    held = HELD.get(type(method), 0)
    if is_dataclass(method) and not isinstance(method, type):
        held += sum(matrices_held(getattr(method, f.name)) for f in fields(method) if f.repr)
    return held


def check_needs(method: Method, stream: AdapterLayers) -> None:
    """Whether a method can work for so many adapters.

    Raises:
        LimitExceededError: it would hold more than the machine has, or wants more directions than a
            layer has; the message says how many adapters it can take, and what takes all.
    """
    held, found = matrices_held(method), list(parts(method))
    memory = functools.cache(memory_of)  # asked at most once, and only if a layer is large
    inside = any(isinstance(one, In) for one in found)
    apart = [one for one in found if isinstance(one, Decorrelate) and not inside]
    core = any(isinstance(one, _CORE) for one in found)  # its sides are at most the sum of ranks
    sides = {0 if one.side == "left" else 1 for one in found if _shares(one)}
    blocks = sum(  # of all layers at the same time
        8 * module.shape[side] * module.rank
        for side in sides
        for adapter in stream.adapters
        for module in adapter.modules.values()
    )
    for name, module in stream.modules.items():
        ranks = [a.modules[name].rank for a in stream.adapters if name in a.modules]
        for one in apart:
            one.check_count(name, module.shape, len(ranks))
        m, n = module.shape
        total = sum(ranks)
        matrix = 4 * (min(m, total) * min(n, total) if core else m * n)
        factors = 0 if in_pieces(stream, method, name) else 4 * (m + n) * total
        need = factors + held * matrix * len(ranks) + blocks
        if need <= ALWAYS:
            continue
        room = memory(stream.device)
        if room is not None and need > room:
            each = math.ceil(need / len(ranks))
            what = f"{held} matrices" if held else "the factors"
            what += ", and one factor of all layers," if blocks else ""
            raise LimitExceededError(
                f"{_name(method)} would need {_size(need)} for {len(ranks)} adapters, and "
                f"{_size(room)} are there: of layer {name!r} {module.shape} it holds {what} of "
                f"every adapter at the same time. Merge groups of at most {max(1, room // each)} "
                "and then their results, or use what takes a few adapters or rows at a time: "
                "mean() with rank=..., coordinate_median(), trimmed_mean()"
            )


def _shares(one: object) -> TypeGuard[FlagContaminated]:
    return isinstance(one, FlagContaminated) and "shared" in one.tests


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _name(method: Method) -> str:
    text = repr(method)
    return text if len(text) <= 80 else f"{text[:77]}..."
