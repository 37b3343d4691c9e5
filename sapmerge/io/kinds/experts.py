"""LoRA on parameters (`target_parameters`): mixture of experts,
one B A per expert in one pair of tensors.

PEFT wraps the module that owns a three-dimensional parameter (experts, out, in) in a
`ParamWrapper`. A second parameter of the same module is wrapped around the first, so the file has
"experts.base_layer.lora_A" for the first and "experts.lora_A" for the last one,
in the order in which the module defines its parameters.

The same update has been written in three layouts that shapes cannot tell apart:

    peft >= 0.19.1   A (E r, in), rows by expert; B (out, r E), columns by rank first:  D_e = B_e
    A_e
    older peft       the parameter was read as (experts, in, out):                      D_e = (B_e
    A_e)^T
    "expert_major"   columns of B by expert first; a trainer says so in `lora_B_layout`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch

from sapmerge.core.updates import LowRank
from sapmerge.errors import AdapterConfigError
from sapmerge.io.files import Weights, shown
from sapmerge.io.kinds.reading import BaseMatrix, product
from sapmerge.io.measuring import Facts

__all__ = [
    "WRITTEN_BY",
    "Bank",
    "ExpertFactors",
    "Layout",
    "layout_of",
    "order_of",
    "packed",
    "parameters_of",
]

WRITTEN_BY = "0.19.1"
"""The oldest PEFT that reads the banks we write; the output's `peft_version`."""

# Modules of transformers define their expert parameters in this order (biases behind their
# weights).
_ORDER = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "w1",
    "v1",
    "gate_proj",
    "up_proj",
    "w2",
    "down_proj",
    "down_proj_bias",
)
# Their parameters are stored (experts, in, out) and say so (`is_transposed`): older PEFT read them
# as newer does.
_TRANSPOSED = re.compile(r"\bgpt-oss|\baria\b|\baria(?:for|text)|privacy-?filter")


class Layout(NamedTuple):
    """How the factors of all experts lie in two tensors."""

    flipped: bool = False
    expert_major: bool = False


def layout_of(config: Mapping[str, object], where: str) -> Layout:
    """The layout that a config tells, by PEFT's version and by the marker of trainers.

    Raises:
        AdapterConfigError: it says nothing, or a marker that nobody knows.
    """
    marker = config.get("lora_B_layout")
    if marker is not None:
        if marker not in ("expert_major", "rank_major"):
            raise AdapterConfigError(
                f"{where}: lora_B_layout is {shown(marker)}, expected 'expert_major' or "
                "'rank_major'"
            )
        return Layout(expert_major=marker == "expert_major")
    version = config.get("peft_version")
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version) if isinstance(version, str) else None
    if numbers is None:
        raise AdapterConfigError(
            f"{where}: target_parameters without peft_version: PEFT before 0.19.1 stored experts "
            "in another layout "
            f"of the same shapes; add the version that wrote the file to adapter_config.json, e.g. "
            f'"peft_version": "{WRITTEN_BY}"'
        )
    number = (int(numbers[1]), int(numbers[2]), int(numbers[3] or 0))
    if number >= (0, 19, 1):
        return Layout()
    return Layout(flipped=number >= (0, 19, 0) or not _TRANSPOSED.search(_family(config)))


def _family(config: Mapping[str, object]) -> str:
    """What the config says about the class of the base."""
    auto = config.get("auto_mapping")
    written = auto.get("base_model_class") if isinstance(auto, Mapping) else ""  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return (
        f"{config.get('base_model_name_or_path')} {written}".lower()
        .replace("_", "-")
        .replace("gptoss", "gpt-oss")
    )


def parameters_of(module: str, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parameters of a module that `target_parameters` names:
    those with the module's name, and bare ones.

    Args:
        module: its path.
        targets: "mlp.experts.gate_up_proj", or just "gate_up_proj".
    """
    qualified, bare = list[str](), list[str]()
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if not owner:
            bare.append(parameter)
        elif f".{module}".endswith(f".{owner}"):
            qualified.append(parameter)
    return sorted(set(qualified)), sorted(set(bare) - set(qualified))


def order_of(parameters: Sequence[str], module: str, where: str) -> list[str]:
    """The parameters of one module in the order in which PEFT wraps them, the innermost first.

    Raises:
        AdapterConfigError: there are several, and the order is not known.
    """
    unknown = [name for name in parameters if name not in _ORDER]
    if len(parameters) > 1 and unknown:
        raise AdapterConfigError(
            f"{where}: target_parameters names {shown(sorted(parameters))} of module "
            f"{shown(module)}; in which order "
            f"its model defines {shown(unknown)} is not known, so the tensors cannot be told apart"
        )
    return sorted(parameters, key=lambda name: _ORDER.index(name) if name in _ORDER else 0)


class Bank:
    """Reads two tensors for all experts at once: each is read and verified whole,
    and the experts come one by one.

    What was read is held until it was asked for once per expert,
    which is how often a pass over the layers asks.
    """

    def __init__(self, a: str, b: str) -> None:
        self.tensors = a, b
        self._lock = Lock()
        self._left = 0
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return Bank, self.tensors

    def read(self, weights: Weights, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B. They are let go when they were asked for as often as there are experts."""
        with self._lock:
            held = self._held
            if held is None:
                held = weights.read(self.tensors[0]), weights.read(self.tensors[1])
                self._held, self._left = held, experts
            self._left -= 1
            if self._left <= 0:
                self._held = None
            return held


@dataclass(frozen=True)
class ExpertFactors:
    """The B A of one expert, a slice of the tensors that hold all of them.

    Args:
        bank: reads the tensors.
        experts: how many there are.
        expert: which one.
        rank: of one expert.
    """

    bank: Bank
    experts: int
    expert: int
    rank: int
    scaling: float
    layout: Layout

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.bank.tensors

    @property
    def needs_base(self) -> str | None:
        return None

    def update(self, weights: Weights, base: BaseMatrix | None = None) -> LowRank:
        stored_a, stored_b = self.bank.read(weights, self.experts)
        a = stored_a.reshape(self.experts, self.rank, -1)[self.expert].float()
        if self.layout.expert_major:
            b = stored_b.reshape(stored_b.shape[0], self.experts, self.rank)[:, self.expert].float()
        else:
            b = stored_b.reshape(stored_b.shape[0], self.rank, self.experts)[
                :, :, self.expert
            ].float()
        left, right = (a.T, b.T) if self.layout.flipped else (b, a)
        return product(left.contiguous(), right.contiguous(), self.scaling)

    def bound(self, facts: Mapping[str, Facts]) -> float:
        a, b = (facts[name].norm for name in self.tensors)
        return abs(self.scaling) * max(a, b, a * b)

    def reach(self, facts: Mapping[str, Facts]) -> float:
        a, b = (facts[name].norm for name in self.tensors)
        return abs(self.scaling) * a * b

    def mark(self) -> tuple[object, ...]:
        return ("expert", self.expert, self.experts, *self.layout)


def packed(experts: Sequence[LowRank], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (E r, in) and B (out, r E) of all experts, as PEFT has them from 0.19.1 on;
    padded with zeros to `rank`.
    """
    a = torch.stack([_padded(update.A, rank, 0) for update in experts])
    b = torch.stack([_padded(update.B, rank, 1) for update in experts])
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _padded(factor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    missing = rank - factor.shape[dim]
    if missing == 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)
