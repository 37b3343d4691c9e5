"""A process's share of the adapters."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Shard", "ShardDone"]


class ShardDone(Exception):
    """All that a process with a share of the adapters can do is done:
    what comes next needs all of them.
    """


@dataclass
class Shard:
    """The share of the adapters that a process runs: those whose number modulo `count` is `number`.

    Args:
        skipped: whether anything was left to others; what depends on it is not true then.
    """

    number: int = 0
    count: int = 1
    skipped: bool = False
