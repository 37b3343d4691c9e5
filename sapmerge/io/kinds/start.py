"""PiSSA and OLoRA: training starts at a B0 A0 made of the base's weight,
which is subtracted from the base.

Relative to the base as it is published the update is s (B A - B0 A0), and PEFT makes B0 A0 again
from the weight of the base when it loads the adapter: the best approximation of rank r (PiSSA), or
the first r columns and rows of the QR decomposition (OLoRA).

Source: Meng et al., "PiSSA", https://arxiv.org/abs/2404.02948;
Büyükakyüz, "OLoRA", https://arxiv.org/abs/2406.01775
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sapmerge.core.linalg import qr, top_svd
from sapmerge.core.updates import LowRank
from sapmerge.io.files import Weights
from sapmerge.io.kinds.reading import BaseMatrix, Factors
from sapmerge.io.measuring import Facts

__all__ = ["Started"]


@dataclass(frozen=True)
class Started:
    """The update s B A - s B0 A0.

    Args:
        factors: s B A.
        start: "pissa" or "olora".
    """

    factors: Factors
    start: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.factors.tensors

    @property
    def needs_base(self) -> str | None:
        return f"it was initialised with {self.start}, which changed the base's weight"

    def update(self, weights: Weights, base: BaseMatrix | None) -> LowRank:
        assert base is not None
        low, weight, r = self.factors.update(weights), base(), self.factors.rank
        if self.start == "pissa":
            left, sigma, a = top_svd(weight, r)
            b = left * sigma
        else:
            q, upper = qr(weight)
            b, a = q[:, :r] * self.factors.scaling, upper[:r]
        return LowRank(torch.cat([low.B, -b.to(low.B)], 1), torch.cat([low.A, a.to(low.A)]))

    def bound(self, facts: Mapping[str, Facts]) -> float:
        return float("inf")

    def reach(self, facts: Mapping[str, Facts]) -> float:
        return float("inf")

    def mark(self) -> tuple[object, ...]:
        return (self.start,)
