"""The closed world of tensor names: each is part of a module,
or the adapter is refused with its name.

PEFT loads a tensor that it does not know into the base model;
here there is no name that means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

import torch

from sapmerge.errors import AdapterConfigError, AdapterFormatError, AdapterSecurityError
from sapmerge.io.config import Settings
from sapmerge.io.files import Weights, shown
from sapmerge.io.header import UNGATHERED
from sapmerge.io.measuring import Entry

__all__ = ["EMBEDDINGS", "Group", "Sorted", "sort_tensors"]

PREFIX = "base_model.model."
_NAME = re.compile(r"[!-~]+")
_INNER = re.compile(r"(?:^|\.)(?:lora_|(?:base_layer|original_module|modules_to_save)(?:\.|$))")
FLOATS = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_OUT_PROJ, _TOKENS = ".base_layer.out_proj", ".token_adapter.trainable_tokens_delta"
# PEFT saves these by itself when the vocabulary was resized, and stores copies of them when they
# are adapted.
EMBEDDINGS = re.compile(
    r"(?:.*\.)?(?:embed_tokens|lm_head|wte|word_embeddings|shared|embed_in|embed_out|tok_embeddings|predictions\.decoder)"
)
# Names of others, and what to do about them.
_KNOWN = (
    (r"lora_magnitude_vector|lora_embedding_magnitude", "a magnitude of DoRA, but use_dora is not "
                                                        "set"),
    (r"lora_B\.bias$", "a bias of lora_B, but lora_bias is not set"),
    (r"lora_(down|up)|^lora_(unet|te)", "the file is in kohya or diffusers format; convert it to "
                                        "PEFT format"),
    (r"lora_E|ranknum", "a tensor of AdaLoRA, but peft_type is LORA"),
    (r"hada_|lokr_|oft_|ia3_|vera_|boft_", "the tensor belongs to another method than LoRA"),
    (r"trainable_tokens", "rows of trained tokens, but trainable_token_indices is not set"),
    (r"\.base_layer\.", "it would replace a weight of the base model"),
    (r"\.bias$", "it would replace a bias of the base model; modules_to_save does not name its "
                 "module, bias is 'none'"),
)  # fmt: skip


@dataclass(slots=True)
class Group:
    """The tensors of one LoRA layer.

    Args:
        module: the path of the module it wraps.
        level: how many other wrappers of parameters lie around it (see
            `sapmerge.io.kinds.experts`).
        out_proj: whether it is the output projection inside an nn.MultiheadAttention.
        embedding: whether the names are those of an embedding.
        parts: "A", "B", "E", "bias" or "magnitude" -> tensor name.
    """

    module: str
    level: int
    out_proj: bool
    embedding: bool = False
    parts: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Sorted:
    """What the tensors of one file are.

    Args:
        groups: LoRA layers.
        saved: tensors of modules that were saved whole, name as the file spells it -> tensor name.
        biases: biases of the base, module -> tensor name.
        tokens: rows of embeddings, module -> tensor name.
        copies: copies of the base's weights that nobody needs, module -> tensor names.
        twice: pairs of names that must hold the same values.
    """

    groups: tuple[Group, ...]
    saved: Mapping[str, str]
    biases: Mapping[str, str]
    tokens: Mapping[str, str]
    copies: Mapping[str, tuple[str, ...]]
    twice: tuple[tuple[str, str], ...]


class _Factor(NamedTuple):
    """What follows ".lora_" in a name: which factor,
    and the name of the adapter if it is in there.
    """

    part: str
    embedding: bool
    adapter: str | None


def sort_tensors(weights: Weights, settings: Settings) -> Sorted:
    """Put every tensor where it belongs; headers only, no value is read.

    Raises:
        AdapterFormatError, AdapterSecurityError: a tensor that is no part of a module.
        AdapterConfigError: a declared module without a tensor.
    """
    groups: dict[str, Group] = {}
    rest: dict[str, str] = {}
    adapters: dict[str | None, str] = {}
    for name, entry in weights.entries.items():
        path = _path(weights, name)
        _check_entry(weights, name, entry)
        module, _, tail = path.rpartition(".lora_")
        factor = _factor(tail, settings) if module else None
        place = None if factor is None else _place(module)
        if factor is None or place is None:
            rest[path] = name
            continue
        if factor.adapter is not None or factor.part in ("A", "B"):
            adapters.setdefault(factor.adapter, name)
        group = groups.setdefault(module, Group(*place))
        if factor.part in ("A", "B"):
            other = group.parts.get("B" if factor.part == "A" else "A")
            if other is not None and factor.embedding != group.embedding:
                _refuse(
                    weights,
                    name,
                    f"{shown(other)} of the same module is not of an embedding, or the other way",
                )
            group.embedding = factor.embedding
        if factor.part in group.parts:
            _refuse(
                weights,
                name,
                f"{shown(group.parts[factor.part])} is the same tensor in another spelling",
            )
        group.parts[factor.part] = name
    if len(adapters) > 1:
        first, second = list(adapters.values())[:2]
        _refuse(
            weights,
            second,
            f"it has another adapter's name in it than {shown(first)}: one adapter per file",
        )
    saved, biases, tokens, copies, twice = _sort_rest(
        weights, settings, rest, {group.module for group in groups.values()}
    )
    if not groups:
        raise AdapterFormatError(
            f"{weights.where}: no LoRA tensor among {len(weights.entries)}; expected names like "
            f"'{PREFIX}layers.0.q_proj.lora_A.weight'" + ("" if weights.entries else UNGATHERED)
        )
    _check_declared(weights, settings.saved, saved)
    return Sorted(
        tuple(
            sorted(groups.values(), key=lambda group: (group.module, group.level, group.out_proj))
        ),
        dict(sorted(saved.items())),
        dict(sorted(biases.items())),
        dict(sorted(tokens.items())),
        copies,
        tuple(twice),
    )


def _path(weights: Weights, name: str) -> str:
    """The name without its prefix, once it is one that can be printed and read."""
    if not _NAME.fullmatch(name):
        _refuse(weights, name, "it holds spaces, control or non-ASCII characters")
    if not name.startswith(PREFIX) or ".." in name or name.endswith("."):
        _refuse(weights, name, _advice(name, f"tensor names begin with {PREFIX!r}"))
    path = name[len(PREFIX) :]
    if path.startswith(PREFIX):
        _refuse(weights, name, f"{PREFIX!r} comes twice: an adapter saved from inside another")
    return path


def _factor(tail: str, settings: Settings) -> _Factor | None:
    """What follows ".lora_", or None if it is no factor of this kind of adapter."""
    head, *names = tail.split(".")
    if settings.adalora:
        bare = head in ("A", "B", "E") and len(names) <= 1
        return _Factor(head, False, names[0] if names else None) if bare else None
    if head in ("A", "B"):
        leaf = names.pop() if names else ""
        part = (
            head
            if leaf == "weight"
            else "bias"
            if leaf == "bias" and head == "B" and settings.lora_bias
            else ""
        )
        return (
            _Factor(part, False, names[0] if names else None) if part and len(names) <= 1 else None
        )
    if head in ("embedding_A", "embedding_B") and len(names) <= 1 and names != ["weight"]:
        return _Factor(head[-1], True, names[0] if names else None)
    if head == "magnitude_vector" and settings.dora and names != ["weight"]:
        if len(names) == 2 and names[1] == "weight":
            names.pop()
        return _Factor("magnitude", False, names[0] if names else None) if len(names) <= 1 else None
    return None


def _place(module: str) -> tuple[str, int, bool] | None:
    """(module of the base, levels of wrappers around, output projection);
    None if no LoRA layer lies there.
    """
    plain, out_proj = module, module.endswith(_OUT_PROJ)
    if out_proj:
        plain = module[: -len(_OUT_PROJ)] + ".out_proj"
    level = 0
    while plain.endswith(".base_layer"):
        plain, level = plain.removesuffix(".base_layer"), level + 1
    return None if _inside_adapter(plain) or (out_proj and level) else (plain, level, out_proj)


def _sort_rest(
    weights: Weights, settings: Settings, rest: Mapping[str, str], adapted: set[str]
) -> tuple[
    dict[str, str],
    dict[str, str],
    dict[str, str],
    dict[str, tuple[str, ...]],
    list[tuple[str, str]],
]:
    """Everything but factors: modules saved whole, biases, rows of tokens, copies of embeddings."""
    saved, biases, tokens, copies = (
        dict[str, str](),
        dict[str, str](),
        dict[str, str](),
        dict[str, tuple[str, ...]](),
    )
    twice = list[tuple[str, str]]()
    for path, name in rest.items():
        module, leaf = _without_infix(path)
        bare = module.replace(".base_layer", "")
        if path.endswith(_TOKENS) and settings.tokens is not None:
            table, key = tokens, path.removesuffix(_TOKENS)
        elif (
            module.endswith(".base_layer")
            and bare in adapted
            and EMBEDDINGS.fullmatch(bare)
            and leaf == "weight"
        ):
            copies[bare] = (*copies.get(bare, ()), name)
            continue
        elif not _inside_adapter(module) and any(
            _covers(head, module) for head in (*settings.saved, *settings.heads)
        ):
            table, key = saved, f"{module}.{leaf}"
        elif leaf == "bias" and _is_bias(settings, bare, adapted):
            if ".original_module" in path:
                # bias="all" stores the bias of the base's head, too, which the saved head replaces
                continue
            table, key = biases, bare
        elif EMBEDDINGS.fullmatch(module) and leaf in ("weight", "bias") and module not in adapted:
            table, key = saved, f"{module}.{leaf}"
        else:
            _refuse_stray(weights, name, settings.saved)
        if key in table and table is saved and leaf == "bias" and settings.bias == "all":
            twice.append((table[key], name))  # PEFT stores it with the head, and with all biases
            continue
        if key in table:
            _refuse(weights, name, f"{shown(table[key])} is the same tensor in another spelling")
        table[key] = name
    return saved, biases, tokens, copies, twice


def _without_infix(path: str) -> tuple[str, str]:
    """Module and last name of a tensor, without the infix of modules that were saved whole."""
    plain = path.replace(".modules_to_save.default.", ".", 1).replace(".modules_to_save.", ".", 1)
    module, _, leaf = plain.rpartition(".")
    return module, leaf


def _is_bias(settings: Settings, module: str, adapted: set[str]) -> bool:
    if settings.bias == "all":
        return ".lora_" not in f".{module}."
    return settings.bias == "lora_only" and module in adapted


def _inside_adapter(module: str) -> bool:
    """Whether a name goes on below a LoRA layer, where no module of a base model is."""
    return _INNER.search(module) is not None


def _covers(head: str, module: str) -> bool:
    """Whether a name of modules_to_save means this module or one that holds it.
    PEFT compares endings of names: "norm" means "input_layernorm", too.
    """
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(head) for end in range(1, len(parts) + 1))


def _check_declared(weights: Weights, declared: Iterable[str], saved: Mapping[str, str]) -> None:
    """A declared module must be there; of PEFT's pair (classifier, score) no model has both."""
    modules = [name.rpartition(".")[0] for name in saved]
    missing = [head for head in declared if not any(_covers(head, module) for module in modules)]
    heads = {"classifier", "score"}
    if not (heads <= set(declared) and heads - set(missing)):
        heads = set[str]()
    for head in missing:
        if head not in heads:
            raise AdapterConfigError(
                f"{weights.where}: modules_to_save names {shown(head)}, but no tensor of it is in "
                "the file; save the adapter again, or remove the name"
            )


