"""What a pass over the anchors shows while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Passes"]

T = TypeVar("T")


@dataclass
class Passes:
    """The passes of one merge, counted; shared by all copies of its anchors.

    Args:
        shown: whether each has a bar on stderr: which pass, what it asks, at which adapter, and the
            time that it has left. How many will follow depends on what they find.
        count: of those that have begun.
    """

    shown: bool = False
    count: int = 0

    def over(self, batches: Iterable[T], total: int, what: str) -> Iterator[T]:
        """The batches of one pass."""
        self.count += 1
        if not self.shown:
            yield from batches
            return
        from tqdm import tqdm

        name = f"anchors, pass {self.count}: {what}"
        yield from tqdm(batches, desc=name, total=total, unit="batch", leave=False)
