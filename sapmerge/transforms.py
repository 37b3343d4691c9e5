"""Transforms that compare adapters: Layer -> Layer. (`Prune`, which looks at one adapter alone, is in compose.py.)"""

from __future__ import annotations

import torch
from torch import Tensor

from sapmerge.errors import MethodError
from sapmerge.layer import Dense, Layer
from sapmerge.recipe import part

__all__ = ["ElectSign"]


@part
class ElectSign:
    """Keep, in every entry, only the adapters that have the elected sign.

    The sign of an entry is that of sum_k w_k D_k ("total") or of sum_k sign(w_k D_k) ("frequency"). Where that sum is
    0, it is the sign of all sums of the layer together; if that is 0 too, the entry is dropped, so f(-u) = -f(u).

    Args:
        majority_sign_method: "total" or "frequency", the names that PEFT uses.

    Source: Yadav et al., "TIES-Merging", https://arxiv.org/abs/2306.01708
    """

    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if self.majority_sign_method not in ("total", "frequency"):
            raise MethodError(f"majority_sign_method is 'total' or 'frequency'; got {self.majority_sign_method!r}")

    def __call__(self, layer: Layer) -> Layer:
        voters = [(update.dense(), weight) for update, weight in zip(layer, layer.weights, strict=True) if update.rank]
        if not voters:
            return layer
        total = torch.zeros_like(voters[0][0])
        for matrix, weight in voters:
            total += weight * matrix if self.majority_sign_method == "total" else torch.sign(weight * matrix)
        sign = torch.sign(total)
        sign = torch.where(sign == 0, torch.sign(sign.sum()), sign)
        kept = iter([Dense(_agreeing(matrix, weight, sign)) for matrix, weight in voters])
        return layer.with_updates([next(kept) if update.rank else update for update in layer])


def _agreeing(matrix: Tensor, weight: float, sign: Tensor) -> Tensor:
    return torch.where(torch.sign(matrix * weight) == sign, matrix, torch.zeros_like(matrix))
