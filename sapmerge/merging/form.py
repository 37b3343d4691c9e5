"""In which form a merge is written: how modules are spelled, for which engine,
with one rank or several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """The choices of `save_pretrained`.

    Args:
        names: see `spelling.written_names`.
        uniform_rank: whether all modules get the largest rank, padded with zeros.
        serving: the engine that is to load it, see `io.engines`.
    """

    names: str | None = None
    uniform_rank: bool = True
    serving: str | None = None

    def recorded(self, names: str | None) -> Mapping[str, object]:
        """What differs from the default, for the metadata;
        `names` is the choice that needs no model.
        """
        record: dict[str, object] = {} if names is None else {"names": names}
        record |= {} if self.uniform_rank else {"uniform_rank": False}
        return record | ({} if self.serving is None else {"serving": self.serving})
