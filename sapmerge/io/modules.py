"""The weight matrices that an adapter changes, and how the update of each is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapmerge.io.config import Settings
from sapmerge.io.consistency import Scaling
from sapmerge.io.files import Weights
from sapmerge.io.kinds.attention import TWICE
from sapmerge.io.kinds.dora import Dora
from sapmerge.io.kinds.experts import Bank, ExpertFactors, Layout, layout_of
from sapmerge.io.kinds.reading import Factors, Reading
from sapmerge.io.kinds.start import Started
from sapmerge.io.kinds.vectors import Vector
from sapmerge.io.names import canonical
from sapmerge.io.pairs import Pair

__all__ = ["BaseWeights", "Module", "SavedTensor", "made_of", "moved_biases"]


@dataclass(frozen=True)
class Module:
    """One adapted weight matrix of one adapter.

    Args:
        name: without "base_model.model.", in transformers 5 spelling where that can be told; of one
            expert of a parameter "<module>.<parameter>.<number>".
        spelled: the path of the module that PEFT wraps, as the file spells it.
        kind: "linear", "conv", "embedding", "in_proj" and "out_proj" (of an nn.MultiheadAttention),
            or "parameter".
        shape: (m, n) of the update; conv: n = in * kernel; embedding: m = its dimension, n = its
            rows.
        rank: of the factors.
        scaling: what B @ A is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        dtype: of the factors as stored.
        a_shape, b_shape: of the factors as stored.
        owner: the module that has the weight, by its canonical name.
        parameter: the weight's name in it.
        experts, expert: how many matrices the parameter holds, and which of them this is.
        method: what the update is, where it is not plain LoRA: "dora", "pissa", "olora" or
            "adalora".
        needs_base: why the update cannot be told without the base's weight; None where it can.
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
    owner: str = ""
    parameter: str = "weight"
    experts: int = 1
    expert: int = 0
    method: str = ""
    needs_base: str | None = None

    def __post_init__(self) -> None:
        if not self.owner:
            object.__setattr__(self, "owner", self.name)


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a module that was saved whole (`modules_to_save`)."""

    spelled: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class BaseWeights(Protocol):
    """The weights of a base model, wherever they lie."""

    def matrix(self, module: Module) -> Tensor:
        """The weight that a module's update is added to, as an (outputs, inputs)
        matrix in float32.
        """
        ...

    def tensor(self, name: str) -> Tensor:
        """A parameter by its canonical name, e.g. "model.norm.bias", in float32."""
        ...


def made_of(
    pairs: Sequence[Pair],
    scalings: Sequence[Scaling],
    settings: Settings,
    config: Mapping[str, object],
    where: str,
) -> Iterator[tuple[Module, Reading]]:
    """Every weight matrix that the pairs change, sorted by name, and how its update is read.

    Raises:
        AdapterConfigError: the layout of experts is not told.
    """
    layout = (
        layout_of(config, where) if any(pair.kind == "parameter" for pair in pairs) else Layout()
    )
    pieces = [
        made
        for pair, scaling in zip(pairs, scalings, strict=True)
        for made in (
            _experts(pair, scaling, layout, config)
            if pair.kind == "parameter"
            else [_matrix(pair, scaling, settings, config)]
        )
    ]
    yield from sorted(pieces, key=lambda made: made[0].name)


def _matrix(
    pair: Pair, scaling: Scaling, settings: Settings, config: Mapping[str, object]
) -> tuple[Module, Reading]:
    name, owner, parameter = canonical(pair.spelled, config), "", "weight"
    factor = scaling.factor
    if pair.kind == "in_proj":
        name, owner, parameter = f"{name}.in_proj", name, "in_proj_weight"
    elif pair.kind == "out_proj":
        owner, parameter, factor = name.removesuffix(".out_proj"), "out_proj.weight", TWICE * factor
    reading: Reading = Factors(pair.a, pair.b, pair.shape, pair.rank, factor, pair.e)
    if pair.magnitude is not None:
        reading = Dora(reading, pair.magnitude)
    elif settings.start is not None:
        reading = Started(reading, settings.start)
    module = Module(
        name=name,
        spelled=pair.key,
        kind=pair.kind,
        shape=pair.shape,
        rank=pair.rank,
        alpha=scaling.alpha,
        scaling=factor,
        dtype=pair.dtype,
        a_shape=pair.a_shape,
        b_shape=pair.b_shape,
        owner=owner,
        parameter=parameter,
        method="dora"
        if pair.magnitude is not None
        else settings.start or ("adalora" if settings.adalora else ""),
        needs_base=reading.needs_base,
    )
    return module, reading


def _experts(
    pair: Pair, scaling: Scaling, layout: Layout, config: Mapping[str, object]
) -> Iterator[tuple[Module, Reading]]:
    experts, owner, bank = (
        pair.rank // scaling.rank,
        canonical(pair.spelled, config),
        Bank(pair.a, pair.b),
    )
    flat = experts == 1
    # a parameter of two dimensions was always read as (out, in)
    layout = Layout() if flat else layout
    shape = (pair.shape[1], pair.shape[0]) if layout.flipped else pair.shape
    for expert in range(experts):
        module = Module(
            name=f"{owner}.{pair.parameter}" + ("" if flat else f".{expert}"),
            spelled=pair.spelled,
            kind="parameter",
            shape=shape,
            rank=scaling.rank,
            alpha=scaling.alpha,
            scaling=scaling.factor,
            dtype=pair.dtype,
            a_shape=(scaling.rank, shape[1]),
            b_shape=(shape[0], scaling.rank),
            owner=owner,
            parameter=pair.parameter,
            experts=experts,
            expert=expert,
        )
        yield module, ExpertFactors(bank, experts, expert, scaling.rank, scaling.factor, layout)


def moved_biases(
    weights: Weights, pairs: Sequence[Pair], scalings: Sequence[Scaling]
) -> Iterator[Vector]:
    """The biases that `lora_bias` moves."""
    for pair, scaling in zip(pairs, scalings, strict=True):
        if pair.bias is not None:
            entry, name = weights.entries[pair.bias], f"{pair.spelled}.bias"
            yield Vector(
                name, name, pair.bias, "moves", entry.shape, entry.dtype, scaling=scaling.factor
            )