def _refuse_stray(weights: Weights, name: str, declared: tuple[str, ...]) -> NoReturn:
    names = (
        f"modules_to_save names {shown(list(declared))}"
        if declared
        else "modules_to_save names none"
    )
    _refuse(
        weights,
        name,
        _advice(name, f"it would replace a weight of the base model, and {names}"),
        security=True,
    )


def _advice(name: str, otherwise: str) -> str:
    return next((advice for pattern, advice in _KNOWN if re.search(pattern, name)), otherwise)


def _refuse(weights: Weights, name: str, why: str, *, security: bool = False) -> NoReturn:
    error = AdapterSecurityError if security else AdapterFormatError
    raise error(f"{weights.where}: tensor {shown(name)} is not part of a LoRA adapter: {why}")


def _check_entry(weights: Weights, name: str, entry: Entry) -> None:
    if entry.dtype not in FLOATS:
        dtype = str(entry.dtype).removeprefix("torch.")
        raise AdapterFormatError(
            f"{weights.where}: tensor {shown(name)} has dtype {dtype}; expected float32, float16 "
            "or bfloat16"
        )
    if 0 in entry.shape:
        raise AdapterFormatError(
            f"{weights.where}: tensor {shown(name)} is empty: shape {entry.shape}{UNGATHERED}"
        )
