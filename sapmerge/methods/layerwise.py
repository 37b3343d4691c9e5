"""Methods that treat the layers of a model by where they are."""

from __future__ import annotations

from sapmerge.depth import ScaleByDepth
from sapmerge.layer import Method
from sapmerge.methods.averaging import task_arithmetic

__all__ = ["lines"]


def lines(method: Method | None = None, alpha: float | str = 0.5, beta: float = 0.5) -> Method:
    """LiNeS: scale the result of any method linearly with depth; early layers, which are shared, move least.

        D^l -> (alpha + beta l / (L - 1)) D^l in block l of L, alpha D outside of the blocks

    Args:
        method: `task_arithmetic()` by default.
        alpha: the factor of the first block. "norm" is the authors' choice for several adapters: the sum of magnitudes
            of sum_k w_k D_k over that of the merged update, divided by the number of adapters.
        beta: what the last block gets on top. The authors search it on validation data; for one model they take
            1 - alpha, which is the default.

    The authors find the block by the first ".{l}." in a name, l below the number of blocks of a ViT: ".1." also matches
    an expert or a module of a Sequential. Ours is the number after `layers`, `h`, `blocks`, ... (see `ScaleByDepth`),
    and L = 1 is alpha instead of a division by zero.

    Source: Wang et al., "LiNeS: Post-training layer scaling prevents forgetting and enhances model merging",
    https://arxiv.org/abs/2410.17146
    """
    return ScaleByDepth(task_arithmetic() if method is None else method, alpha, beta)
