"""Whether a regular expression can be slow: looked at, not run.

A backtracking engine is slow where one text can be matched in many ways: a repeat inside a repeat,
alternatives that overlap inside a repeat, a long row of repeats.
What the configs of adapters need has none of these.
"""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

__all__ = ["why_slow"]

if sys.version_info >= (3, 11):
    from re import _parser as sre  # pyright: ignore
else:
    import sre_parse as sre

# Module names are made of these; other characters never meet a pattern.
_ALPHABET = frozenset(string.ascii_letters + string.digits + string.punctuation)
_CLASSES = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}
# A repeat of at most so many is no loop; and so many loops, or optional parts, may stand in a row.
_FEW, _LOOPS, _OPTIONS = 3, 6, 12
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
_Nodes = list[tuple[str, Any]]


def why_slow(pattern: str) -> str | None:
    """What makes a valid pattern slow on some text, or None."""
    nodes = _nodes(sre.parse(pattern))
    if any(
        kind == "repeat" and body[1] > _FEW and not _unambiguous(body[2])
        for kind, body in _all(nodes)
    ):
        return (
            "a repeat inside a repeat, or alternatives in a repeat, that can match one text in "
            "many ways"
        )
    for kind, most in (("loops", _LOOPS), ("optional parts", _OPTIONS)):
        if (count := _in_a_row(nodes, loops=kind == "loops")) > most:
            return f"{count} {kind} in a row, more than {most}"
    return None


def _nodes(parsed: Any) -> _Nodes:
    """The tree of the parser, with the kinds that matter here:
    one, repeat, branch, group, other.
    """
    nodes: _Nodes = []
    for op, value in parsed:
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            nodes.append(("one", _characters(name, value)))
        elif name in _REPEATS:
            low, high, body = value
            nodes.append(("repeat", (int(low), int(high), _nodes(body))))
        elif name == "BRANCH":
            nodes.append(("branch", [_nodes(branch) for branch in value[1]]))
        elif name == "SUBPATTERN":
            nodes += _nodes(value[-1])
        elif name == "ATOMIC_GROUP":
            nodes += _nodes(value)
        elif name in ("ASSERT", "ASSERT_NOT"):
            nodes.append(("group", _nodes(value[1])))
        elif name == "GROUPREF_EXISTS":
            nodes.append(("branch", [_nodes(branch or ()) for branch in value[1:]]))
        elif name == "GROUPREF":
            nodes.append(("repeat", (0, sys.maxsize, [("one", _ALPHABET)])))
    return nodes


def _characters(name: str, value: Any) -> frozenset[str]:
    """The characters of the alphabet that a node of one character matches."""
    if name == "ANY":
        return _ALPHABET
    if name in ("LITERAL", "NOT_LITERAL"):
        one = frozenset({chr(value)})
        return one if name == "LITERAL" else _ALPHABET - one
    characters: set[str] = set()
    negated = False
    for op, item in value:
        kind = str(op)
        if kind == "NEGATE":
            negated = True
        elif kind == "LITERAL":
            characters.add(chr(item))
        elif kind == "RANGE":
            characters.update(letter for letter in _ALPHABET if item[0] <= ord(letter) <= item[1])
        else:
            words = str(item).removeprefix("CATEGORY_").removeprefix("UNI_")
            matching = {
                letter
                for letter in _ALPHABET
                if re.match(_CLASSES[words.removeprefix("NOT_")], letter)
            }
            characters.update(_ALPHABET - matching if words.startswith("NOT_") else matching)
    return frozenset(_ALPHABET - characters if negated else characters)


def _all(nodes: _Nodes) -> Iterator[tuple[str, Any]]:
    for kind, value in nodes:
        yield kind, value
        for inner in _bodies(kind, value):
            yield from _all(inner)


def _bodies(kind: str, value: Any) -> Iterable[_Nodes]:
    if kind == "one":
        return ()
    return cast(
        "list[_Nodes]", value if kind == "branch" else [value[2] if kind == "repeat" else value]
    )


def _unambiguous(body: _Nodes) -> bool:
    """Whether a loop over this body can split a text in one way only."""
    body = [node for node in body if node[0] != "group"]
    if not body:
        return False
    if len(body) == 1 and body[0][0] == "branch":
        branches = cast("list[_Nodes]", body[0][1])
        first = [branch[0] for branch in branches if branch and branch[0][0] == "one"]
        alike = sum(len(letters) for _, letters in first) > len(
            frozenset[str]().union(*(each for _, each in first))
        )
        return (
            len(first) == len(branches)
            and not alike
            and all(_unambiguous(branch) for branch in branches)
        )
    if all(kind == "one" for kind, _ in body):
        return True
    # What separates one turn from the next: a character that nothing else in the body can match.
    for at in (0, -1):
        kind, letters = body[at]
        rest = body[1:] if at == 0 else body[:-1]
        if kind == "one" and not letters & frozenset[str]().union(
            *(each for key, each in _all(rest) if key == "one")
        ):
            return True
    return False


def _in_a_row(nodes: _Nodes, *, loops: bool) -> int:
    """How many loops, or optional parts, one way through the pattern can meet."""
    total = 0
    for kind, value in nodes:
        inner = max((_in_a_row(body, loops=loops) for body in _bodies(kind, value)), default=0)
        if kind == "repeat":
            low, high, _ = value
            inner = inner * max(1, min(high, _LOOPS + 1) if high <= 1000 else 1)
            inner += (high - low > _FEW) if loops else (low < high <= _FEW)
        total += inner
    return total
