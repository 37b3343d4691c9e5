"""What a model card says of the licences of the merged adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from sapmerge.io.adapter import Adapter
from sapmerge.io.licences import licence_of

__all__ = ["common", "fields", "sentence", "stated"]

_HOLD = "The licences of the base and of these adapters hold for the merge, too."


def stated(adapters: Sequence[Adapter]) -> dict[str, str | None]:
    """Label -> the licence that the adapter's own card states."""
    return {
        adapter.label: None if adapter.folder is None else licence_of(adapter.folder)
        for adapter in adapters
    }


def common(licences: Mapping[str, str | None]) -> str | None:
    """The licence that all adapters state."""
    found = set(licences.values())
    return found.pop() if len(found) == 1 else None


def fields(licences: Mapping[str, str | None]) -> list[str]:
    """The Hub's fields for a licence that all adapters state; none where they differ."""
    licence = common(licences)
    if licence is None:
        return []
    if other := re.fullmatch(r"other \((.+)\)", licence):
        return ["license: other", f"license_name: {json.dumps(other[1])}"]
    names = licence.split(", ")
    return [f"license: {json.dumps(names[0] if len(names) == 1 else names)}"]


def sentence(licences: Mapping[str, str | None]) -> str:
    """What a user of the merge should know."""
    licence = common(licences)
    if licence is not None:
        return f"The adapters' cards state the licence `{licence}`. {_HOLD}"
    by_name: dict[str, list[str]] = {}
    for label, name in licences.items():
        if name is not None:
            by_name.setdefault(name, []).append(label)
    if not by_name:
        return _HOLD
    listed = "; ".join(
        f"`{name}` ({', '.join(sorted(labels))})" for name, labels in sorted(by_name.items())
    )
    silent = sorted(label for label, name in licences.items() if name is None)
    missing = f"; none is stated for {', '.join(silent)}" if silent else ""
    return (
        f"Licences that the adapters' cards state: {listed}{missing}. {_HOLD} Under which licence "
        "it may be passed on is the decision of whoever does so: this card states none."
    )
