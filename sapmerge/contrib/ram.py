"""RAM: entries that one adapter alone changed keep their size, shared ones are averaged."""

from __future__ import annotations

from sapmerge.core.protocols import Method
from sapmerge.parts.masks import Threshold
from sapmerge.parts.mergers.linear import DisjointMean
from sapmerge.parts.prune import Prune
from sapmerge.parts.scorers import Magnitude
from sapmerge.parts.wrappers import Chain

__all__ = ["ram"]


def ram(threshold: float = 1e-5) -> Method:
    """RAM: in every entry the mean of the adapters that changed it by `threshold` or more, so that
    what one alone has learnt is not averaged away.

    Args:
        threshold: the smallest magnitude that counts as a change.

    Made for reinforcement learning of whole weights, which changes few entries. LoRA changes nearly
    all of them, and where all adapters change an entry this is `mean`. Without the threshold it is
    `ties` at density 1 without the election.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.ram())

    Source: "Behavior knowledge merge in reinforced agentic models" (RAM),
    https://arxiv.org/abs/2601.13572. It has no RAM+, which also lengthens the entries of one
    adapter.
    """
    return Chain(Prune(Magnitude(), Threshold(threshold)), DisjointMean())
