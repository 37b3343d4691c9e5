"""The closed world of tensor names: each is part of a module, or the adapter is refused with its name.

PEFT loads a tensor that it does not know into the base model; here there is no name that means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch

from sapmerge.errors import AdapterConfigError, AdapterFormatError, AdapterSecurityError, LimitExceededError
from sapmerge.io.files import Limits, Weights, shown
from sapmerge.io.measuring import Entry

__all__ = ["Pair", "Sorted", "sort_tensors"]

PREFIX = "base_model.model."
_NAME = re.compile(r"[!-~]+")
# What follows the last ".lora_" of a factor's name.
_FACTORS = {
    "A.weight": ("A", False),
    "B.weight": ("B", False),
    "embedding_A": ("A", True),
    "embedding_B": ("B", True),
}
_INNER = re.compile(r"(?:^|\.)(?:lora_|(?:base_layer|original_module|modules_to_save)(?:\.|$))")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Names of others, and what to do about them.
_KNOWN = (
    (r"lora_magnitude_vector|lora_embedding_magnitude", "the adapter is a DoRA; merge it into its base with PEFT"),
    (r"lora_[AB]\.bias$", "the adapter has lora_bias; merge it into its base with PEFT"),
    (r"lora_[AB]\.[^.]+\.weight$|lora_embedding_[AB]\.", "there is an adapter name in it: it would overwrite another "
     "adapter. Save with save_pretrained, or take get_peft_model_state_dict"),
    (r"lora_(down|up)|^lora_(unet|te)", "the file is in kohya or diffusers format; convert it to PEFT format"),
    (r"lora_E|ranknum", "the adapter is an AdaLoRA; merge it into its base with PEFT"),
    (r"hada_|lokr_|oft_|ia3_|vera_|boft_", "the tensor belongs to another method than LoRA"),
    (r"trainable_tokens", "trained token embeddings are not supported"),
    (r"\.base_layer\.", "it would replace a weight of the base model. If it is a copy of an embedding, save again with "
     "save_pretrained(..., save_embedding_layers=False)"),
    (r"\.bias$", "it would replace a bias of the base model; modules_to_save does not name its module"),
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """The two factors of one module, with all that their headers tell.

    Args:
        spelled: the module's name in the file.
        kind: "linear", "conv" or "embedding".
        a, b: tensor names.
        shape: (m, n) of B @ A.
    """

    spelled: str
    kind: str
    a: str
    b: str
    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True)
class Sorted:
    """What the tensors of one file are: factors in pairs, and tensors of modules that were saved whole."""

    pairs: tuple[Pair, ...]
    saved: Mapping[str, str]
    """Name without prefix and infix, as the file spells it -> tensor name."""


def sort_tensors(weights: Weights, declared: Iterable[str], implied: Iterable[str], limits: Limits) -> Sorted:
    """Put every tensor where it belongs.

    Args:
        weights: headers only; no value is read.
        declared: modules_to_save of the config.
        implied: the names that PEFT adds for the task.

    Raises:
        AdapterFormatError, AdapterSecurityError: a tensor that is no part of a module.
        AdapterConfigError: a declared module without a tensor.
    """
    declared, implied = tuple(declared), tuple(implied)
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name, entry in weights.entries.items():
        if not _NAME.fullmatch(name):
            _refuse(weights, name, "it holds spaces, control or non-ASCII characters")
        if not name.startswith(PREFIX) or ".." in name or name.endswith("."):
            _refuse(weights, name, _advice(name, f"tensor names begin with {PREFIX!r}"))
        _check_entry(weights, name, entry)
        path = name[len(PREFIX) :]
        if path.startswith(PREFIX):
            _refuse(weights, name, f"{PREFIX!r} is there twice: an adapter saved from inside another")
        module, _, tail = path.rpartition(".lora_")
        if module and tail in _FACTORS and not _inside_adapter(module):
            part, embedding = _FACTORS[tail]
            factors.setdefault((module, embedding), {})[part] = name
            continue
        plain = path.replace(".modules_to_save.default.", ".", 1).replace(".modules_to_save.", ".", 1)
        module = plain.rpartition(".")[0]
        if _inside_adapter(plain) or not any(_covers(head, module) for head in (*declared, *implied)):
            _refuse_stray(weights, name, declared)
        if plain in saved:
            _refuse(weights, name, f"{shown(saved[plain])} is the same tensor in another spelling")
        saved[plain] = name
    if not factors:
        raise AdapterFormatError(
            f"{weights.where}: no LoRA tensor among {len(weights.entries)}; expected names like "
            f"'{PREFIX}layers.0.q_proj.lora_A.weight'"
        )
    _check_declared(weights, declared, saved)
    pairs = [_pair(weights, module, embedding, parts, limits) for (module, embedding), parts in factors.items()]
    return Sorted(tuple(sorted(pairs, key=lambda pair: pair.spelled)), dict(sorted(saved.items())))


def _inside_adapter(module: str) -> bool:
    """Whether a name goes on below a LoRA layer, where no module of a base model is."""
    return _INNER.search(module) is not None


def _covers(head: str, module: str) -> bool:
    """Whether a name of modules_to_save means this module or one that holds it. PEFT compares endings of names."""
    at = module.find(head)
    while at >= 0:
        end = at + len(head)
        if (at == 0 or module[at - 1] in "._") and (end == len(module) or module[end] == "."):
            return True
        at = module.find(head, at + 1)
    return False


def _check_declared(weights: Weights, declared: tuple[str, ...], saved: Mapping[str, str]) -> None:
    """A declared module must be there; of PEFT's pair (classifier, score) no model has both."""
    modules = [name.rpartition(".")[0] for name in saved]
    missing = [head for head in declared if not any(_covers(head, module) for module in modules)]
    heads = {"classifier", "score"}
    if not (heads <= set(declared) and heads - set(missing)):
        heads = set[str]()
    for head in missing:
        if head not in heads:
            raise AdapterConfigError(
                f"{weights.where}: modules_to_save names {shown(head)}, but no tensor of it is in the file; "
                "save the adapter again, or remove the name"
            )


