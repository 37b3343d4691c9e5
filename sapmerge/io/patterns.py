"""Which modules a config means: PEFT's matching rules, with the time of untrusted regular
expressions bounded.

PEFT runs them as they come, and a pattern of 30 characters can hang it. Here plain names need no
engine, patterns that can be slow are refused by their form, everything else runs in `regex` (which
can be stopped), and all patterns of one adapter share one budget of time.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sapmerge.errors import AdapterConfigError, LimitExceededError
from sapmerge.io.files import Limits, shown
from sapmerge.io.regex_safety import why_slow

if TYPE_CHECKING:
    from regex import Match
    from regex import Pattern as Compiled

__all__ = ["Budget", "Selection", "Tails"]

_COMPILED = 512
_PLAIN = re.compile(r"[A-Za-z0-9_.-]*")
# What `regex` reads differently from `re`: fuzzy matching, and nested sets.
_FOREIGN = re.compile(r"\{(?!\d*(,\d*)?\})|\[\[")


class Budget:
    """The time that all patterns of one adapter share;
    `with budget:` counts what is spent inside.
    """

    def __init__(self, limits: Limits, where: str) -> None:
        self.limits, self.where = limits, where
        self._left = limits.pattern_seconds
        self._starts: list[float] = []
        self._compiled = 0

    def __enter__(self) -> Budget:
        self._starts.append(time.monotonic())
        return self

    def __exit__(self, *_: object) -> None:
        start = self._starts.pop()
        if not self._starts:
            self._left -= time.monotonic() - start

    def left(self) -> float:
        """Seconds left, or `LimitExceededError` if there are none."""
        left = self._left - (time.monotonic() - self._starts[0] if self._starts else 0.0)
        if left <= 0:
            raise self.exceeded()
        return left

    def compile_one(self) -> None:
        """Count a pattern that needs an engine; the number decides,
        not how fast the machine is today.
        """
        self._compiled += 1
        if self._compiled > _COMPILED:
            raise LimitExceededError(
                f"{self.where}: more than {_COMPILED} patterns in target_modules, exclude_modules, "
                "rank_pattern, "
                "alpha_pattern and layers_pattern are no plain names; write plain module names"
            )

    def exceeded(self) -> LimitExceededError:
        return LimitExceededError(
            f"{self.where}: matching target_modules, exclude_modules, rank_pattern, alpha_pattern "
            "or layers_pattern "
            f"takes longer than {self.limits.pattern_seconds} s; write plain module names"
        )


# PEFT's frames: get_pattern_key, match_target_against_key and the layer index of
# check_target_module_exists.
_TAIL = r"(.*\.)?({})$"
_FULL = r"{}\Z"
_INDEX = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_INDEX = re.compile(r".*?\.[^.]*\.(\d+)\.")


class Pattern:
    """One pattern of a config.

    Args:
        text: what the config says.
        frame: where PEFT puts it: a format string with one `{}`.
        field: its key in the config, for messages.
    """

    def __init__(self, text: str, frame: str, field: str, budget: Budget) -> None:
        if len(text) > budget.limits.pattern_length:
            raise LimitExceededError(
                f"{budget.where}: {field}: {shown(text)} has {len(text)} characters; at most "
                f"{budget.limits.pattern_length} are read"
            )
        self.text, self._frame, self._field, self._budget = text, frame, field, budget
        self.plain = _PLAIN.fullmatch(text) is not None
        self._compiled: Compiled[str] | None = None
        if not self.plain:
            # Now, and not when a module asks: a bad pattern is refused whether it comes to be used
            # or not.
            with budget:
                budget.left()
                self._compiled = self._compile()

    def matches(self, name: str) -> bool:
        """Whether the module is meant. Plain text needs no engine;
        a `.` in it stands for any character, as in PEFT.
        """
        if not self.plain:
            return self.match(name) is not None
        start = len(name) - len(self.text)
        if start < 0 or (start > 0 and (self._frame == _FULL or name[start - 1] != ".")):
            return False
        tail = name[start:]
        return tail == self.text or (
            "." in self.text
            and all(mine in (".", theirs) for mine, theirs in zip(self.text, tail, strict=True))
        )

    def match(self, name: str) -> Match[str] | None:
        with self._budget:
            left = self._budget.left()
            if self._compiled is None:
                self._compiled = self._compile()
            try:
                return self._compiled.match(name, timeout=left)
            except TimeoutError:
                raise self._budget.exceeded() from None

    def _compile(self) -> Compiled[str]:
        import regex

        self._budget.compile_one()
        whole = self._frame.format(self.text if self._frame != _FULL else f"(?:{self.text})")
        try:
            if _FOREIGN.search(self.text):
                raise re.error("braces that are not a repeat count, or a nested set")
            # `re` decides what is a valid pattern: that is what PEFT uses, and `regex` understands
            # more.
            re.compile(self.text)
            re.compile(whole)
            slow = why_slow(self.text)
            compiled = regex.compile(whole)
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise AdapterConfigError(
                f"{self._budget.where}: {self._field}: {shown(self.text)} is not a regular "
                f"expression that can be used ({shown(str(error))}); write plain module names"
            ) from None
        if slow is not None:
            raise LimitExceededError(
                f"{self._budget.where}: {self._field}: {shown(self.text)} can backtrack "
                f"exponentially ({slow}); write plain module names"
            )
        return compiled


class Tails:
    """The keys of `rank_pattern` or `alpha_pattern`,
    of which each means the modules whose names end with it.

    Plain names are looked up, thousands of them for thousands of modules;
    everything else is tried one by one.
    """

    def __init__(self, table: Mapping[str, object], field: str, budget: Budget) -> None:
        if len(table) > budget.limits.pattern_keys:
            raise LimitExceededError(
                f"{budget.where}: {field} has {len(table)} keys; at most "
                f"{budget.limits.pattern_keys} are read"
            )
        self.patterns = [Pattern(key, _TAIL, field, budget) for key in table]
        self._budget = budget
        self._others = list[int]()
        self._plain: dict[
            int, dict[frozenset[int], dict[str, int]]
        ] = {}  # length -> dots -> text -> position
        for position, pattern in enumerate(self.patterns):
            if pattern.plain and pattern.text:
                of_length = self._plain.setdefault(len(pattern.text), {})
                of_length.setdefault(_dots(pattern.text), {})[pattern.text] = position
            else:
                self._others.append(position)

    def matching(self, name: str) -> list[int]:
        """The positions of the patterns that match, in file order: the first one counts."""
        with self._budget:
            self._budget.left()
            hits = {position for position in self._others if self.patterns[position].matches(name)}
            for ending in _endings(name):
                for dots, texts in self._plain.get(len(ending), {}).items():
                    if dots <= _dots(ending):  # no dot stands for another letter
                        hits.update([texts[ending]] if ending in texts else [])
                    else:
                        hits.update(
                            position
                            for position in texts.values()
                            if self.patterns[position].matches(name)
                        )
            return sorted(hits)


def _dots(text: str) -> frozenset[int]:
    return frozenset(place for place, letter in enumerate(text) if letter == ".")


def _endings(name: str) -> Iterator[str]:
    """The name, and what follows each of its dots."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


