"""Exact selection: the k-th value of a large tensor, and of all tensors of an adapter,
without sorting them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Cut", "Stream", "at_least_kth", "count_true", "kth_largest", "streamed_kth"]

Stream = Callable[[], Iterable[tuple[str, Tensor]]]
"""Call it to iterate over (adapter, values of one tensor); it is called once per pass."""

_SAMPLE = 1 << 15
_BLOCK = 1 << 16  # values that fit into a cache, with two masks
_BINS = 1 << 16


def at_least_kth(flat: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """The value at a place of the sorted values, and which values reach it.
    On the CPU numpy is ten times as fast.
    """
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        values = flat.detach().numpy()
        cut = _kth(values, place)
        return flat.new_tensor(cut), torch.from_numpy(values >= cut)  # pyright: ignore[reportUnknownMemberType]
    cut = torch.kthvalue(flat, place + 1).values
    return cut, flat >= cut


def count_true(mask: Tensor) -> int:
    """How many entries of a mask are not 0. On the CPU numpy is five times as fast."""
    if mask.device.type == "cpu" and mask.dtype == torch.bool:
        return int(np.count_nonzero(mask.numpy()))
    return int(torch.count_nonzero(mask))


def _kth(values: npt.NDArray[np.float64], place: int) -> float:
    """`np.partition(values, place)[place]`, four times as fast: a sample brackets it, and only what
    lies between the brackets is partitioned. A sample that is not like the rest costs time,
    not exactness.

    Source: Floyd and Rivest, "Expected time bounds for selection",
    https://doi.org/10.1145/360680.360691
    """
    step = values.size // _SAMPLE
    if step > 1:
        # an odd step: it goes through all columns of most matrices
        sample = np.sort(values[:: step | 1])
        share = place / values.size
        middle, slack = share * sample.size, 4 * math.sqrt(share * (1 - share) * sample.size) + 2
        low, high = (
            sample[max(int(middle - slack), 0)],
            sample[min(int(middle + slack), sample.size - 1)],
        )
        rest, above = place, list[npt.NDArray[np.float64]]()
        for start in range(0, values.size, _BLOCK):
            block = values[start : start + _BLOCK]
            reach = block >= low
            rest -= block.size - int(np.count_nonzero(reach))
            above.append(block[np.logical_and(reach, block <= high, out=reach)])
        between = np.concatenate(above)
        del above
        if 0 <= rest < between.size:
            between.partition(rest)
            return between[rest]
    return np.partition(values, place)[place]


@dataclass(frozen=True)
class Cut:
    """Where the k-th largest value of an adapter lies.

    Args:
        order: its `_ordered_bits`, as a float32.
        rest: its place among the values that round to it, 1 for the largest.
    """

    order: int
    rest: int

    @property
    def value(self) -> float:
        """The float32."""
        bits = self.order - (1 << 31) if self.order >= 1 << 31 else -1 - self.order
        return float(torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32))


def streamed_kth(values: Stream, position: Callable[[int], int]) -> dict[str, Cut]:
    """The `position(n)`-th largest (1: the largest) of the n values of each adapter over all its
    layers, in float32.

    Two passes: one counts the values by their upper 16 bits,
    the other those in the bin that matters by their lower.

    Args:
        values: call it to iterate over (adapter, values of one tensor).
        position: the number of an adapter's values -> the place that is wanted.
    """
    high: dict[str, Tensor] = {}
    for adapter, tensor in values():
        more = torch.bincount(_ordered_bits(tensor) >> 16, minlength=_BINS)
        high[adapter] = high[adapter] + more if adapter in high else more
    tops = {
        adapter: _bin_of(counts, position(int(counts.sum()))) for adapter, counts in high.items()
    }
    low = {adapter: torch.zeros(_BINS, dtype=torch.int64) for adapter in tops}
    for adapter, tensor in values():
        bits = _ordered_bits(tensor)
        low[adapter] += torch.bincount(
            bits[(bits >> 16) == tops[adapter][0]] & 0xFFFF, minlength=_BINS
        )
    cuts: dict[str, Cut] = {}
    for adapter, (top, among) in tops.items():
        bottom, rest = _bin_of(low[adapter], among)
        cuts[adapter] = Cut((top << 16) | bottom, rest)
    return cuts


def kth_largest(values: Stream, position: Callable[[int], int]) -> dict[str, float]:
    """As `streamed_kth`, in the dtype of the values:
    a third pass looks at the few that round to that float32.
    """
    cuts = streamed_kth(values, position)
    same: dict[str, list[Tensor]] = {adapter: [] for adapter in cuts}
    for adapter, tensor in values():
        alike = _ordered_bits(tensor) == cuts[adapter].order
        same[adapter].append(tensor.detach().flatten().cpu()[alike].double())
    return {
        adapter: float(torch.cat(cut).sort(descending=True).values[cuts[adapter].rest - 1])
        for adapter, cut in same.items()
    }


def _ordered_bits(values: Tensor) -> Tensor:
    """float32 -> integers in [0, 2^32) in
    the same order: the bit pattern, with negative numbers reversed.
    """
    bits = (
        values.detach()
        .flatten()
        .float()
        .cpu()
        .add(0.0)
        .contiguous()
        .view(torch.int32)
        .to(torch.int64)
    )
    return torch.where(bits >= 0, bits + (1 << 31), -1 - bits)


def _bin_of(counts: Tensor, kept: int) -> tuple[int, int]:
    """The highest bin at or above which at least `kept` values lie,
    and how many of them must come from that bin.
    """
    from_top = torch.cumsum(counts.flip(0), 0)
    position = int(torch.searchsorted(from_top, torch.tensor(kept)))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, kept - above
