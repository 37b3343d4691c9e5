"""The folder of a round: what lies where in it, what is read back, and what may be removed."""

from __future__ import annotations

import hashlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from sapmerge.errors import RoundError, SapmergeError, SapmergeWarning
from sapmerge.federated.contract import Contract
from sapmerge.federated.entries import Entry, entries_of, moment
from sapmerge.federated.outcome import Refused
from sapmerge.federated.state import MergeState
from sapmerge.io.adapter import Adapter
from sapmerge.io.cache import Cache
from sapmerge.io.files import shown
from sapmerge.io.records import (
    Records,
    folders,
    is_folder,
    read_record,
    remove_folder,
    write_record,
)

__all__ = ["RoundFolder"]

_ROUND, _KEPT, _CLIENTS, _REFUSED, _STATE, _CACHE = (
    "round.json",
    "kept",
    "clients",
    "refused",
    "state",
    "cache",
)
_PARTS = (_KEPT, _CLIENTS, _REFUSED, _STATE)
_HISTORY = 100


class RoundFolder:
    """`round.json` (the contract), `kept/` (uploads by content), `clients/` (who sent which),
    `refused/`, `state/` (the running sum) and `cache/` (statistics of the anchors).

    An upload is part of the round when a client's record names it, and only then; everything else
    in `kept/` is what killed processes left.

    Args:
        path: of the folder; its parent must exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.path.abspath(os.fspath(path))
        self.description: str = os.path.join(self.path, _ROUND)
        self.cache: str = os.path.join(self.path, _CACHE)

    def read(self) -> dict[str, Any] | None:
        """The description of the round; None where there is none yet.

        Raises:
            RoundError: the folder is something else.
        """
        if not is_folder(self.path):
            return None
        found = read_record(self.description)
        if found is None and not set(folders(self.path)) <= set(_PARTS):
            raise RoundError(f"{self.path!r} exists and is no round; give another folder")
        return found

    def make(self, contract: Contract) -> dict[str, Any] | None:
        """Write the description of a new round; that of another process if it was first."""
        self.open()
        with self._clients.locked():
            found = read_record(self.description)
            if found is None:
                record = {**contract.to_dict(), "id": secrets.token_hex(8)}
                write_record(self.description, record)
            return found

    def open(self) -> None:
        """Make the folders that are not there."""
        Records(self.path)
        self._clients, self._refused = (
            Records(os.path.join(self.path, name)) for name in (_CLIENTS, _REFUSED)
        )
        Records(os.path.join(self.path, _KEPT))
        self._states = Records(os.path.join(self.path, _STATE))

    def sweep(self) -> None:
        """Remove what killed processes left; nothing that a client's record names."""
        with self._clients.locked():
            for records in (self._clients, self._refused, Records(self.path)):
                records.sweep()
            used = {entry.key for entry in self.entries()}
            for key in folders(os.path.join(self.path, _KEPT)):
                if key not in used:
                    remove_folder(self.kept(key))
        with self._states.locked():
            self._states.sweep()

    @property
    def id(self) -> str:
        """A name of the round that no other round has."""
        return str((read_record(self.description) or {}).get("id", "round"))

    def kept(self, key: str) -> str:
        """Where an upload lies, or will."""
        return os.path.join(self.path, _KEPT, key)

    def entries(self) -> list[Entry]:
        """The kept uploads, sorted by client."""
        return entries_of(self._clients)

    def load(self, entry: Entry) -> Adapter:
        """A kept upload.

        Raises:
            RoundError: it is not what was kept.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SapmergeWarning)  # they stand in the record
                adapter = Adapter.load(self.kept(entry.key), label=entry.client)
        except SapmergeError as error:
            raise RoundError(
                f"the upload of {entry.client!r} was damaged ({error}); remove the client"
            ) from error
        if adapter.digest != entry.digest:
            raise RoundError(
                f"the upload of {entry.client!r} is not the one that was kept; remove the client"
            )
        return adapter

    def put(self, entry: Entry, publish: Callable[[], object]) -> None:
        """Make an upload part of the round, in the place of the client's earlier one.

        Args:
            publish: puts its files where `kept` says.
        """
        with self._clients.locked():
            publish()
            before = self._clients.get(entry.client) or {}
            history = [*before.get("history", []), moment(entry.digest, entry.samples)]
            record = {
                "client": entry.client,
                "samples": entry.samples,
                "key": entry.key,
                "digest": entry.digest,
                "checks": entry.checks,
            }
            self._clients.put(entry.client, {**record, "history": history[-_HISTORY:]})
            self._drop(before)

    def remove(self, client: str) -> None:
        """Take a client out of the round, and its upload from the disk.

        Raises:
            RoundError: there is no such client.
        """
        with self._clients.locked():
            names = [entry.client for entry in self.entries()]
            record = self._clients.get(client) if client in names else None
            if record is None:
                raise RoundError(
                    f"{self.path!r}: there is no client {shown(client)}; the clients are {names}"
                )
            self._clients.remove(client)
            self._drop(record)

    def _drop(self, record: Mapping[str, Any]) -> None:
        """Under the lock: remove the files of an upload that no client's record names any more."""
        key = record.get("key")
        if (
            key is None
            or not is_folder(self.kept(key))
            or any(entry.key == key for entry in self.entries())
        ):
            return
        if all(entry.digest != record["digest"] for entry in self.entries()):
            with suppress(SapmergeError):  # damaged: the state is summed again
                self._forget(record["digest"], key)
        remove_folder(self.kept(key))

    def refuse(self, refused: Refused) -> None:
        """Write down that an upload was refused; the same once only."""
        name = hashlib.sha256(f"{refused.client}\0{refused.reason}".encode()).hexdigest()[:32]
        self._refused.put(name, {"client": refused.client, "reason": refused.reason})

    def refusals(self) -> list[tuple[str, str]]:
        """(client, reason) of every upload that was refused, sorted."""
        records = map(self._refused.get, self._refused.names())
        return sorted((found["client"], found["reason"]) for found in records if found)

    def state(self, chosen: Iterable[tuple[Entry, float]]) -> MergeState:
        """The running sum of some uploads at some weights, from the one that lies here."""
        with self._states.locked():
            cache = Cache(self._states.path)
            wanted = {entry.digest: (entry, weight) for entry, weight in chosen}
            state = before = MergeState.restored(cache.get("sums"))
            # its files are gone: sum again
            if any(digest not in wanted for digest in state.members):
                state = MergeState()
            for digest, (entry, weight) in wanted.items():
                if state.members.get(digest) != weight:
                    state = state.replacing(self.load(entry), weight)
            if state is not before:
                cache.put("sums", *state.kept())
            return state

    def _forget(self, digest: str, key: str) -> None:
        """Take an upload out of the running sum while its files are still there."""
        with self._states.locked():
            cache = Cache(self._states.path)
            state = MergeState.restored(cache.get("sums"))
            if digest in state.members:
                leaving = Adapter.load(self.kept(key), label="leaving")
                cache.put("sums", *state.without(leaving).kept())
