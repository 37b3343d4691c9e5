"""What happened in a round: every client and every refused upload,
as a page to read and as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sapmerge.display.tables import table
from sapmerge.federated.entries import Entry
from sapmerge.io.records import encoded
from sapmerge.merging.merge import Merged
from sapmerge.merging.report import LayerReport

__all__ = ["ClientReport", "RoundReport", "rows_of"]


@dataclass(frozen=True)
class ClientReport:
    """One client whose upload was kept.

    Args:
        checks: what was measured when it came: modules, ranks, norm, warnings.
        weight: its share in the merge: of the samples, capped, times what the method made of it.
            Of all merged clients the shares sum to 1.
        left_out: why it is not merged although it was kept; None if it is.
        agreement: its share by `WeighByAgreement`, if the method weighs so.
        anchor_loss: at base + adapter, if anchors were read.
        kept_share: of its units, if the method prunes.
    """

    client: str
    digest: str
    samples: int
    checks: Mapping[str, Any]
    weight: float
    left_out: str | None = None
    agreement: float | None = None
    anchor_loss: float | None = None
    kept_share: float | None = None


@dataclass(frozen=True)
class RoundReport:
    """A round as it stands. `print` gives a page; equal rounds give equal bytes,
    whatever came first.

    Args:
        method: recipe of the last merge; None before it.
        refused: (client, reason).
    """

    base_model: str | None
    quorum: int
    method: str | None
    clients: tuple[ClientReport, ...]
    refused: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: dicts, lists, numbers and strings."""
        data = asdict(self)
        return data | {
            "refused": [{"client": client, "reason": reason} for client, reason in self.refused]
        }

    def to_json(self) -> bytes:
        """`to_dict` as JSON."""
        return encoded(self.to_dict())

    def __str__(self) -> str:
        merged = sum(client.left_out is None for client in self.clients)
        lines = [
            f"base       {self.base_model or 'not named'}",
            f"clients    {len(self.clients)} kept, {merged} merged, {len(self.refused)} refused "
            f"(quorum {self.quorum})",
        ]
        if self.method:
            lines.append(f"method     {self.method}")
        rows = [
            [
                c.client,
                c.samples,
                f"{c.weight:.1%}",
                *map(_short, (c.agreement, c.anchor_loss, c.kept_share)),
                c.digest[:12],
            ]
            for c in self.clients
        ]
        lines += [
            "",
            table(
                ["client", "samples", "weight", "agreement", "anchor loss", "kept", "digest"], rows
            ),
        ]
        lines += [f"{c.client}: left out, {c.left_out}" for c in self.clients if c.left_out]
        lines += [f"{client}: refused, {reason}" for client, reason in self.refused]
        return "\n".join(lines)


def rows_of(
    entries: Sequence[Entry],
    weights: Mapping[str, float],
    aside: Mapping[str, str],
    merged: Merged | None,
) -> tuple[ClientReport, ...]:
    """A row per kept client.

    Args:
        weights: client -> weight, of those who are merged.
        aside: client -> why it is not.
    """
    weights = weights if merged is None else merged.report.weights
    total = sum(weights.values()) or 1.0
    layers = merged.report.layers if merged is not None else ()
    notes: Mapping[str, Any] = merged.report.notes if merged is not None else {}
    losses: Mapping[str, Any] = notes.get("anchor loss", {})
    agreement: Mapping[str, Any] = notes.get("agreement", {})
    return tuple(
        ClientReport(
            client=entry.client,
            digest=entry.digest,
            samples=entry.samples,
            checks=entry.checks,
            weight=weights.get(entry.client, 0.0) / total,
            left_out=aside.get(entry.client),
            agreement=agreement.get(entry.client),
            anchor_loss=losses.get(entry.client),
            kept_share=_kept(layers, entry.client),
        )
        for entry in entries
    )


def _kept(layers: Sequence[LayerReport], client: str) -> float | None:
    found = [r.notes["density"][client] for r in layers if client in r.notes.get("density", {})]
    return sum(found) / len(found) if found else None


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
