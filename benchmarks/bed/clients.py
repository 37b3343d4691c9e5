"""The adapters that the server receives in every setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from dg.clients import scaled_copy
from dg.data import Domain, Task

from bed.half import Half
from bed.training import REGIMES, Client, Regime, generator, train

__all__ = ["CAMPS", "ODD", "SETTINGS", "Clients", "split"]

HELD = 20
"""Images per class of every domain for the test, and at most half of a class."""

ODD = ("label noise", "flipped", "scaled", "tiny", "other task")
CAMPS = tuple(f"{bad} {how}" for how in ("alike", "apart") for bad in range(1, 5))
"""Beside eight good clients so many bad ones: all with one wrong assignment of names,
or each shuffled by itself.
"""
SETTINGS = ("equal", *ODD, *CAMPS)
GOOD = 8


def split(task: Task, domain: str, seed: str, train: int) -> tuple[Domain, Domain]:
    """Training and test images, so many per class.

    Who is tested does not depend on the seed, and in domains that are made of one set of pictures
    row for row it is the same pictures in each: no client has seen what is tested in another style.
    """
    found, rows = task.domains[domain], ([], [])
    held = generator(task.name)
    drawn = generator(f"{task.name} {domain} {seed}")
    for k in range(len(task.text)):
        index = (found.labels == k).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=held)]
        test = min(HELD, len(index) // 2)
        rest = index[test:]
        rows[1].append(index[:test])
        rows[0].append(rest[torch.randperm(len(rest), generator=drawn)][:train])
    return found.take(torch.cat(rows[0])), found.take(torch.cat(rows[1]))


@dataclass(frozen=True, eq=False)
class Clients:
    """Adapters of one family, regime, initialisation and seed, trained when first asked for.

    Args:
        task: with the tokens of the lower half in the place of images.
        other: a family with other classes, for the client who solves that one.
        init: "shared": all clients start from one random A; "own": each from its own.
    """

    half: Half
    task: Task
    other: Task
    regime: str
    init: str
    seed: int
    cache: Path

    def received(self, target: str, setting: str) -> tuple[dict[str, Path], frozenset[str]]:
        """Label -> checkpoint, with `target` left out; and the labels of the bad ones."""
        sources = [name for name in self.task.domains if name != target]
        first = sources[self.seed % len(sources)]
        if setting in CAMPS:
            bad, how = int(setting.split()[0]), setting.split()[1]
            places = [(name, part) for part in range(GOOD) for name in sources][:GOOD]
            good = self._fit([("good", name, part) for name, part in places])
            turned = sources[self.seed % len(sources) :] + sources[: self.seed % len(sources)]
            wrong = self._fit([(how, turned[k % len(turned)], k) for k in range(4)])
            chosen = dict(list(wrong.items())[:bad])
            return good | chosen, frozenset(chosen)
        good = self._fit([("good", name, 0) for name in self.task.domains])
        own = {label: path for label, path in good.items() if label != f"good-{target}-0"}
        if setting == "equal":
            return own, frozenset()
        source = good[f"good-{first}-0"]
        if setting in ("flipped", "scaled"):
            path = source.with_name(f"{setting}-{first}")
            odd = {setting: scaled_copy({"flipped": -1.0, "scaled": 10.0}[setting], source, path)}
        elif setting == "other task":
            odd = self._fit([("other", next(iter(self.other.domains)), 0)])
        else:
            kind = {"label noise": "apart", "tiny": "tiny"}[setting]
            odd = self._fit([(kind, first, 0)])
        return own | odd, frozenset(odd)

    def own(self, target: str) -> Path:
        """The adapter of the domain itself: the upper reference."""
        return self._fit([("good", target, 0)])[f"good-{target}-0"]

    def _fit(self, wanted: Sequence[tuple[str, str, int]]) -> dict[str, Path]:
        """(kind, domain, number) -> its checkpoint; those that are missing are trained together."""
        regime = REGIMES[self.regime]
        clients = {
            f"{kind}-{domain}-{part}": self._client(kind, domain, part, regime)
            for kind, domain, part in wanted
        }
        task = self.other if any(kind == "other" for kind, _, _ in wanted) else self.task
        train(self.half, list(clients.values()), task.text, regime)
        return {label: client.path for label, client in clients.items()}

    def _client(self, kind: str, domain: str, part: int, regime: Regime) -> Client:
        task = self.other if kind == "other" else self.task
        who = f"{task.name} {kind} {domain} {part} {self.seed}"
        data, _ = split(task, domain, f"{self.seed} {part}", 2 if kind == "tiny" else regime.images)
        if kind == "apart":
            data = Domain(
                data.images, data.labels[torch.randperm(len(data.labels), generator=generator(who))]
            )
        elif kind == "alike":
            data = Domain(
                data.images, (data.labels + 1 + self.seed % (len(task.text) - 1)) % len(task.text)
            )
        init = f"{self.task.name} {self.seed}" if self.init == "shared" else who
        folder = self.cache / self.task.name / f"{self.regime}-{self.init}-{self.seed}"
        return Client(data, init, who, folder / f"{kind}-{domain}-{part}")