def _refuse_stray(weights: Weights, name: str, declared: tuple[str, ...]) -> NoReturn:
    names = f"modules_to_save names {shown(list(declared))}" if declared else "modules_to_save names none"
    _refuse(weights, name, _advice(name, f"it would replace a weight of the base model, and {names}"), security=True)


def _advice(name: str, otherwise: str) -> str:
    return next((advice for pattern, advice in _KNOWN if re.search(pattern, name)), otherwise)


def _refuse(weights: Weights, name: str, why: str, *, security: bool = False) -> NoReturn:
    error = AdapterSecurityError if security else AdapterFormatError
    raise error(f"{weights.where}: tensor {shown(name)} is not part of a LoRA adapter: {why}")


def _check_entry(weights: Weights, name: str, entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        found = str(entry.dtype).removeprefix("torch.")
        raise AdapterFormatError(
            f"{weights.where}: tensor {shown(name)} has dtype {found}; expected float32, float16 or bfloat16"
        )
    if 0 in entry.shape:
        raise AdapterFormatError(f"{weights.where}: tensor {shown(name)} is empty: shape {entry.shape}")


def _pair(weights: Weights, module: str, embedding: bool, parts: Mapping[str, str], limits: Limits) -> Pair:
    """Check that A and B are there and fit each other."""
    if len(parts) < 2:
        has = next(iter(parts.values()))
        lacks = "B" if "A" in parts else "A"
        raise AdapterFormatError(f"{weights.where}: tensor {shown(has)} has no lora_{lacks} beside it")
    a, b = weights.entries[parts["A"]], weights.entries[parts["B"]]
    both = f"lora_A {a.shape}, lora_B {b.shape}"
    where = f"{weights.where}: module {shown(module)}"
    if len(a.shape) != len(b.shape) or not 2 <= len(a.shape) <= (2 if embedding else 5):
        raise AdapterFormatError(f"{where}: {both}; expected A (r, in) and B (out, r), or those of a convolution")
    rank = a.shape[0]
    if b.shape[1] != rank:
        hint = "; a grouped convolution is not supported" if len(a.shape) > 2 and rank % b.shape[1] == 0 else ""
        raise AdapterFormatError(f"{where}: {both}: rank {rank} in A, {b.shape[1]} in B{hint}")
    if any(size != 1 for size in b.shape[2:]):
        raise AdapterFormatError(f"{where}: {both}; expected a kernel of size 1 in lora_B")
    columns = 1
    for size in a.shape[1:]:
        columns *= size
    shape = (b.shape[0], columns)
    if rank > min(shape) and not limits.rank_above_shape:
        raise LimitExceededError(
            f"{where}: rank {rank} is larger than the update, {shape[0]} x {shape[1]} ({both}); if that is meant: "
            "Adapter.load(path, limits=Limits(rank_above_shape=True))"
        )
    kind = "embedding" if embedding else "linear" if len(a.shape) == 2 else "conv"
    dtype = torch.promote_types(a.dtype, b.dtype)
    return Pair(module, kind, parts["A"], parts["B"], shape, rank, dtype, a.shape, b.shape)
