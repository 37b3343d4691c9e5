"""What the tensors of one adapter are, once every name, shape and value was checked."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sapmerge.core.linalg import factor_inner
from sapmerge.core.updates import LowRank
from sapmerge.errors import AdapterFormatError, NonFiniteError, SapmergeWarning
from sapmerge.io.config import Settings
from sapmerge.io.consistency import check
from sapmerge.io.files import Limits, Weights, shown
from sapmerge.io.keys import sort_tensors
from sapmerge.io.names import canonical

__all__ = ["Contents", "Module", "SavedTensor", "sort_contents"]

_LARGEST = torch.finfo(torch.float32).max
# Factors whose norms differ by more hide their size from methods that look at one factor. Below the floor a factor
# is zero for all purposes, and the ratio says nothing.
_BALANCE, _FLOOR = 1e3, 1e-30


@dataclass(frozen=True)
class Module:
    """One adapted weight matrix of one adapter.

    Args:
        name: without "base_model.model.", in transformers 5 spelling where that can be told.
        spelled: as the file spells it.
        kind: "linear", "conv" or "embedding".
        shape: (m, n) of the update B @ A; conv: n = in * kernel; embedding: m = its dimension, n = its rows.
        rank: of the tensors.
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        dtype: of the factors as stored.
        a_shape, b_shape: of the factors as stored.
    """

    name: str
    spelled: str
    kind: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scaling: float
    dtype: torch.dtype
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a module that was saved whole (`modules_to_save`)."""

    spelled: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """Modules and saved tensors by canonical name, and the tensors of the file that they are made of."""

    modules: dict[str, Module]
    saved: dict[str, SavedTensor]
    tensors: dict[str, tuple[str, ...]]
    weights: Weights

    def check_values(self, source: str) -> None:
        """Nothing is NaN or infinite, products included; what is odd gets a warning. Needs `weights.facts`."""
        self.check_finite(source)
        self._warn_of_oddities()

    def check_finite(self, source: str) -> None:
        """Nothing is NaN or infinite, products included. Needs `weights.facts`."""
        weights = self.weights
        for name, facts in weights.facts.items():
            if facts.bad:
                raise NonFiniteError(
                    f"{weights.where}: tensor {shown(name)} has {facts.bad} values that are NaN or infinite in float32"
                )
        for name, module in self.modules.items():
            if not self._bounded(module):
                self.update(name, source)

    def _warn_of_oddities(self) -> None:
        weights, odd = self.weights, list[tuple[float, str]]()
        for name in self.modules:
            a, b = (weights.facts[tensor].norm for tensor in self.tensors[name])
            if min(a, b) > _FLOOR and not 1 / _BALANCE <= a / b <= _BALANCE:
                odd.append((a / b, name))
        if odd:
            ratio, name = odd[0]
            _warn(
                f"{weights.where}: the factors of {len(odd)} modules differ in norm by more than {_BALANCE:g} (module "
                f"{shown(name)}: |A| / |B| = {ratio:.3g}); methods that look at single factors balance them first"
            )
        double = next((name for name, entry in weights.entries.items() if entry.dtype == torch.float64), None)
        if double is not None:
            _warn(f"{weights.where}: tensor {shown(double)} is float64; computations round it to float32")

    def _bounded(self, module: Module) -> bool:
        """Whether the norms of the factors tell that the product is finite; else it has to be formed."""
        a, b = (self.weights.facts[tensor].norm for tensor in self.tensors[module.name])
        return abs(module.scaling) * max(b, a * b) <= _LARGEST

    def update(self, name: str, source: str) -> LowRank:
        """B @ A of one module in float32, scaling folded into B."""
        module = self.modules[name]
        a_name, b_name = self.tensors[name]
        a = self.weights.read(a_name).float().reshape(module.rank, module.shape[1])
        b = self.weights.read(b_name).float().reshape(module.shape[0], module.rank) * module.scaling
        # Written so that NaN fails too.
        if not (self._bounded(module) or factor_inner(b, a, b, a) <= _LARGEST**2):
            raise NonFiniteError(
                f"adapter {shown(source)}, module {shown(name)}: the update (scaling {module.scaling:g} times "
                "lora_B lora_A) is not finite in float32"
            )
        return LowRank(b, a)

    def digest(self) -> str:
        """sha256 of all that decides about the update. Needs `weights.facts`."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            module = self.modules.get(name)
            scaling = module and (module.kind, module.scaling.hex())
            entries = [self.weights.entries[tensor] for tensor in self.tensors[name]]
            kinds = [(entry.shape, str(entry.dtype)) for entry in entries]
            values = [self.weights.facts[tensor].digest for tensor in self.tensors[name]]
            digest.update(repr((name, scaling, kinds, values)).encode())
        return digest.hexdigest()


def sort_contents(
    weights: Weights, settings: Settings, config: Mapping[str, object], where: str, limits: Limits
) -> Contents:
    """Give every tensor its place, from headers and config alone; no value is read.

    Args:
        where: how messages name the config.
    """
    found = sort_tensors(weights, settings.saved, settings.heads, limits)
    scalings = check(found.pairs, settings, where, limits)
    contents = Contents({}, {}, {}, weights)
    named = [(canonical(pair.spelled, config), pair) for pair in found.pairs]
    for name, pair in sorted(named, key=lambda item: item[0]):
        if name in contents.modules:
            raise AdapterFormatError(
                f"{weights.where}: tensors {shown(contents.tensors[name][0])} and {shown(pair.a)} belong to one module"
            )
        contents.modules[name] = Module(
            name=name,
            spelled=pair.spelled,
            kind=pair.kind,
            shape=pair.shape,
            rank=pair.rank,
            alpha=scalings[pair.spelled].alpha,
            scaling=scalings[pair.spelled].factor,
            dtype=pair.dtype,
            a_shape=pair.a_shape,
            b_shape=pair.b_shape,
        )
        contents.tensors[name] = pair.a, pair.b
    for spelled, tensor in found.saved.items():
        module, _, last = spelled.rpartition(".")
        name = f"{canonical(module, config)}.{last}"
        if name in contents.tensors:
            raise AdapterFormatError(f"{weights.where}: tensor {shown(tensor)} is there in two spellings")
        contents.saved[name] = SavedTensor(spelled, weights.entries[tensor].dtype, weights.entries[tensor].shape)
        contents.tensors[name] = (tensor,)
    return contents


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=2)
