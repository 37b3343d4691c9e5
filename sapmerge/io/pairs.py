"""Which weight matrices of the base the LoRA layers of a file belong to,
and whether their factors fit each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from sapmerge.errors import AdapterConfigError, AdapterFormatError, LimitExceededError
from sapmerge.io.config import Settings
from sapmerge.io.files import Limits, Weights, shown
from sapmerge.io.keys import Group
from sapmerge.io.kinds.experts import order_of, parameters_of
from sapmerge.io.measuring import Entry

__all__ = ["Pair", "make_pairs"]


class Pair(NamedTuple):
    """The tensors of one LoRA layer, with all that their headers tell.

    Args:
        spelled: the path of the module in the file.
        kind: "linear", "conv", "embedding", "in_proj" and "out_proj" (of an nn.MultiheadAttention),
            or "parameter".
        parameter: of kind "parameter" its name, e.g. "gate_up_proj"; else "".
        a, b: tensor names.
        shape: (m, n) of B @ A; of a parameter not known before the number of experts is.
        rank: rows of A; of a parameter for all experts together.
        e, magnitude, bias: names of further tensors, if there are.
    """

    spelled: str
    kind: str
    parameter: str
    a: str
    b: str
    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    e: str | None = None
    magnitude: str | None = None
    bias: str | None = None

    @property
    def key(self) -> str:
        """What patterns of the config are compared with."""
        if self.kind == "out_proj":
            return self.spelled.removesuffix(".out_proj")
        return f"{self.spelled}.{self.parameter}" if self.parameter else self.spelled


def make_pairs(
    weights: Weights,
    groups: Sequence[Group],
    settings: Settings,
    selects: Callable[[str], bool],
    limits: Limits,
    where: str,
) -> list[Pair]:
    """Every LoRA layer with its kind, sorted by name.

    Args:
        groups: from `sort_tensors`.
        selects: whether `target_modules` means a module.
        where: how messages name the config.

    Raises:
        AdapterFormatError: factors that do not fit each other, or a nest of layers that is none of
            PEFT's.
        AdapterConfigError: parameters of the config that the file lacks, or the other way round.
    """
    wrapped: dict[str, list[Group]] = {}
    for group in groups:
        wrapped.setdefault(group.module, []).append(group)
    attention = {group.module.removesuffix(".out_proj") for group in groups if group.out_proj}
    pairs = list[Pair]()
    for module, layers in wrapped.items():
        parameters = (
            _parameters(module, layers, settings, selects, where) if settings.parameters else None
        )
        for group in layers:
            if parameters:
                pair = _pair(weights, group, settings, "parameter", parameters[group.level], limits)
            elif group.level:
                raise AdapterFormatError(
                    f"{weights.where}: tensor {shown(next(iter(group.parts.values())))} lies in a "
                    "base_layer, but "
                    f"target_parameters names no parameter of module {shown(module)}"
                )
            else:
                kind = "out_proj" if group.out_proj else "in_proj" if module in attention else ""
                pair = _pair(weights, group, settings, kind, "", limits)
            pairs.append(pair)
    for module in sorted(attention):
        _check_attention(weights, module, pairs)
    return sorted(pairs, key=lambda pair: (pair.spelled, pair.parameter))


def _parameters(
    module: str,
    layers: Sequence[Group],
    settings: Settings,
    selects: Callable[[str], bool],
    where: str,
) -> list[str] | None:
    """The parameters of a module, outermost wrapper first; None for an ordinary LoRA layer."""
    qualified, bare = parameters_of(module, settings.parameters)
    names = qualified or ([] if not bare or selects(module) else bare)
    if not names or any(group.embedding or group.out_proj for group in layers):
        return None
    if len(names) != len(layers):
        raise AdapterConfigError(
            f"{where}: target_parameters names {shown(sorted(names))} of module {shown(module)}, "
            "the file has tensors "
            f"for {len(layers)} of them; config and weights do not belong together"
        )
    if sorted(group.level for group in layers) != list(range(len(layers))):
        raise AdapterConfigError(
            f"{where}: the layers of module {shown(module)} are not nested one in another"
        )
    return order_of(names, module, where)[::-1]


def _check_attention(weights: Weights, module: str, pairs: Sequence[Pair]) -> None:
    """in_proj (3 d, d) beside out_proj (d, d)."""
    inner = next(
        (pair for pair in pairs if pair.spelled == module and pair.kind == "in_proj"), None
    )
    outer = next(
        pair for pair in pairs if pair.spelled == f"{module}.out_proj" and pair.kind == "out_proj"
    )
    width = outer.shape[0]
    if inner is None or outer.shape != (width, width) or inner.shape != (3 * width, width):
        inside = "nothing" if inner is None else inner.shape
        raise AdapterFormatError(
            f"{weights.where}: module {shown(module)}: out_proj {outer.shape} beside in_proj "
            f"{inside}; an nn.MultiheadAttention of width d has (d, d) and (3 d, d)"
        )


def _pair(
    weights: Weights, group: Group, settings: Settings, kind: str, parameter: str, limits: Limits
) -> Pair:
    """Check that A and B are there and fit each other."""
    parts = group.parts
    for lacks, other in (("A", "B"), ("B", "A")):
        if lacks not in parts:
            has = parts.get(other) or next(iter(parts.values()))
            raise AdapterFormatError(
                f"{weights.where}: tensor {shown(has)} has no lora_{lacks} beside it"
            )
    a, b = weights.entries[parts["A"]], weights.entries[parts["B"]]
    flat = group.embedding or kind != ""
    if len(a.shape) != len(b.shape) or not 2 <= len(a.shape) <= (2 if flat else 5):
        raise AdapterFormatError(
            f"{_where(weights, group, a, b)}; expected A (r, in) and B (out, r), or those of a "
            "convolution"
        )
    rank = a.shape[0]
    if b.shape[1] != rank:
        hint = (
            "; a grouped convolution is not supported"
            if len(a.shape) > 2 and rank % b.shape[1] == 0
            else ""
        )
        raise AdapterFormatError(
            f"{_where(weights, group, a, b)}: rank {rank} in A, {b.shape[1]} in B{hint}"
        )
    if any(size != 1 for size in b.shape[2:]):
        raise AdapterFormatError(
            f"{_where(weights, group, a, b)}; expected a kernel of size 1 in lora_B"
        )
    columns = 1
    for size in a.shape[1:]:
        columns *= size
    shape = (b.shape[0], columns)
    if rank > min(shape) and not limits.rank_above_shape and not parameter:
        raise LimitExceededError(
            f"{_where(weights, group, a, b)}: rank {rank} is larger than the update, {shape[0]} x "
            f"{shape[1]}"
        )
    kind = kind or ("embedding" if group.embedding else "linear" if len(a.shape) == 2 else "conv")
    _check_extras(weights, group, settings, kind, shape, rank)
    return Pair(
        spelled=group.module,
        kind=kind,
        parameter=parameter,
        a=parts["A"],
        b=parts["B"],
        shape=shape,
        rank=rank,
        dtype=_wider(a.dtype, b.dtype),
        a_shape=a.shape,
        b_shape=b.shape,
        e=parts.get("E"),
        magnitude=parts.get("magnitude"),
        bias=parts.get("bias"),
    )


def _where(weights: Weights, group: Group, a: Entry, b: Entry) -> str:
    """What a message begins with; made for a message only, since there may be 100,000 modules."""
    return f"{weights.where}: module {shown(group.module)}: lora_A {a.shape}, lora_B {b.shape}"


def _check_extras(
    weights: Weights, group: Group, settings: Settings, kind: str, shape: tuple[int, int], rank: int
) -> None:
    """What a kind needs beside A and B is there, with the right size."""
    if len(group.parts) == 2 and not (
        settings.dora or settings.lora_bias or settings.adalora or settings.start
    ):
        return
    plain = kind in ("linear", "conv")
    wanted: Mapping[str, tuple[str, int] | None] = {
        "magnitude": ("use_dora is set, but lora_magnitude_vector", shape[0])
        if settings.dora
        else None,
        "bias": ("lora_bias is set, but lora_B.bias", shape[0])
        if settings.lora_bias and plain
        else None,
        "E": ("an AdaLoRA, but lora_E", rank) if settings.adalora else None,
    }
    where = f"{weights.where}: module {shown(group.module)}"
    if (settings.dora or settings.adalora or settings.start) and kind not in (
        "linear",
        "conv",
        "embedding",
    ):
        raise AdapterFormatError(f"{where}: PEFT has no {kind} layer of this kind of adapter")
    for part, rule in wanted.items():
        name = group.parts.get(part)
        if rule is None:
            if name is not None:
                raise AdapterFormatError(
                    f"{where}: tensor {shown(name)} does not belong to a layer of kind {kind}"
                )
            continue
        what, size = rule
        if name is None:
            raise AdapterConfigError(f"{where}: {what} is missing; save the adapter again")
        extent = weights.entries[name].shape
        if max(extent, default=0) != size or torch.Size(extent).numel() != size:
            raise AdapterFormatError(
                f"{where}: tensor {shown(name)} has shape {extent}; expected {size} values"
            )


def _wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype of both factors; 8-bit floats count as float32, which is what they are read as."""
    known = [torch.float32 if dtype.itemsize == 1 else dtype for dtype in (first, second)]
    return torch.promote_types(known[0], known[1])
