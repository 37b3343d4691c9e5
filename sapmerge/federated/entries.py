"""Who is in a round, with how many samples, and what weight that gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median_high
from typing import Any

from sapmerge.core.scalars import plain
from sapmerge.errors import MethodError, RoundError
from sapmerge.io.files import shown
from sapmerge.io.records import Records

__all__ = [
    "Entry",
    "capped",
    "client_name",
    "entries_of",
    "moment",
    "sample_count",
    "scaled_to_mean_1",
    "votes",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST = 10**12


@dataclass(frozen=True)
class Entry:
    """One client whose upload is kept.

    Args:
        key: sha256 of the two files; the name of their folder.
        digest: of the adapter's content.
    """

    client: str
    samples: int
    key: str
    digest: str
    checks: dict[str, Any]


def client_name(client: object) -> str:
    """A name that can be a file's and an adapter's label.

    Raises:
        MethodError: it cannot.
    """
    if not isinstance(client, str) or not _NAME.fullmatch(client):
        raise MethodError(
            f"client {shown(client)}: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"
        )
    return client


def sample_count(samples: object) -> int:
    """A number of samples.

    Raises:
        MethodError: it is none.
    """
    samples = plain(samples)
    if not isinstance(samples, int) or isinstance(samples, bool) or not 1 <= samples <= _MOST:
        raise MethodError(f"samples {shown(samples)}: a whole number from 1 to {_MOST}")
    return samples


def entries_of(records: Records) -> list[Entry]:
    """The kept uploads, sorted by client.

    Raises:
        RoundError: a record is damaged.
    """
    found: list[Entry] = []
    for name in records.names():
        record = records.get(name)
        if record is None:  # removed meanwhile
            continue
        try:
            found.append(
                Entry(
                    *(record[field] for field in ("client", "samples", "key", "digest", "checks"))
                )
            )
        except KeyError as error:
            raise RoundError(
                f"the record of client {name!r} lacks {error}; restore or remove it"
            ) from None
    return found


def votes(
    entries: Sequence[Entry], max_norm_ratio: float, max_share: float
) -> tuple[list[tuple[Entry, float]], dict[str, str]]:
    """Who is merged, with which weight (samples, capped), and who is not, with the reason.

    Clients with one content have one vote, of the first by name,
    with the largest of their sample counts.
    """
    first: dict[str, Entry] = {}
    samples: dict[str, int] = {}
    aside: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: entry.client):
        mine = first.setdefault(entry.digest, entry)
        samples[entry.digest] = max(samples.get(entry.digest, 0), entry.samples)
        if mine is not entry:
            aside[entry.client] = f"the same content as {mine.client!r}, which has the vote of both"
    norms = [entry.checks["norm"] for entry in first.values()]
    middle = median_high(norms) if norms else 0.0
    used: list[Entry] = []
    for entry in first.values():
        norm = entry.checks["norm"]
        if middle > 0 and norm > max_norm_ratio * middle:
            aside[entry.client] = (
                f"its norm {norm:.3g} is {norm / middle:.3g} times the median of all"
            )
        else:
            used.append(entry)
    return list(
        zip(used, capped([samples[entry.digest] for entry in used], max_share), strict=True)
    ), aside


def capped(samples: Sequence[int], share: float) -> list[float]:
    """min(n, c), with the largest c of which no number has more than `share` of the sum (at
    least 1 / K of it).
    """
    if not samples:
        return []
    share, ordered = max(share, 1 / len(samples)), sorted(samples, reverse=True)
    limit = float(ordered[0])
    if limit > share * sum(ordered):
        limit = float(ordered[-1])
        for count in range(1, len(ordered)):  # the `count` largest are cut to one level
            room = 1 - count * share
            if room > 1e-12 and share * sum(ordered[count:]) / room >= ordered[count]:
                limit = share * sum(ordered[count:]) / room
                break
    return [min(float(n), limit) for n in samples]


def scaled_to_mean_1(weights: Sequence[float]) -> list[float]:
    """The weights times one factor, so that equal ones are exactly 1."""
    if len(set(weights)) == 1:
        return [1.0] * len(weights)
    total = sum(weights)
    return [weight * len(weights) / total for weight in weights]


def moment(digest: str, samples: int) -> dict[str, Any]:
    """An entry of a client's history: what came, and when."""
    return {
        "digest": digest,
        "samples": samples,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
