"""Adapters of one base in the coordinates of another, by one plan per stream of the bases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from sapmerge.contrib.gromov.plans import gromov_plan, neuron_distances
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import MethodError
from sapmerge.io.adapter import Adapter
from sapmerge.io.modules import Module
from sapmerge.models import ModelWeights, find_modules

__all__ = ["GromovAlign", "Space", "Wiring", "transformer"]


@dataclass(frozen=True)
class Space:
    """The coordinates that one side of a layer lives in.

    Args:
        name: of the stream; layers that share it are aligned by one plan.
        groups: equal parts, as heads, whose neurons stay within them.
        kept: coordinates that correspond already, and stay as they are.
    """

    name: str
    groups: int = 1
    kept: bool = False


Wiring: TypeAlias = Callable[[str], tuple[Space, Space]]
"""Name of a layer -> the spaces of its outputs and of its inputs."""

_LEAVES = {
    "q_proj": ("queries", "stream"),
    "k_proj": ("queries", "stream"),
    "v_proj": ("values", "stream"),
    "o_proj": ("stream", "values"),
    "out_proj": ("stream", "values"),
    "fc1": ("hidden", "stream"),
    "gate_proj": ("hidden", "stream"),
    "up_proj": ("hidden", "stream"),
    "fc2": ("stream", "hidden"),
    "down_proj": ("stream", "hidden"),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")
_BLOCK = re.compile(r"(?P<tower>.*?)(?:layers|blocks|h)\.(?P<block>\d+)\.(?:.*\.)?(?P<leaf>\w+)")


def transformer(heads: int | Mapping[str, int], rotary: bool = False) -> Wiring:
    """How a transformer's linear layers hang together.

    All layers that write into the residual stream of a tower, and all that read it, share one plan;
    so do q and k of a block, v and o, and both sides of its MLP. Queries and values are matched
    within their heads, which keep their order. Grouped keys are not covered, and refused.

    Args:
        heads: how many, or part of a module's name -> how many, e.g.
            {"vision_model": 12, "text_model": 8}.
        rotary: queries and keys keep their coordinates: rotary positions turn them in pairs of
            fixed frequencies, and another order would be another function.

    Example:
        >>> from sapmerge.contrib import gromov
        >>> outputs, inputs = gromov.transformer(heads=4)("text.layers.0.self_attn.v_proj")
        >>> outputs.name, outputs.groups, inputs.name
        ('text.0.values', 4, 'text.stream')
    """

    def wiring(name: str) -> tuple[Space, Space]:
        match = _BLOCK.fullmatch(name)
        if match is None or match["leaf"] not in _LEAVES:
            raise MethodError(f"{name!r} is no layer of a known kind; pass a wiring of your own")
        given = heads if isinstance(heads, Mapping) else {"": heads}
        counts = [number for part, number in given.items() if part in name]
        if len(counts) != 1:
            raise MethodError(f"heads has {len(counts)} entries for {name!r}; expected one")

        def space(kind: str) -> Space:
            if kind == "stream":
                return Space(f"{match['tower']}stream")
            return Space(
                f"{match['tower']}{match['block']}.{kind}",
                1 if kind == "hidden" else counts[0],
                rotary and kind == "queries",
            )

        outputs, inputs = _LEAVES[match["leaf"]]
        return space(outputs), space(inputs)

    return wiring


@dataclass(frozen=True, eq=False)
class GromovAlign:
    """Brings adapters of base B into the coordinates of base A, and no further than they fit.

    Args:
        transports: space -> (m_A, m_B).
        distances: space -> the Gromov-Wasserstein loss of its plan; near 0 where neurons are found.
        wiring: layer -> the spaces of its outputs and inputs.

    Example:
        >>> from sapmerge.contrib import gromov
        >>> align = gromov.GromovAlign.between(
        ...     base_a, base_b, adapter.modules, gromov.transformer(heads=12)
        ... )  # doctest: +SKIP
        >>> sm.merge([adapter_of_a, align(adapter)], method=sm.mean())  # doctest: +SKIP
    """

    transports: Mapping[str, Tensor]
    distances: Mapping[str, float]
    wiring: Wiring

    @classmethod
    def between(
        cls, base_a: Any, base_b: Any, modules: Mapping[str, Module], wiring: Wiring
    ) -> GromovAlign:
        """Plans from the weights of two bases of one architecture.

        A space's distances are the mean over all layers that write it (rows) or read it (columns).

        Args:
            base_a: the model whose coordinates are kept.
            base_b: the model of the adapters to align.
            modules: of the adapters, `adapter.modules`; weights of these layers are read.
            wiring: as `transformer(heads)`.

        Raises:
            MethodError: a layer that the wiring does not know, or that is not linear; grouped keys;
                rotary positions, without a wiring that keeps queries and keys.
            ModelMismatchError: a base lacks a module.
            SapmergeError: POT is not installed.
        """
        odd = [name for name, module in modules.items() if module.kind != "linear"]
        if odd:
            raise MethodError(f"only linear layers can be aligned; {odd[0]!r} is none")
        for base in (base_a, base_b):
            _check_attention(base, modules, wiring)
        sums: dict[str, tuple[Space, list[Tensor]]] = {}
        weights = [ModelWeights(base, modules) for base in (base_a, base_b)]
        for name, module in modules.items():
            pair = [each.matrix(module) for each in weights]
            for space, turned in zip(wiring(name), (False, True), strict=True):
                if space.kept:
                    size = pair[0].shape[turned]
                    sums[space.name] = (space, [torch.eye(size, dtype=torch.float64)])
                    continue
                found = [neuron_distances(w.T if turned else w) for w in pair]
                kept = sums.setdefault(space.name, (space, [torch.zeros_like(f) for f in found]))[1]
                for total, each in zip(kept, found, strict=True):
                    if total.shape != each.shape:
                        raise MethodError(
                            f"{name!r} has {len(each)} neurons in {space.name!r}, where another "
                            f"layer has {len(total)}: the wiring does not fit"
                        )
                    total += each
        plans = {
            name: (found[0], 0.0) if space.kept else _grouped(space, *found)
            for name, (space, found) in sums.items()
        }
        return cls(
            {name: transport for name, (transport, _) in plans.items()},
            {name: distance for name, (_, distance) in plans.items()},
            wiring,
        )

    def update(self, name: str, update: Update) -> Update:
        """T_L D T_R^T of one layer; low rank stays low rank."""
        left, right = (self.transports[space.name].to(update.device) for space in self.wiring(name))
        if isinstance(update, LowRank):
            B, A = left @ update.B.double(), update.A.double() @ right.T
            return LowRank(B.to(update.dtype), A.to(update.dtype))
        return Dense((left @ update.dense().double() @ right.T).to(update.dtype))

    def __call__(self, adapter: Adapter) -> Adapter:
        """The adapter in the coordinates of base A.

        Raises:
            MethodError: it has a layer that no plan was made for, or more than updates of matrices.
        """
        lacking = [
            space.name
            for name in adapter.modules
            for space in self.wiring(name)
            if space.name not in self.transports
        ]
        if lacking:
            raise MethodError(f"no plan was made for {lacking[0]!r} of {adapter.label!r}")
        if more := [*adapter.saved, *adapter.vectors]:
            raise MethodError(f"{adapter.label!r} holds more than updates: {more[0]!r}")
        tensors, ranks = dict[str, Tensor](), dict[str, int]()
        for name in adapter.modules:
            moved = self.update(name, adapter.update(name))
            assert isinstance(moved, LowRank)
            tensors[f"base_model.model.{name}.lora_A.weight"] = moved.A
            tensors[f"base_model.model.{name}.lora_B.weight"] = moved.B
            ranks[name] = moved.rank
        config = {
            "peft_type": "LORA",
            "r": max(ranks.values()),
            "lora_alpha": max(ranks.values()),
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "target_modules": sorted(ranks),
        }
        return Adapter.from_state_dict(config, tensors, label=adapter.label)

    def kept(self, adapter: Adapter) -> float:
        """|D'| / |D| of a whole adapter: 1 for a permutation, less where plans are soft."""
        sizes = [
            (self.update(name, update).norm(), update.norm())
            for name, update in ((name, adapter.update(name)) for name in adapter.modules)
        ]
        return math.sqrt(sum(a**2 for a, _ in sizes) / sum(b**2 for _, b in sizes))


