"""What becomes of an upload."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sapmerge.errors import SapmergeError
from sapmerge.io.files import shown

__all__ = ["Kept", "Outcome", "Refused", "refusal"]

_STAGED = re.compile(r"(adapter )?'[^']*\.sapmerge-\d+-[0-9a-f]+\.tmp'")


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


def refusal(client: object, error: Exception, hidden: str) -> Refused:
    """What an error says of an upload, fit to be shown: no control characters, nothing long.

    Args:
        hidden: a path of the server's, which a client need not know.
    """
    reason = str(error) if isinstance(error, SapmergeError) else f"{type(error).__name__}: {error}"
    who = client if isinstance(client, str) else shown(client)
    if len(who) > 64 or not who.isascii() or not who.isprintable():
        who = shown(who, 64)
    # Where it lay while it was looked at says nothing, and is another place each time.
    reason = _STAGED.sub("the upload", reason).replace(hidden, "")
    return Refused(who, SapmergeError(reason).args[0])
