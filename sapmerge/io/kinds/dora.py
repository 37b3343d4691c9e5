"""DoRA: W' = m (W + s B A) / ||W + s B A||, with one norm per output.
As an update of W it is dense, and needs W.

Source: Liu et al., "DoRA", https://arxiv.org/abs/2402.09353; as PEFT merges it. The rows of a
convolution are its kernels, those of an embedding its dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sapmerge.core.updates import Dense
from sapmerge.errors import NonFiniteError
from sapmerge.io.files import Weights, shown
from sapmerge.io.kinds.reading import BaseMatrix, Factors
from sapmerge.io.measuring import Facts

__all__ = ["Dora"]


@dataclass(frozen=True)
class Dora:
    """The update m (W + s B A) / ||W + s B A|| - W.

    Args:
        factors: s B A.
        magnitude: the name of the tensor m, one number per row.
    """

    factors: Factors
    magnitude: str

    @property
    def tensors(self) -> tuple[str, ...]:
        return *self.factors.tensors, self.magnitude

    @property
    def needs_base(self) -> str | None:
        return "it is a DoRA (use_dora), which scales the base's weight itself"

    def update(self, weights: Weights, base: BaseMatrix | None) -> Dense:
        assert base is not None
        weight, low = base(), self.factors.update(weights)
        moved = weight + (low.B.to(weight.device) @ low.A.to(weight.device))
        norms = moved.square().sum(1).sqrt()
        magnitude = weights.read(self.magnitude).float().reshape(-1).to(weight.device)
        if bool((norms == 0).any()):
            raise NonFiniteError(
                f"{weights.where}: tensor {shown(self.magnitude)}: a row of the base's weight and "
                "its update cancel, so it has no direction to scale"
            )
        return Dense(moved * (magnitude / norms)[:, None] - weight)

    def bound(self, facts: Mapping[str, Facts]) -> float:
        return float("inf")

    def reach(self, facts: Mapping[str, Facts]) -> float:
        return float("inf")

    def mark(self) -> tuple[object, ...]:
        return ("dora",)
