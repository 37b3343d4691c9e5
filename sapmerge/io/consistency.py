"""The config against the tensors that are really there:
who is adapted, with which rank and which scaling.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sapmerge.errors import AdapterConfigError, SapmergeWarning
from sapmerge.io.config import Settings
from sapmerge.io.files import Limits, shown
from sapmerge.io.kinds.adalora import scaling_of
from sapmerge.io.pairs import Pair
from sapmerge.io.patterns import Budget, Selection, Tails

__all__ = ["Checks", "Scaling"]

USUAL_SCALING = 100.0
FAINT = 1e6


class Scaling(NamedTuple):
    """How strongly one module's B @ A acts.

    Args:
        rank: by the config; of a parameter that of one expert.
    """

    alpha: float
    rank: int
    factor: float


class Checks:
    """One config, asked about the modules of its file.

    Args:
        where: how messages name the config.

    Raises:
        LimitExceededError: patterns that are too long, too many or too slow.
    """

    def __init__(self, settings: Settings, where: str, limits: Limits) -> None:
        self._settings, self._where, self._budget = settings, where, Budget(limits, where)
        targets = () if settings.targets is None and settings.parameters else settings.targets
        saved = (*settings.saved, *settings.heads)
        self._selection = Selection(
            targets,
            settings.excluded,
            settings.layers,
            settings.layers_pattern,
            saved,
            self._budget,
        )
        self._reasons: dict[str, str | None] = {}

    def selects(self, module: str) -> bool:
        """Whether `target_modules` means this module."""
        if module not in self._reasons:
            self._reasons[module] = self._selection.why_not(module)
        return self._reasons[module] is None

    def scalings(self, pairs: Sequence[Pair]) -> list[Scaling]:
        """The scaling of each pair, once config and tensors tell the same story.

        Raises:
            AdapterConfigError: a module that the config hides, a rank it contradicts,
                a target without tensors.
        """
        settings, where = self._settings, self._where
        ranks = _Table(settings.rank_pattern, "rank_pattern", where, self._budget)
        alphas = _Table(settings.alpha_pattern, "alpha_pattern", where, self._budget)
        scalings: list[Scaling] = []
        for pair in pairs:
            if not pair.parameter and not self.selects(pair.key):
                raise AdapterConfigError(
                    f"{where}: the file has tensors for module {shown(pair.spelled)}, but "
                    f"{self._reasons[pair.key]}; config and weights do not belong together"
                )
            rank = int(ranks.get(pair.key, settings.r))
            if pair.rank % rank if pair.parameter else rank != pair.rank:
                what = (
                    f"{pair.rank} rows for all experts" if pair.parameter else f"rank {pair.rank}"
                )
                raise AdapterConfigError(
                    f"{where}: module {shown(pair.key)} has {what} in the tensors, rank {rank} by "
                    "r and rank_pattern; config and weights do not belong together"
                )
            scalings.append(_scaling(alphas.get(pair.key, settings.alpha), rank, settings))
        self._check_seen(pairs)
        ranks.warn()
        alphas.warn()
        _warn_of_scalings(
            {pair.key: scaling for pair, scaling in zip(pairs, scalings, strict=True)}, where
        )
        return scalings

    def _check_seen(self, pairs: Sequence[Pair]) -> None:
        """What the config names is in the file."""
        keys = [pair.key for pair in pairs if pair.parameter]
        unseen = list(self._selection.unseen()) + [
            f"target_parameters names {shown(target)}"
            for target in self._settings.parameters
            if not any(f".{key}".endswith(f".{target}") for key in keys)
        ]
        for problem in unseen:
            raise AdapterConfigError(
                f"{self._where}: {problem}, but no tensor of it is in the file; the file may be "
                "incomplete. If the base model has no such module, remove the name"
            )


def _scaling(alpha: float, rank: int, settings: Settings) -> Scaling:
    if settings.adalora:
        return Scaling(settings.alpha, rank, scaling_of(settings.alpha, settings.r))
    return Scaling(alpha, rank, alpha / (math.sqrt(rank) if settings.rslora else rank))


class _Table:
    """`rank_pattern` or `alpha_pattern`: the first key that matches counts,
    in the order of the file.
    """

    def __init__(self, table: Mapping[str, float], field: str, where: str, budget: Budget) -> None:
        self._field, self._where = field, where
        self._values = list(table.values())
        self._tails = Tails(table, field, budget)
        self._patterns = self._tails.patterns
        self._unused = set(range(len(self._patterns)))
        self._clash: tuple[str, list[str]] | None = None

    def get(self, name: str, default: float) -> float:
        if not self._patterns:
            return default
        hits = self._tails.matching(name)
        if not hits:
            return default
        self._unused.difference_update(hits)
        if len({self._values[hit] for hit in hits}) > 1:
            self._clash = name, [self._patterns[hit].text for hit in hits]
        return self._values[hits[0]]

    def warn(self) -> None:
        """Say what matched nothing, and where the order of keys decides:
        PEFT sorts them when it saves.
        """
        if self._unused:
            names = [self._patterns[position].text for position in sorted(self._unused)]
            _warn(f"{self._where}: {self._field} keys {shown(names)} match no module of the file")
        if self._clash is not None:
            name, keys = self._clash
            _warn(
                f"{self._where}: {self._field} keys {shown(keys)} all match {shown(name)} and "
                "differ; the first of the file counts, as in PEFT, but PEFT sorts them when it "
                "saves: the training may have used another"
            )


def _warn_of_scalings(scalings: Mapping[str, Scaling], where: str) -> None:
    name, worst = max(scalings.items(), key=lambda item: abs(item[1].factor))
    if abs(worst.factor) > USUAL_SCALING:
        _warn(
            f"{where}: lora_alpha {worst.alpha:g} scales module {shown(name)} by {worst.factor:g}; "
            f"more than {USUAL_SCALING:g} is unusual"
        )
    odd = next((name for name, scaling in scalings.items() if scaling.factor <= 0), None)
    faint = next(
        (name for name, scaling in scalings.items() if 0 < scaling.factor < 1 / FAINT), None
    )
    if faint is not None:
        _warn(
            f"{where}: lora_alpha {scalings[faint].alpha:g} scales module {shown(faint)} by "
            f"{scalings[faint].factor:g}, so that nearly nothing is left of it"
        )
    if odd is not None:
        effect = "turns the update around" if scalings[odd].factor < 0 else "makes the update zero"
        _warn(f"{where}: lora_alpha {scalings[odd].alpha:g} of module {shown(odd)} {effect}")


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=2)
