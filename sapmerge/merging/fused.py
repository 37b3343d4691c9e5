"""Projections that one adapter has in one piece and another in parts:
`qkv_proj` beside `q_proj`, `k_proj`, `v_proj`.

The rows of a fused projection are those of its parts below each other, in this order. So cutting
one is exact: the parts share A. Putting parts together is exact too: B is block-diagonal.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from sapmerge.errors import SapmergeWarning
from sapmerge.io.adapter import Adapter
from sapmerge.io.rearranged import Piece
from sapmerge.naming import Names

__all__ = ["as_in_parts", "fitted"]

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def as_in_parts(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Cut every fused projection of which another adapter has parts;
    say where that cannot be done.
    """
    rows = {
        key: (module.shape[0], adapter)
        for adapter in adapters
        for key, module in adapter.modules.items()
    }
    return [_cut(adapter, rows) for adapter in adapters]


def _cut(adapter: Adapter, rows: Mapping[str, tuple[int, Adapter]]) -> Adapter:
    plan: dict[str, list[Piece]] = {}
    said = False
    for key, module in adapter.modules.items():
        parts = _parts(key)
        other = next((rows[part][1] for part in parts if part in rows), None)
        if other is None or any(part in adapter.modules for part in parts):
            continue
        sizes = _sizes([rows[part][0] if part in rows else None for part in parts], module.shape[0])
        both = (
            f"{adapter.label!r} has {module.spelled!r} in one piece, {other.label!r} has parts "
            "of it"
        )
        if sizes is not None and module.kind == "linear" and module.needs_base is None:
            plan |= _pieces(key, parts, sizes)
            if not said:
                _warn(f"{both}: it is cut into them, which is exact")
        elif not said:
            _warn(
                f"{both}, and where to cut cannot be told: they are merged as different modules. "
                "Give model=..."
            )
        said = True
    return adapter.respelled({}, plan) if plan else adapter


def fitted(adapter: Adapter, own: Names) -> dict[str, list[Piece]]:
    """What to do to an adapter to have its projections as the model has them: cut, or put together.

    Returns:
        Key -> pieces, for what is not as in the model.
    """
    modules = adapter.modules
    located = own.locate({key: module.shape for key, module in modules.items()})
    plan: dict[str, list[Piece]] = {}
    for key, module in modules.items():
        if (
            key in located
            or module.kind != "linear"
            or module.needs_base is not None
            or _in(key, plan)
        ):
            continue
        parts, fused = _parts(key), _fused(key)
        theirs = own.locate(dict.fromkeys(parts))
        if parts and len(theirs) == len(parts):
            sizes = [(own.shape(theirs[part]) or (0,))[0] for part in parts]
            if sum(sizes) == module.shape[0]:
                plan |= _pieces(key, parts, sizes)
        elif fused and (theirs := own.locate({fused: None})):
            rows, here = (own.shape(theirs[fused]) or (0,))[0], _parts(fused)
            sizes = _sizes(
                [modules[part].shape[0] if part in modules else None for part in here], rows
            )
            if sizes is not None:
                ends = [sum(sizes[:at]) for at in range(len(sizes))]
                pieces = [
                    (part, size, at)
                    for part, size, at in zip(here, sizes, ends, strict=True)
                    if part in modules
                ]
                plan[fused] = [Piece(part, 0, size, at, rows) for part, size, at in pieces]
    return plan


def _in(key: str, plan: Mapping[str, Sequence[Piece]]) -> bool:
    return any(piece.key == key for pieces in plan.values() for piece in pieces)


def _parts(key: str) -> tuple[str, ...]:
    """The parts of a fused projection; nothing for another module."""
    holder, dot, last = key.rpartition(".")
    return tuple(f"{holder}{dot}{part}" for part in PARTS.get(last, ()))


def _fused(key: str) -> str:
    """The fused projection that a module may be a part of, or ""."""
    holder, dot, last = key.rpartition(".")
    return next((f"{holder}{dot}{fused}" for fused, parts in PARTS.items() if last in parts), "")


def _sizes(known: Sequence[int | None], total: int) -> list[int] | None:
    """The rows of all parts; keys have as many as values, and so have the halves of gate and up.
    None: not certain.
    """
    heights = list(known)
    if len(heights) == 2:
        heights = [size or total // 2 for size in heights]
    else:
        both = heights[1] or heights[2]
        if both is None and heights[0] is not None:
            both = (total - heights[0]) // 2
        if both is not None:
            heights = [heights[0] or total - 2 * both, both, both]
    sizes = [size for size in heights if size is not None and size > 0]
    return sizes if len(sizes) == len(heights) and sum(sizes) == total else None


def _pieces(key: str, parts: Sequence[str], sizes: Sequence[int]) -> dict[str, list[Piece]]:
    """A fused projection, cut."""
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    return {
        part: [Piece(key, start, start + size, 0, size)]
        for part, start, size in zip(parts, starts, sizes, strict=True)
    }


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=4)
