"""Keep what several adapters agree to need."""

from __future__ import annotations

from sapmerge.compose import Chain
from sapmerge.layer import Method
from sapmerge.mergers import Sum
from sapmerge.transforms import Consensus

__all__ = ["consensus_ta"]


def consensus_ta(ratio: float = 0.4, count: int = 2) -> Method:
    """Consensus task arithmetic: the sum of the updates in the entries that at least `count` adapters care about.

    D = sum_k D_k where #{k: |D_k| > ratio |sum_j D_j - D_k|} >= count, else 0 (TALL masks).

    Args:
        ratio: lambda of the TALL masks; the authors pick it per task from 0.2 ... 0.6 on validation data.
        count: how many adapters must care; of fewer adapters, all must.

    Source: Wang et al., "Localizing task information for improved model merging and compression",
    https://arxiv.org/abs/2405.07813. The authors scale the result by an alpha found on validation data: `scale=`.
    """
    return Chain(Consensus(ratio, count), Sum())
