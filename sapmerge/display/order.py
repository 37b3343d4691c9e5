"""The order in which layers are shown: by module type, and then by depth, 2 before 10."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Group", "grouped", "module_type", "natural"]

_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Group:
    """The layers of one module type.

    Args:
        kind: the name with * for every number.
        title: what tells it apart from the other types, for a heading.
        names: its layers, by depth.
    """

    kind: str
    title: str
    names: tuple[str, ...]

    @property
    def blocks(self) -> str:
        """From the first number to the last."""
        first, last = depth(self.names[0]), depth(self.names[-1])
        return first if first == last else f"{first} to {last}"


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts numbers inside names as numbers.

    Example:
        >>> from sapmerge.display.order import natural
        >>> sorted(["h.10.q", "h.2.q"], key=natural)
        ['h.2.q', 'h.10.q']
    """
    return tuple(
        (True, int(piece), piece) if piece.isascii() and piece.isdigit() else (False, 0, piece)
        for piece in _NUMBER.split(name)
        if piece
    )


def module_type(name: str) -> str:
    """The name of a module with * in place of the numbers of blocks and experts.

    Example:
        >>> from sapmerge.display.order import module_type
        >>> module_type("model.layers.11.self_attn.q_proj")
        'model.layers.*.self_attn.q_proj'
    """
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def depth(name: str) -> str:
    """The numbers in the name of a module: its block, and its expert if it is one."""
    return ".".join(piece for piece in name.split(".") if piece.isdigit())


def grouped(names: Iterable[str]) -> tuple[Group, ...]:
    """Layers by module type, in the order in which a model has them; each type by depth."""
    types: dict[str, list[str]] = {}
    for name in sorted(names, key=natural):
        types.setdefault(module_type(name), []).append(name)
    titles = _titles(list(types))
    return tuple(Group(kind, titles[kind], tuple(found)) for kind, found in types.items())


def _titles(kinds: Sequence[str]) -> dict[str, str]:
    """The shortest that tells the types apart: the last component, with the first that they do
    not share, or all that they do not share.
    """
    split = {kind: [piece for piece in kind.split(".") if piece != "*"] for kind in kinds}
    shared = _common([set(pieces) for pieces in split.values()])
    own = {
        kind: [piece for piece in pieces[:-1] if piece not in shared] + pieces[-1:]
        for kind, pieces in split.items()
    }
    for titles in (
        {kind: pieces[-1] for kind, pieces in own.items()},
        {kind: ".".join(pieces[:1] + pieces[1:][-1:]) for kind, pieces in own.items()},
        {kind: ".".join(pieces) for kind, pieces in own.items()},
    ):
        if len(set(titles.values())) == len(titles):
            return titles
    return {kind: kind for kind in kinds}


def _common(sets: Sequence[set[str]]) -> set[str]:
    """What is in all of them."""
    return set[str]().union(*sets).intersection(*sets)