def _check_attention(base: Any, modules: Mapping[str, Module], wiring: Wiring) -> None:
    """Refuse attention whose coordinates are bound in ways that no plan of a space respects."""
    found = find_modules(base, modules)
    owners: dict[str, nn.Module] = dict(base.named_modules())
    names = {id(module): name for name, module in owners.items()}
    rotary = [name for name, module in owners.items() if "Rotary" in type(module).__name__]
    for name, module in found.items():
        parent, _, leaf = names.get(id(module), "").rpartition(".")
        pair = [owners.get(f"{parent}.{one}") for one in ("q_proj", "k_proj")]
        rows = [len(one.weight) for one in pair if isinstance(one, nn.Linear)]
        if leaf in _ATTENTION and len(set(rows)) > 1:
            raise MethodError(
                f"{parent!r} has grouped keys ({rows[1]} rows for {rows[0]} of its queries), which "
                "cannot be aligned; leave its layers out of the adapters"
            )
        turned = next((r for r in rotary if parent.startswith(r.rpartition(".")[0])), None)
        if leaf in ("q_proj", "k_proj") and turned is not None and not wiring(name)[0].kept:
            raise MethodError(
                f"{names[id(module)]!r} feeds rotary positions ({turned!r}), which bind its "
                "coordinates in pairs: keep them, gromov.transformer(heads, rotary=True)"
            )


def _grouped(space: Space, one: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """The transport of a space, its groups apart; and their mean distance."""
    if len(one) % space.groups or len(other) % space.groups:
        raise MethodError(
            f"{space.name!r} has {len(one)} neurons, which are no {space.groups} equal groups"
        )
    parts = [
        [each[k : k + size, k : k + size] / float(each.mean()) for k in range(0, len(each), size)]
        for each, size in ((each, len(each) // space.groups) for each in (one, other))
    ]
    plans = [gromov_plan(a, b) for a, b in zip(*parts, strict=True)]
    blocks = [plan.transport for plan in plans]
    transport = cast("Tensor", torch.block_diag(*blocks))  # pyright: ignore[reportUnknownMemberType]
    return transport, sum(plan.distance for plan in plans) / len(plans)
