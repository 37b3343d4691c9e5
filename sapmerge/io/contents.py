"""What the tensors of one adapter are, once every name, shape and value was checked."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sapmerge.core.updates import Update
from sapmerge.errors import (
    AdapterFormatError,
    LimitExceededError,
    MethodError,
    NonFiniteError,
    SapmergeWarning,
)
from sapmerge.io.config import Settings
from sapmerge.io.consistency import Checks
from sapmerge.io.files import Limits, Weights, shown
from sapmerge.io.keys import sort_tensors
from sapmerge.io.kinds.reading import BaseMatrix, Reading
from sapmerge.io.kinds.vectors import Vector, replaced_biases, token_rows
from sapmerge.io.modules import Module, SavedTensor, made_of, moved_biases
from sapmerge.io.names import canonical
from sapmerge.io.pairs import make_pairs

__all__ = ["Contents", "sort_contents"]

_LARGEST = torch.finfo(torch.float32).max
# Factors whose norms differ by more hide their size from methods that look at one factor. Below the
# floor a factor
# is zero for all purposes, and the ratio says nothing.
_BALANCE, _FLOOR = 1e3, 1e-30


@dataclass(frozen=True)
class Contents:
    """Modules and saved tensors by canonical name,
    and the tensors of the file that they are made of.

    Args:
        readings: module -> how its update is made.
        saved: tensors of modules that were saved whole.
        vectors: what is neither: biases and rows of embeddings.
        copies: module -> copies of its weight in the base, which nobody needs.
        twice: pairs of tensors that must hold the same values.
        tensors: module, saved tensor or vector -> names in the file.
    """

    modules: dict[str, Module]
    readings: dict[str, Reading]
    saved: dict[str, SavedTensor]
    vectors: dict[str, Vector]
    copies: dict[str, tuple[str, ...]]
    twice: tuple[tuple[str, str], ...]
    tensors: dict[str, tuple[str, ...]]
    weights: Weights

    def check_values(self, source: str) -> None:
        """Nothing is NaN or infinite, products included; what is odd gets a warning.
        Needs `weights.facts`.
        """
        self.check_finite(source)
        self._warn_of_oddities()

    def check_finite(self, source: str) -> None:
        """Nothing is NaN or infinite, products included. Needs `weights.facts`."""
        weights = self.weights
        for name, facts in weights.facts.items():
            if facts.bad:
                raise NonFiniteError(
                    f"{weights.where}: tensor {shown(name)} has {facts.bad} values that are NaN or "
                    "infinite in float32"
                )
        for first, second in self.twice:
            if weights.facts[first].digest != weights.facts[second].digest:
                raise AdapterFormatError(
                    f"{weights.where}: tensors {shown(first)} and {shown(second)} are one bias, "
                    "with different values"
                )
        for name, module in self.modules.items():
            if self.readings[name].bound(weights.facts) > _LARGEST and module.needs_base is None:
                self.update(name, source, None)

    def _warn_of_oddities(self) -> None:
        weights, odd = self.weights, list[tuple[float, str]]()
        for name, reading in self.readings.items():
            a, b = (weights.facts[tensor].norm for tensor in reading.tensors[:2])
            if min(a, b) > _FLOOR and not 1 / _BALANCE <= a / b <= _BALANCE:
                odd.append((a / b, name))
        if odd:
            ratio, name = odd[0]
            _warn(
                f"{weights.where}: the factors of {len(odd)} modules differ in norm by more than "
                f"{_BALANCE:g} (module {shown(name)}: |A| / |B| = {ratio:.3g}); methods that look "
                "at single factors balance them first"
            )
        double = next(
            (name for name, entry in weights.entries.items() if entry.dtype == torch.float64), None
        )
        if double is not None:
            _warn(
                f"{weights.where}: tensor {shown(double)} is float64; computations round it to "
                "float32"
            )

    def update(self, name: str, source: str, base: BaseMatrix | None) -> Update:
        """The update of one module in float32, every scaling folded in."""
        module, reading = self.modules[name], self.readings[name]
        if module.needs_base is not None and base is None:
            raise MethodError(
                f"adapter {shown(source)}, module {shown(name)}: {module.needs_base}, so the base "
                "model is needed: merge(adapters, model=model)"
            )
        update = reading.update(self.weights, base)
        # Written so that NaN fails too.
        fine = reading.bound(self.weights.facts) <= _LARGEST or update.norm() <= _LARGEST
        if not fine:
            raise NonFiniteError(
                f"adapter {shown(source)}, module {shown(name)}: the update (scaling "
                f"{module.scaling:g} times lora_B lora_A) is not finite in float32"
            )
        return update

    def sharing(self, other: Contents) -> Contents:
        """The same, with the other's tables where they are equal; see `Adapter.sharing`."""
        mine, theirs = self.weights, other.weights
        if mine.entries == theirs.entries and mine.facts.keys() == theirs.facts.keys():
            mine.entries = theirs.entries
            mine.facts = {name: mine.facts[name] for name in theirs.facts}
        tables = ("modules", "readings", "saved", "vectors", "copies", "twice", "tensors")
        alike = {name for name in tables if getattr(self, name) == getattr(other, name)}
        return replace(self, **{name: getattr(other, name) for name in alike})

    def digest(self) -> str:
        """sha256 of all that decides about the update. Needs `weights.facts`."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            module = self.modules.get(name)
            scaling = module and (module.kind, module.scaling.hex(), *self.readings[name].mark())
            if name in self.vectors:
                scaling = self.vectors[name].mark()
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
    places, checks = sort_tensors(weights, settings), Checks(settings, where, limits)
    pairs = make_pairs(weights, places.groups, settings, checks.selects, limits, where)
    copies = {canonical(module, config): names for module, names in places.copies.items()}
    contents = Contents({}, {}, {}, {}, copies, places.twice, {}, weights)
    scalings = checks.scalings(pairs)
    # Every expert is a layer: a few rows of a bank each, and many times their bytes in memory.
    experts = sum(
        pair.rank // scaling.rank
        for pair, scaling in zip(pairs, scalings, strict=True)
        if pair.kind == "parameter"
    )
    if experts > limits.tensors:
        raise LimitExceededError(
            f"{weights.where}: has factors for {experts} experts; the limit is {limits.tensors}: "
            "Limits(tensors=...)"
        )
    for module, reading in made_of(pairs, scalings, settings, config, where):
        if module.name in contents.modules:
            raise AdapterFormatError(
                f"{weights.where}: tensors {shown(contents.tensors[module.name][0])} and "
                f"{shown(reading.tensors[0])} belong to one module"
            )
        contents.modules[module.name], contents.readings[module.name] = module, reading
        contents.tensors[module.name] = reading.tensors
    for spelled, tensor in places.saved.items():
        module, _, last = spelled.rpartition(".")
        name = f"{canonical(module, config)}.{last}"
        if name in contents.tensors:
            raise AdapterFormatError(
                f"{weights.where}: tensor {shown(tensor)} is there in two spellings"
            )
        contents.saved[name] = SavedTensor(
            spelled, weights.entries[tensor].dtype, weights.entries[tensor].shape
        )
        contents.tensors[name] = (tensor,)
    vectors = [
        *moved_biases(weights, pairs, scalings),
        *replaced_biases(weights, places.biases),
        *token_rows(weights, places.tokens, settings.tokens, where),
    ]
    for vector in vectors:
        module, _, leaf = vector.spelled.rpartition(".")
        named = replace(vector, name=f"{canonical(module, config)}.{leaf}")
        if named.key in contents.vectors:
            raise AdapterFormatError(
                f"{weights.where}: tensor {shown(vector.tensor)} is there in two spellings"
            )
        contents.vectors[named.key] = named
        contents.tensors[named.key] = (vector.tensor,)
    if copies:
        _warn(
            f"{weights.where}: copies of the base's weight of {shown(sorted(copies))} are ignored; "
            "save_pretrained(..., save_embedding_layers=False) stores none"
        )
    return contents


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=2)
