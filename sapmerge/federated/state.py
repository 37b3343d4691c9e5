"""`MergeState`: the running weighted sum of adapters.
It adds, subtracts and combines; no adapter is read twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sapmerge.core.lowrank import concatenate, truncate
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import IncompatibleAdaptersError, MethodError, warn
from sapmerge.federated.contract import Slot
from sapmerge.io.adapter import Adapter
from sapmerge.merging.inputs import check_numbers, resolve_weights

__all__ = ["MergeState", "check_slot", "plain_slots", "total_of", "weight_of"]


@dataclass(frozen=True, eq=False)
class MergeState:
    """sum_k w_k D_k per layer, and who is in it. Immutable: every operation returns another state.

    A layer's sum is kept as factors while they are smaller than the matrix (sum r < m n / (m + n)),
    then as a matrix. It serves the rules that are sums: `mean`, task arithmetic, uploads pruned by
    their clients; modules saved whole are no part of it. A float32 state agrees with a fresh merge
    to about 1e-6 of its norm, a float64 one to 1e-12; its bits depend on the order of operations,
    so a result that must not depend on the order of arrival is merged afresh (`Inbox.merge`).

    Args:
        dtype: of the sums, float32 or float64.
        members: content digest -> weight.

    Raises:
        MethodError: another dtype.

    Example:
        >>> import sapmerge as sm
        >>> state = sm.federated.MergeState()
        >>> for folder in ("art", "sketch"):
        ...     state = state.plus(sm.Adapter.load(folder), weight=100)
        >>> mean = state.mean()
    """

    dtype: torch.dtype = torch.float32
    members: Mapping[str, float] = field(default_factory=dict[str, float])
    sums: Mapping[str, Update] = field(default_factory=dict[str, Update], repr=False)
    slots: Mapping[str, Slot] = field(default_factory=dict[str, Slot], repr=False)

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise MethodError(f"a state is of float32 or float64; got {self.dtype!r}")

    def plus(self, adapter: Adapter, weight: float = 1.0) -> MergeState:
        """With one adapter more.

        Raises:
            MethodError: it is in the state already, or the weight is not a finite number.
            IncompatibleAdaptersError: a module has another shape.
        """
        if adapter.digest in self.members:
            raise MethodError(
                f"adapter {adapter.label!r} is in the state already; take it out first (without)"
            )
        weight = weight_of(adapter, weight)
        return self._moved(adapter, weight, {**self.members, adapter.digest: weight})

    def without(self, adapter: Adapter) -> MergeState:
        """Without one of its adapters.

        Raises:
            MethodError: it is not in the state.
        """
        if adapter.digest not in self.members:
            raise MethodError(f"adapter {adapter.label!r} is not in the state")
        rest = {
            digest: weight for digest, weight in self.members.items() if digest != adapter.digest
        }
        if not rest:
            return MergeState(self.dtype)
        return self._moved(adapter, -self.members[adapter.digest], rest)

    def replacing(self, adapter: Adapter, weight: float) -> MergeState:
        """With the adapter at this weight, whether it was in the state or not.

        Raises:
            MethodError: the weight is not a finite number.
        """
        weight = weight_of(adapter, weight)
        change = weight - self.members.get(adapter.digest, 0.0)
        return self._moved(adapter, change, {**self.members, adapter.digest: weight})

    def combined(self, other: MergeState) -> MergeState:
        """Two states of different adapters as one.

        Raises:
            MethodError: an adapter is in both.
            IncompatibleAdaptersError: a module has another shape.
        """
        both = set(self.members) & set(other.members)
        if both:
            raise MethodError(f"{len(both)} adapters are in both states, e.g. {min(both)[:16]}")
        sums = dict(self.sums)
        for name, update in other.sums.items():
            check_slot(self.slots, name, other.slots[name], "the state", "the other state")
            sums[name] = _sum(sums.get(name), update.to(dtype=self.dtype), 1.0)
        return MergeState(
            self.dtype, {**self.members, **other.members}, sums, {**self.slots, **other.slots}
        )

    def _moved(self, adapter: Adapter, weight: float, members: Mapping[str, float]) -> MergeState:
        sums, slots = dict(self.sums), dict(self.slots)
        for name, slot in plain_slots(adapter).items():
            check_slot(self.slots, name, slot, "the state", repr(adapter.label))
            slots[name] = slot
            if weight:
                sums[name] = _sum(sums.get(name), adapter.update(name).to(dtype=self.dtype), weight)
        return MergeState(self.dtype, dict(sorted(members.items())), sums, slots)

    def sum(self) -> dict[str, Update]:
        """Module -> sum_k w_k D_k, sorted."""
        return dict(sorted(self.sums.items()))

    def mean(self) -> dict[str, Update]:
        """Module -> sum_k w_k D_k / sum_k w_k, sorted.

        Raises:
            MethodError: nobody is in the state, or the weights sum to zero.
        """
        total = total_of(self.members, "the state")
        return {name: update.scaled(1 / total) for name, update in self.sum().items()}

    def adapter(
        self, rank: int | float | str = 16, label: str = "mean", base_model: str | None = None
    ) -> Adapter:
        """The mean as one adapter in memory, which `merge([adapter], method=mean())`
        writes to disk.

        Args:
            rank: a cap, a share of energy in (0, 1), or "exact".
            label: of the adapter.
            base_model: the name of the base for its config.

        Warns below 90 % of the mean's energy, as a merge does.

        Raises:
            MethodError: no such rank; nobody is in the state, or the weights sum to zero.
        """
        check_numbers(1.0, rank)
        kept_energy = whole_energy = 0.0
        ranks: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        for name, update in self.mean().items():
            kept, share = truncate(update, rank, 1)
            energy = update.norm() ** 2
            kept_energy, whole_energy = kept_energy + share * energy, whole_energy + energy
            B, A = (
                (kept.B, kept.A)
                if kept.rank
                else (kept.B.new_zeros(kept.shape[0], 1), kept.A.new_zeros(1, kept.shape[1]))
            )
            ranks[name], slot = A.shape[0], self.slots[name]
            if slot.kind == "embedding":
                tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"] = A, B
                continue
            ones = (1,) * max(0, len(slot.kernel) - 1)
            tensors[f"{name}.lora_A.weight"] = (
                A.reshape(A.shape[0], *slot.kernel) if slot.kernel else A
            )
            tensors[f"{name}.lora_B.weight"] = B.reshape(*B.shape, *ones)
        if kept_energy < 0.9 * whole_energy:
            warn(
                f"at rank={rank!r} the adapter {label!r} keeps {kept_energy / whole_energy:.0%} of "
                'the mean\'s energy; a larger rank keeps more, e.g. rank=0.95 or rank="exact"'
            )
        pattern = {"^" + re.escape(name): found for name, found in ranks.items()}
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": base_model,
            "r": max(ranks.values()),
            "lora_alpha": max(ranks.values()),
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(ranks),
        }
        named = {
            f"base_model.model.{name}": tensor.float().contiguous()
            for name, tensor in tensors.items()
        }
        return Adapter.from_state_dict(config, named, label=label)

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and notes (JSON) from which `restored` makes the state again."""
        tensors: dict[str, Tensor] = {}
        for name, update in self.sums.items():
            if isinstance(update, Dense):
                tensors[f"{name}:D"] = update.matrix
            else:
                tensors[f"{name}:B"], tensors[f"{name}:A"] = update.B, update.A
        slots = {name: [slot.kind, slot.shape, slot.kernel] for name, slot in self.slots.items()}
        return tensors, {"dtype": str(self.dtype), "members": dict(self.members), "slots": slots}

    @staticmethod
    def restored(found: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None) -> MergeState:
        """The state that `kept` described; an empty one for None."""
        if found is None:
            return MergeState()
        tensors, notes = found
        slots = {
            name: Slot(kind, (m, n), tuple(kernel))
            for name, (kind, (m, n), kernel) in notes["slots"].items()
        }
        sums: dict[str, Update] = {
            name: Dense(tensors[f"{name}:D"])
            if f"{name}:D" in tensors
            else LowRank(tensors[f"{name}:B"], tensors[f"{name}:A"])
            for name in slots
            if f"{name}:D" in tensors or f"{name}:B" in tensors
        }
        return MergeState(
            getattr(torch, notes["dtype"].removeprefix("torch.")), notes["members"], sums, slots
        )


