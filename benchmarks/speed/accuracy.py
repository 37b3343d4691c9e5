"""How far a stored result is from the float64 dense reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from speed.child import Updates
from speed.dense import METHODS, ties_sum

__all__ = ["References", "largest"]


class References:
    """The float64 dense results of a few layers; each is made once.

    Args:
        updates: the factors of those layers.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._whole: dict[tuple[str, str], Tensor] = {}
        self._best: dict[tuple[str, str, int], Tensor] = {}

    def errors(self, method: str, rank: int | None, out: Path) -> tuple[float, float]:
        """The largest errors over the layers: to the best approximation of the same rank,
        and in excess of it.

        The first is ||stored - best|| / ||best||. It is large where the singular values around the
        cut are equal and either vector is as good. The second is ||stored - whole|| / ||best -
        whole|| - 1, the loss itself; 0 for a result that is stored exactly.
        """
        found = [self._error(name, method, rank, out) for name in self._updates]
        return max(error for error, _ in found), max(excess for _, excess in found)

    def _error(self, name: str, method: str, rank: int | None, out: Path) -> tuple[float, float]:
        whole, stored = self._reference(name, method), _stored(out, name)
        if rank is None:
            return float((stored - whole).norm() / whole.norm()), 0.0
        key = (name, method, rank)
        if key not in self._best:
            U, s, Vh = torch.linalg.svd(whole, full_matrices=False)
            self._best[key] = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        best = self._best[key]
        excess = float((stored - whole).norm() / (best - whole).norm()) - 1
        return float((stored - best).norm() / best.norm()), excess

    def _reference(self, name: str, method: str) -> Tensor:
        if (name, method) not in self._whole:
            matrices = [b.double() @ a.double() for b, a in self._updates[name]]
            self._whole[name, method] = _merged(method, matrices)
        return self._whole[name, method]


def _merged(method: str, matrices: Sequence[Tensor]) -> Tensor:
    if method == "mean":
        return torch.stack(list(matrices)).mean(0)
    if method == "ties":
        return ties_sum(matrices)
    left, right = METHODS[method](matrices, 0)
    return left @ right


def _stored(out: Path, name: str) -> Tensor:
    """What a peer wrote for one module: factors of the whole model or of this module alone,
    or a matrix.
    """
    if (matrix := out / name / "matrix.safetensors").exists():
        return load_file(matrix)[f"{name}.weight"].double()
    folders = [out / name / "merged", out / "merged", out]
    tensors = load_file(
        next(f for folder in folders if (f := folder / "adapter_model.safetensors").exists())
    )
    b, a = (
        tensors[f"base_model.model.{name}.{factor}.weight"].double()
        for factor in ("lora_B", "lora_A")
    )
    return b @ a


def largest(updates: Updates, side: int = 1024) -> Updates:
    """The layers whose smaller side is at most `side`: the others take the reference too long."""
    return {
        name: pairs
        for name, pairs in updates.items()
        if min(pairs[0][0].shape[0], pairs[0][1].shape[1]) <= side
    }
