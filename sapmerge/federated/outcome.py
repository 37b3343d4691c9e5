"""What becomes of an upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Kept", "Outcome", "Refused"]


@dataclass(frozen=True)
class Kept:
    """An upload that was kept. True in a condition.

    Args:
        digest: of its content: values, scalings, names.
        checks: what was looked at and measured.
    """

    client: str
    samples: int
    digest: str
    checks: Mapping[str, Any]

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Refused:
    """An upload that was not kept, and why. False in a condition."""

    client: str
    reason: str

    def __bool__(self) -> bool:
        return False


Outcome: TypeAlias = Kept | Refused
