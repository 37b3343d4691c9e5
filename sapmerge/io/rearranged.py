"""The modules of an adapter under other keys, cut out of fused projections,
or put together into them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.io.contents import Contents
from sapmerge.io.files import Weights
from sapmerge.io.kinds.reading import BaseMatrix, Reading
from sapmerge.io.measuring import Facts

__all__ = ["Piece", "rearranged"]


class Piece(NamedTuple):
    """Rows `start` to `stop` of a module's update;
    in the new one, which has `rows`, they begin at row `at`.
    """

    key: str
    start: int
    stop: int
    at: int
    rows: int


class _Pieces(NamedTuple):
    """An update that is put together from rows of others, exactly; no part of it needs the base."""

    pieces: tuple[tuple[Reading, Piece], ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(tensor for reading, _ in self.pieces for tensor in reading.tensors)

    @property
    def needs_base(self) -> str | None:
        return None

    def update(self, weights: Weights, base: BaseMatrix | None) -> Update:
        updates = [(piece, reading.update(weights, None)) for reading, piece in self.pieces]
        low = [(piece, update) for piece, update in updates if isinstance(update, LowRank)]
        if len(low) < len(updates):
            return Dense(sum(_placed(update.dense(), piece) for piece, update in updates))  # pyright: ignore[reportArgumentType]
        b = torch.cat([_placed(update.B, piece) for piece, update in low], 1)
        return LowRank(b, torch.cat([update.A for _, update in low]))

    def bound(self, facts: Mapping[str, Facts]) -> float:
        return max(reading.bound(facts) for reading, _ in self.pieces)

    def reach(self, facts: Mapping[str, Facts]) -> float:
        return math.hypot(*(reading.reach(facts) for reading, _ in self.pieces))

    def mark(self) -> tuple[object, ...]:
        return tuple(piece for _, piece in self.pieces)


def _placed(matrix: torch.Tensor, piece: Piece) -> torch.Tensor:
    out = matrix.new_zeros(piece.rows, matrix.shape[1])
    out[piece.at : piece.at + piece.stop - piece.start] = matrix[piece.start : piece.stop]
    return out


def rearranged(
    contents: Contents, names: Mapping[str, str], cut: Mapping[str, Sequence[Piece]]
) -> Contents:
    """Contents under other keys.

    Args:
        contents: of an adapter.
        names: module of the base -> its new key; those that it does not name keep theirs.
        cut: new key -> the pieces of its update; the modules that they come from are gone.
    """
    gone = {piece.key for pieces in cut.values() for piece in pieces}

    def tensor(name: str) -> str:
        module, _, last = name.rpartition(".")
        return f"{names.get(module, module)}.{last}"

    keys = {
        name: names.get(module.owner, module.owner) + name.removeprefix(module.owner)
        for name, module in contents.modules.items()
        if name not in gone
    }
    modules = {
        keys[name]: replace(module, name=keys[name], owner=names.get(module.owner, module.owner))
        for name, module in contents.modules.items()
        if name not in gone
    }
    readings = {
        keys[name]: reading for name, reading in contents.readings.items() if name not in gone
    }
    for key, pieces in cut.items():
        first = contents.modules[pieces[0].key]
        holder, last = first.spelled.rpartition(".")[0], key.rpartition(".")[2]
        rank = sum(contents.modules[piece.key].rank for piece in pieces)
        modules[key] = replace(
            first,
            name=key,
            owner=key,
            spelled=f"{holder}.{last}" if holder else last,
            shape=(pieces[0].rows, first.shape[1]),
            rank=rank,
            a_shape=(rank, first.a_shape[1]),
            b_shape=(pieces[0].rows, rank),
        )
        readings[key] = _Pieces(tuple((contents.readings[piece.key], piece) for piece in pieces))
    vectors = [replace(vector, name=tensor(vector.name)) for vector in contents.vectors.values()]
    saved = {tensor(name): one for name, one in contents.saved.items()}
    tensors = {key: reading.tensors for key, reading in readings.items()}
    tensors |= {tensor(name): contents.tensors[name] for name in contents.saved}
    return replace(
        contents,
        modules=dict(sorted(modules.items())),
        readings=readings,
        saved=saved,
        vectors={vector.key: vector for vector in vectors},
        copies={names.get(module, module): copy for module, copy in contents.copies.items()},
        tensors=tensors | {vector.key: (vector.tensor,) for vector in vectors},
    )