class Selection:
    """`target_modules`, `exclude_modules`, `layers_to_transform` and
    `layers_pattern` of one config.

    Args:
        targets, excluded: a pattern, names, or None. None means that the config does not say.
        layers: layer numbers, or None for all.
        layers_pattern: names of the lists that the numbers count in; empty for any.
        saved: names of modules that are saved whole: PEFT never adapts what lies in them.
    """

    def __init__(
        self,
        targets: str | Sequence[str] | None,
        excluded: str | Sequence[str] | None,
        layers: Sequence[int] | None,
        layers_pattern: Sequence[str],
        saved: Sequence[str],
        budget: Budget,
    ) -> None:
        self._budget = budget
        self._any = targets is None or (
            isinstance(targets, str) and targets.lower() == "all-linear"
        )
        self._target = (
            Pattern(targets, _FULL, "target_modules", budget) if isinstance(targets, str) else None
        )
        self._targets = frozenset[str]() if isinstance(targets, str) else frozenset(targets or ())
        self._exclude = (
            Pattern(excluded, _FULL, "exclude_modules", budget)
            if isinstance(excluded, str)
            else None
        )
        self._excluded = (
            frozenset[str]() if isinstance(excluded, str) else frozenset(excluded or ())
        )
        self._layers = frozenset(layers) if layers else None
        self._lists = [Pattern(text, _INDEX, "layers_pattern", budget) for text in layers_pattern]
        self._saved = tuple(saved)
        self._seen_targets: set[str] = set()
        self._seen_layers: set[int] = set()

    def why_not(self, name: str) -> str | None:
        """Why PEFT would not adapt the module of this name, or None if it would."""
        if self._exclude is not None and self._exclude.text and self._exclude.matches(name):
            return f"exclude_modules {shown(self._exclude.text)} hides it"
        if self._excluded:
            hiding = next((ending for ending in _endings(name) if ending in self._excluded), None)
            if hiding is not None:
                return f"exclude_modules has {shown(hiding)}, which hides it"
        for saved in self._saved:
            if f".{saved}." in f".{name}.":
                return f"modules_to_save has {shown(saved)}, which replaces the whole module"
        if self._any:
            return None
        if self._target is not None:
            matched = self._target.matches(name)
            return (
                None if matched else f"target_modules {shown(self._target.text)} does not match it"
            )
        hits = [ending for ending in _endings(name) if ending in self._targets]
        if not hits:
            return "target_modules does not name it"
        self._seen_targets.update(hits)
        if self._layers is None or name in self._targets:
            return None
        index = self._layer_of(name)
        if index is None or index not in self._layers:
            return (
                f"layers_to_transform {shown(sorted(self._layers))} does not have its layer "
                f"({index})"
            )
        self._seen_layers.add(index)
        return None

    def _layer_of(self, name: str) -> int | None:
        if not self._lists:
            match = _ANY_INDEX.match(name)
            return int(match[1]) if match else None
        for pattern in self._lists:
            match = pattern.match(name)
            if match is not None:
                return int(match["idx"])
        return None

    def unseen(self) -> Iterable[str]:
        """What the config names and no module of the file bears out,
        once all its modules were asked for.
        """
        for target in sorted(self._targets - self._seen_targets):
            if not self._may_be_hidden(target):
                yield f"target_modules names {shown(target)}"
        if self._layers is not None and self._seen_layers:
            for layer in sorted(self._layers - self._seen_layers):
                yield f"layers_to_transform names layer {layer}"

    def _may_be_hidden(self, target: str) -> bool:
        """Whether every module of this name may be excluded, or saved whole instead."""
        near = any(
            f".{name}".endswith(f".{target}") or f".{target}".endswith(f".{name}")
            for name in self._excluded
        )
        return (
            near
            or self._exclude is not None
            or any(f".{saved}." in f".{target}." for saved in self._saved)
        )
