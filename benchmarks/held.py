"""The most that tensors hold at the same time, counted call by call: the same on every machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import sapmerge as sm
from sapmerge.merging import report, stream
from sapmerge.parts.mergers import entrywise

__all__ = ["Held", "matrices_per_adapter", "peak_of"]

SHAPE, RANK = (80, 64), 2


class Held(TorchDispatchMode):
    """Counts bytes of the tensors that are made in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._owners: dict[int, int] = {}  # by address, because views share their memory
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, torch.Tensor) and id(value) not in self._known:
                self._count(value)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage, number = tensor.untyped_storage(), id(tensor)
        address, size = storage.data_ptr(), storage.nbytes()
        self._known.add(number)
        owners = self._owners.get(address, 0)
        self._owners[address] = owners + 1
        if not owners:
            self.now += size
            self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(number)
            self._owners[address] -= 1
            if not self._owners[address]:
                self.now -= size

        weakref.finalize(tensor, gone)


def adapters(count: int) -> list[sm.Adapter]:
    """Of one layer."""
    generator, (m, n) = torch.Generator().manual_seed(0), SHAPE
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q"]}
    return [
        sm.Adapter.from_state_dict(
            config,
            {
                "base_model.model.q.lora_A.weight": torch.randn(RANK, n, generator=generator),
                "base_model.model.q.lora_B.weight": torch.randn(m, RANK, generator=generator),
            },
            label=f"client{k}",
        )
        for k in range(count)
    ]


def peak_of(method: Callable[..., Any], count: int) -> int:
    """Bytes at most in a merge to rank 8, in which pre-passes hold nothing, and what looks at some
    rows at a time looks at one.
    """
    some = adapters(count)
    room, paired, entries = stream._HELD, report.PAIRED, entrywise._ENTRIES
    stream._HELD, report.PAIRED, entrywise._ENTRIES = 0, 1, 1000  # type: ignore[misc]
    gc.collect()
    try:
        with Held() as held:
            merged = sm.merge(some, method=method, rank=8, progress=False)
            for _ in merged.run.stored():
                pass
    finally:
        stream._HELD, report.PAIRED, entrywise._ENTRIES = room, paired, entries  # type: ignore[misc]
    return held.peak


def matrices_per_adapter(method: Callable[..., Any], few: int = 40, many: int = 48) -> float:
    """By how many float32 matrices of the layer the peak grows with every adapter more, where the
    ranks of `few` already sum to more than its sides.
    """
    grown = peak_of(method, many) - peak_of(method, few)
    return grown / (many - few) / (4 * SHAPE[0] * SHAPE[1])