def check_slot(slots: Mapping[str, Slot], name: str, slot: Slot, where: str, who: str) -> None:
    """Refuse a module that is another one in what is there already.

    Raises:
        IncompatibleAdaptersError: it has another kind or shape.
    """
    known = slots.get(name, slot)
    if known != slot:
        raise IncompatibleAdaptersError(
            f"module {name!r} is {known.kind} {known.shape} in {where}, {slot.kind} "
            f"{slot.shape} in {who}"
        )


def weight_of(adapter: Adapter, weight: float) -> float:
    """A weight as a finite number.

    Raises:
        MethodError: it is none.
    """
    return resolve_weights([weight], [adapter])[0]


def total_of(members: Mapping[str, float], where: str) -> float:
    """The sum of the weights, by which a mean divides.

    Raises:
        MethodError: there is nobody, or the weights sum to zero.
    """
    total = sum(members.values())
    if abs(total) <= 1e-12 * sum(map(abs, members.values())):
        raise MethodError(f"{where} has no mean: it is empty, or its weights sum to zero")
    return total


def plain_slots(adapter: Adapter) -> dict[str, Slot]:
    """Module -> what it is, of an adapter of plain LoRA.

    Raises:
        MethodError: it changes something that cannot be summed.
    """
    plain = ("linear", "conv", "embedding")
    odd = next((m.name for m in adapter.modules.values() if m.kind not in plain), None)
    if adapter.vectors or odd is not None:
        what = odd or next(iter(adapter.vectors.values())).name
        raise MethodError(
            f"a state sums plain LoRA; adapter {adapter.label!r} changes {what!r}: use merge"
        )
    return {
        name: Slot(m.kind, m.shape, tuple(m.a_shape[1:]) if m.kind == "conv" else ())
        for name, m in adapter.modules.items()
    }


def _sum(total: Update | None, update: Update, weight: float) -> Update:
    """total + weight * update, as factors while they are small."""
    if total is None:
        return update.scaled(weight)
    m, n = total.shape
    if isinstance(total, LowRank) and isinstance(update, LowRank):
        if (total.rank + update.rank) * (m + n) < m * n:
            return concatenate([total, update], [1.0, weight])
        return Dense(total.dense().addmm_(update.B, update.A, alpha=weight))
    matrix = total.dense().clone()
    if isinstance(update, LowRank):
        return Dense(matrix.addmm_(update.B, update.A, alpha=weight))
    return Dense(matrix.add_(update.matrix, alpha=weight))
