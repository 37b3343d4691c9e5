"""The inbox of a one-shot round: every client sends one adapter, once;
what is good is kept, and then merged.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sapmerge.core.protocols import Method
from sapmerge.core.scalars import plain
from sapmerge.errors import OutputError, RoundError, SapmergeWarning
from sapmerge.federated.contract import Contract, Manifest, contract
from sapmerge.federated.entries import (
    Entry,
    client_name,
    sample_count,
    scaled_to_mean_1,
    votes,
)
from sapmerge.federated.outcome import Kept, Outcome, Refused, refusal
from sapmerge.federated.report import RoundReport, rows_of
from sapmerge.federated.round_folder import RoundFolder
from sapmerge.federated.state import MergeState
from sapmerge.io.adapter import Adapter
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.uploads import files_of, stage
from sapmerge.losses import Loss
from sapmerge.merging.heads import HeadPolicy
from sapmerge.merging.inputs import sharing
from sapmerge.merging.merge import Merged, merge

__all__ = ["Inbox"]


class Inbox:
    """The folder of one round. It is made by the first `Inbox(...)`;
    later ones, in any process, go on with it.

    Names and shapes that an upload must have come from `model` or `manifest`,
    never from another upload.

    Args:
        folder: of the round; its parent must exist.
        base_model: name of the base model; an upload whose config names another is refused.
        model: the base model, for names and shapes of its modules.
        manifest: instead of a model: a JSON file (or mapping) module -> [outputs, inputs], or an
            adapter of your own.
        modules: those that may be adapted: names, last parts of names, or patterns; by default all.
        modules_to_save: modules of the model that may be saved whole; by default none.
        max_rank: of any module of an upload.
        max_bytes: of an upload; by default what `max_rank` needs in float64.
        max_norm_ratio: what is longer than so many times the median of all is left out of the
            merge.
        quorum: a merge needs that many clients.
        max_share: of the samples that one client may stand for, in (0, 1]; with fewer than 1 /
            max_share clients, an equal share.

    Raises:
        RoundError: the folder exists and is no round, or is the round of another contract.
        MethodError: an argument that a new round needs is missing or wrong.

    Example:
        >>> import sapmerge as sm
        >>> inbox = sm.federated.Inbox("round-1", base_model="somebody/clip", manifest="art")
        >>> bool(inbox.add("art", client="gallery", samples=700))
        True
        >>> bool(inbox.add("no such folder", client="nobody"))
        False
        >>> inbox.clients
        {'gallery': 700}
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        model: Any = None,
        manifest: Manifest | None = None,
        modules: Sequence[str] | None = None,
        modules_to_save: Sequence[str] = (),
        max_rank: int = 64,
        max_bytes: int | None = None,
        max_norm_ratio: float = 100.0,
        quorum: int = 1,
        max_share: float = 0.5,
    ) -> None:
        self._folder = RoundFolder(folder)
        self.path: str = self._folder.path
        self._merged: Merged | None = None
        numbers = plain((max_rank, max_bytes, max_norm_ratio, quorum, max_share))
        found = self._folder.read()
        if found is None:
            self.contract = contract(
                base_model, model, manifest, modules, modules_to_save, *numbers
            )
            found = self._folder.make(self.contract)
        if found is not None:
            path = self._folder.description
            self.contract = Contract.from_dict(found, path)
            if model is not None or manifest is not None:
                wanted = contract(base_model, model, manifest, modules, modules_to_save, *numbers)
                self.contract.check_same(wanted, path)
            elif base_model not in (None, self.contract.base_model):
                raise RoundError(
                    f"{path}: the round is for {self.contract.base_model!r}, not for {base_model!r}"
                )
            self._folder.open()
        self._folder.sweep()

    @property
    def clients(self) -> dict[str, int]:
        """Client -> samples, of those whose uploads are kept, sorted by name."""
        return {entry.client: entry.samples for entry in self._folder.entries()}

    def missing(self, expected: Iterable[str]) -> list[str]:
        """Those of the expected clients who have no upload here, sorted."""
        here = set(self.clients)
        return sorted(set(expected) - here)

    def add(self, upload: object, client: str, samples: int = 1) -> Outcome:
        """Check an upload and keep it. A client's later upload takes the place of its earlier one.

        When this returns `Kept`, the upload is on disk and survives a kill at any moment; before
        that, none of it is part of the round. A bad upload never raises and never
        changes what was kept.

        Args:
            upload: a folder, a zip file of the two files as bytes, (config, weights) as bytes, or
                (config, state_dict).
            client: who sends it: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first.
            samples: how many training samples it stands for.

        Raises:
            RoundError, OutputError: the round itself is broken, or its disk refuses.
        """
        try:
            client, samples = client_name(client), sample_count(samples)
            config, weights = files_of(upload, self.contract.max_bytes)
        except Exception as error:
            return self._refuse(client, error)
        key = hashlib.sha256(
            hashlib.sha256(config).digest() + hashlib.sha256(weights).digest()
        ).hexdigest()
        with StagedFolder(self._folder.kept(key), overwrite=True) as folder:
            stage(folder, config, weights)
            try:
                adapter, checks = self._checked(folder.staged)
            except OutputError:
                raise
            except Exception as error:
                return self._refuse(client, error)
            self._folder.put(Entry(client, samples, key, adapter.digest, checks), folder.publish)
        return Kept(client, samples, adapter.digest, checks)

    def _checked(self, folder: str) -> tuple[Adapter, dict[str, Any]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SapmergeWarning)
            adapter = Adapter.load(folder, label="upload")
            checks = self.contract.check(adapter)
        said = [
            str(w.message).replace(folder, "upload")
            for w in caught
            if issubclass(w.category, SapmergeWarning)
        ]
        return adapter, {**checks, "warnings": said}

    @property
    def id(self) -> str:
        """A name of the round that no other round has."""
        return self._folder.id

    def refuse(self, client: str, reason: str) -> Refused:
        """Write down that nothing of a client could be taken, for the report."""
        return self._refuse(client, RoundError(reason))

    def _refuse(self, client: object, error: Exception) -> Refused:
        refused = refusal(client, error, self.path)
        self._folder.refuse(refused)
        return refused

    def remove(self, client: str) -> None:
        """Take a client out of the round, and its upload from the disk.

        Raises:
            RoundError: there is no such client.
        """
        self._folder.remove(client)

    def merge(
        self,
        anchor_loader: Any = None,
        model: Any = None,
        *,
        method: Method | None = None,
        scale: float = 1.0,
        rank: int | float | str | None = None,
        loss: Loss | None = None,
        modules_to_save: HeadPolicy = None,
        device: torch.device | str | None = None,
        progress: bool | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> Merged:
        """Merge what is kept; `sap()` with anchors by default.
        The arguments are those of `sapmerge.merge`.

        Weights are the clients' samples, capped at `max_share` and scaled to a mean of 1. Clients
        with the same content have one vote, with the largest of their sample counts. The bytes of
        the result do not depend on the order of arrival.
        With anchors, their statistics are kept in the round,
        so that a late client costs its own passes only.

        Raises:
            RoundError: fewer clients than the quorum, or a kept upload was damaged.
            SapmergeError: whatever `sapmerge.merge` refuses.
        """
        entries, aside = self._chosen()
        if len(entries) < self.contract.quorum:
            raise RoundError(
                (
                    f"{self.path!r}: {len(entries)} clients of the quorum of "
                    f"{self.contract.quorum} are here"
                )
                + (f"; left out: {sorted(aside)}" if aside else "")
            )
        for client, why in aside.items():
            if why.startswith("its norm"):
                warnings.warn(
                    f"{client!r} is left out of the merge: {why}", SapmergeWarning, stacklevel=2
                )
        adapters = sharing(self._folder.load(entry) for entry, _ in entries)
        self._merged = merge(
            {adapter.label: adapter for adapter in adapters},
            anchor_loader,
            model,
            method=method,
            weights=scaled_to_mean_1([weight for _, weight in entries]),
            scale=scale,
            rank=rank,
            loss=loss,
            modules_to_save=modules_to_save,
            base_model=self.contract.base_model,
            device=device,
            progress=progress,
            cache=self._folder.cache if cache is None and anchor_loader is not None else cache,
        )
        return self._merged

    def state(self) -> MergeState:
        """The running weighted sum of all clients, kept in the round:
        only what came or left since is read.

        Its mean is that of `merge(method=mean())` to rounding (1e-6); see `MergeState`.

        Raises:
            RoundError: a kept upload was damaged.
        """
        return self._folder.state(self._chosen()[0])

    def _chosen(self) -> tuple[list[tuple[Entry, float]], dict[str, str]]:
        return votes(self._folder.entries(), self.contract.max_norm_ratio, self.contract.max_share)

    @property
    def report(self) -> RoundReport:
        """Every client and every refused upload; after `merge`, with weights,
        agreement and losses of the last one.
        """
        used, aside = self._chosen()
        rows = rows_of(
            self._folder.entries(),
            {entry.client: weight for entry, weight in used},
            aside,
            self._merged,
        )
        refused = tuple(self._folder.refusals())
        method = None if self._merged is None else str(self._merged.recipe["method"])
        return RoundReport(self.contract.base_model, self.contract.quorum, method, rows, refused)
