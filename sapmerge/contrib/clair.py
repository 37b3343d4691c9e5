"""CLAIR: the mean of the adapters that share a subspace."""

from __future__ import annotations

from typing import Literal

from sapmerge.methods.averaging import mean
from sapmerge.parts.contaminated import FlagContaminated

__all__ = ["clair"]


def clair(
    rank: int = 2,
    side: Literal["left", "right"] = "left",
    form: Literal["leave-one-out", "convex"] = "leave-one-out",
    price: float | None = None,
) -> FlagContaminated:
    """CLAIR: find the subspace that most adapters share, leave out who is outside of it,
    and average the rest.

    Args:
        rank: of the shared subspace of a layer.
        side: whose: of outputs ("left") or inputs ("right").
        form: "leave-one-out", a calibrated test of ours, or "convex", the paper's program.
        price: of the convex form; None chooses it.

    Its refinement, which leaves the mean as it is, is a result per client:
    `sapmerge.federated.refine`. Flipped signs and backdoors inside the shared subspace are
    invisible to it; `FlagContaminated` has more tests.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.clair())

    Source: He et al., "Federated LoRA fine-tuning for LLMs via collaborative alignment",
    https://arxiv.org/abs/2605.21217. Penalty, tuning and numbers of the paper are not public.
    """
    return FlagContaminated(mean(), ("shared",), rank, side, form, price)
