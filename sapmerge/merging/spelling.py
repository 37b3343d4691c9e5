"""One base, several spellings of its modules: which names of the adapters mean one module,
and what is written.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapmerge.errors import MethodError, SapmergeWarning
from sapmerge.io.adapter import Adapter
from sapmerge.io.names import STYLES, alike, plain, respelled, stem
from sapmerge.io.original_llava import is_original_llava
from sapmerge.merging.banks import check_experts
from sapmerge.merging.fused import as_in_parts, fitted
from sapmerge.merging.towers import base_class, check_tower_of
from sapmerge.naming import Names

__all__ = [
    "CHOICES",
    "Own",
    "check_names",
    "one_spelling",
    "say_what_is_not_shared",
    "spelling_of",
    "written_names",
]

CHOICES = ("input", *STYLES)
_SHOWN = 3
# Models of which transformers 4 called the text layers model.layers, by the name of the base.
_QWEN = re.compile(r"qwen[\d._-]*(?:vl|omni)|qvq", re.IGNORECASE)
_LLAVA = re.compile(
    r"llava|gemma-?3|paligemma|internvl|pixtral|mistral-small-3|aya-vision|got-ocr|aria",
    re.IGNORECASE,
)


def one_spelling(adapters: Sequence[Adapter], model: Any = None) -> list[Adapter]:
    """The adapters, with one key for every module of the base, however each of them spells it.

    With a model its modules decide. Without one, names that differ in what is around a tower are
    taken for one module if their shapes agree and no adapter has both; that is said. A fused
    projection (`qkv_proj`) of one adapter is cut where another has it in parts.

    Args:
        adapters: of one base.
        model: the base, if it is at hand.

    Raises:
        ModelMismatchError: the model is another tower than that of an adapter.
    """
    if model is not None:
        check_tower_of(adapters, model)
        own = Names(model)
        joined = [_as_in(adapter, own) for adapter in adapters]
    else:
        joined = as_in_parts(_joined(adapters))
        _say_what_differs(joined)
    check_experts(joined)
    return joined


def _as_in(adapter: Adapter, own: Names) -> Adapter:
    plan = fitted(adapter, own)
    if plan:
        adapter = adapter.respelled({}, plan)
    wanted: dict[str, tuple[int, ...] | None] = dict.fromkeys(_beside(adapter))
    wanted |= {m.owner: m.shape if m.name == m.owner else None for m in adapter.modules.values()}
    names = own.locate(wanted)
    return adapter if all(old == new for old, new in names.items()) else adapter.respelled(names)


def _joined(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Give the keys that mean one module the longest of them, where that is certain."""
    shapes: dict[str, set[object]] = {}
    owners: dict[str, set[int]] = {}
    for k, adapter in enumerate(adapters):
        for module in adapter.modules.values():
            shapes.setdefault(module.owner, set()).add(
                (module.kind, module.parameter, module.shape)
            )
            owners.setdefault(module.owner, set()).add(k)
    groups: dict[str, list[str]] = {}
    for key in owners:
        groups.setdefault(stem(key).path, []).append(key)
    names: dict[str, str] = {}
    for group in groups.values():
        if len(group) > 1:
            names |= _one_of(
                sorted(group, key=lambda key: (-len(key), key)), shapes, owners, adapters
            )
    return [_renamed(adapter, names) for adapter in adapters]


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    owners = {module.owner for module in adapter.modules.values()}
    mine = {key: names[key] for key in owners if key in names}
    if not mine:
        return adapter
    # What only this adapter has is below the same classes as the rest of it.
    habits = _habits(mine.items())
    for key in (*owners, *_beside(adapter)):
        if key not in mine and (new := _translated(key, habits)) not in owners:
            mine[key] = new
    return adapter.respelled(mine)


def _one_of(
    keys: list[str],
    shapes: Mapping[str, set[object]],
    owners: Mapping[str, set[int]],
    adapters: Sequence[Adapter],
) -> dict[str, str]:
    """Key -> the longest key that means the same module;
    keys that fit two different modules stay.
    """

    def fits(one: str, other: str) -> bool:
        apart = owners[one].isdisjoint(owners[other]) and shapes[one] == shapes[other]
        classes = {base_class(adapters[k]) for k in (*owners[one], *owners[other])}
        return apart and alike(one, other, len(classes) == 1 and None not in classes)

    names: dict[str, str] = {}
    for key in keys[1:]:
        targets = {names.get(other, other) for other in keys if other != key and fits(key, other)}
        longer = [target for target in targets if (-len(target), target) < (-len(key), key)]
        if len(targets) == len(longer) == 1:
            names[key] = longer[0]
    return names


def _beside(adapter: Adapter) -> set[str]:
    """The modules of what is no update of a matrix:
    modules saved whole, biases, rows of embeddings.
    """
    vectors = (vector.name for vector in adapter.vectors.values())
    return {tensor.rpartition(".")[0] for tensor in (*adapter.saved, *vectors)}


def _say_what_differs(adapters: Sequence[Adapter]) -> None:
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for key, module in adapter.modules.items():
            other = first.setdefault(key, adapter)
            if plain(other.modules[key].spelled) != plain(module.spelled):
                _warn(
                    f"{other.label!r} and {adapter.label!r} spell the modules of their base in "
                    f"two ways (one module is {other.modules[key].spelled!r} in the first, "
                    f"{module.spelled!r} in the second): they are merged as the same modules. The "
                    "output is spelled as most inputs are; names=... or model=... chooses"
                )
                return


def say_what_is_not_shared(adapters: Sequence[Adapter]) -> None:
    """Warn of adapters that share no module: two spellings that nobody could join,
    or different modules.
    """
    sets = [set(adapter.modules) for adapter in adapters]
    apart = [
        (adapters[i], adapters[j])
        for i in range(len(sets))
        for j in range(i + 1, len(sets))
        if sets[i].isdisjoint(sets[j])
    ]
    if apart:
        listed = ", ".join(f"{a.label!r} and {b.label!r}" for a, b in apart[:_SHOWN])
        more = f" and {len(apart) - _SHOWN} more pairs" if len(apart) > _SHOWN else ""
        one, other = (next(iter(adapter.modules.values())).spelled for adapter in apart[0])
        _warn(
            f"{listed}{more} share no module ({one!r} in one, {other!r} in the other): nothing of "
            "them is averaged with each other, and a mean halves both. If these are two "
            "spellings of one model, give it: model=..."
        )


def check_names(names: str | None) -> None:
    """Whether `names` is a choice."""
    if names is not None and names not in CHOICES:
        raise MethodError(
            f"names={names!r} is not a spelling; choose one of {', '.join(map(repr, CHOICES))}"
        )


@dataclass(frozen=True)
class Own:
    """What a model calls its modules, kept without the model.

    Args:
        names: key -> name.
        kind: the `model_type` of its config.
    """

    names: Mapping[str, str]
    kind: str

    @staticmethod
    def of(model: Any) -> Own | None:
        """Of a model; None without one."""
        if model is None:
            return None
        of_model = Names(model)
        names = {key: of_model.plain[path] for key, path in of_model.paths.items()}
        return Own(names, str(getattr(getattr(of_model.base, "config", None), "model_type", "")))


def written_names(
    adapters: Sequence[Adapter], names: str | None, own: Own | None
) -> Mapping[str, str]:
    """Key -> the name of the module in the output.

    Args:
        adapters: as `one_spelling` gives them.
        names: one of `CHOICES`; None: as the model spells them, or "input" without a model.
        own: what the model says, if it is at hand.

    Raises:
        MethodError: the older spelling of a model that nobody can tell.
    """
    check_names(names)
    if names is None and own is not None:
        return own.names
    keys = sorted({key for adapter in adapters for key in (*_spelled(adapter),)})
    family = _family(adapters, keys, own)
    if names is None or names == "input":
        return _as_the_inputs(adapters, family)
    multimodal = any(
        "language_model." in key or stem(key).tower not in ("", "text") for key in keys
    )
    if (names == "llava" and family != "llava") or (
        names != STYLES[0] and multimodal and not family
    ):
        raise MethodError(
            f"names={names!r}: what the modules were called is only known for models like LLaVA "
            "and Qwen-VL, and these adapters do not tell that their base is one. Give the base "
            "as model=..., or its name as base_model=..."
        )
    return {key: respelled(_newest(key, family), names, family) for key in keys}


def spelling_of(adapters: Sequence[Adapter], names: str | None, own: Own | None) -> str | None:
    """What `names` must be for the same names without the model;
    None for "input", or if nothing gives them.
    """
    if names is not None or own is None:
        return None if names == "input" else names
    wanted = written_names(adapters, None, own)
    for choice in CHOICES:
        try:
            written = written_names(adapters, choice, None)
        except MethodError:
            continue
        if all(wanted.get(key, key) == name for key, name in written.items()):
            return None if choice == "input" else choice
    return None


def _newest(key: str, family: str) -> str:
    """A key as transformers 5 spells it: the text layers of a multimodal model are below
    `language_model`.
    """
    if family and re.match(r"model\.(?:layers|embed_tokens|norm)\b", key):
        return "model.language_model." + key.removeprefix("model.")
    return key


def _family(adapters: Sequence[Adapter], keys: Iterable[str], own: Own | None) -> str:
    """Which multimodal family the base is of, by the model, the towers that are adapted,
    or the base's name.
    """
    bases = [
        name.replace("_", "-")
        for name in (own.kind if own else "", *(a.base_model or "" for a in adapters))
    ]
    spelled = [module.spelled for adapter in adapters for module in adapter.modules.values()]
    if any(key.startswith("model.visual.") for key in keys) or any(
        _QWEN.search(name) for name in bases
    ):
        return "qwen"
    towers = ("model.vision_tower.", "model.multi_modal_projector.")
    if any(key.startswith(towers) for key in keys) or any(
        name.startswith("language_model.model.") for name in spelled
    ):
        return "llava"
    if any(_LLAVA.search(name) for name in bases):
        return "llava"
    return "llava" if any(is_original_llava(adapter.folder) for adapter in adapters) else ""


def _as_the_inputs(adapters: Sequence[Adapter], family: str) -> dict[str, str]:
    """What the files say where they agree; else as the one says that has most modules,
    newest spelling first.
    """
    tables = [_spelled(adapter) for adapter in adapters]
    every = [item for table in tables for item in table.items()]
    out = dict(every)
    if all(out[key] == name for key, name in every):
        return out

    def order(k: int) -> tuple[int, int, str]:
        return (
            -len(tables[k]),
            -sum(name == key for key, name in tables[k].items()),
            adapters[k].digest,
        )

    ranked = sorted(range(len(adapters)), key=order)
    out = dict(tables[ranked[0]])
    known = (
        style
        for style in STYLES
        if all(respelled(key, style, family) == name for key, name in out.items())
    )
    style = next(known, None)
    for k in ranked[1:]:
        habits = _habits((name, out[key]) for key, name in tables[k].items() if key in out)
        for key, name in tables[k].items():
            out.setdefault(
                key, _translated(name, habits) if style is None else respelled(key, style, family)
            )
    return out


def _spelled(adapter: Adapter) -> dict[str, str]:
    """Key -> the name in the file, without wrappers."""
    table = {module.owner: plain(module.spelled) for module in adapter.modules.values()}
    beside = ((key, tensor.spelled) for key, tensor in adapter.saved.items())
    vectors = ((vector.name, vector.spelled) for vector in adapter.vectors.values())
    for key, spelled in (*beside, *vectors):
        table.setdefault(key.rpartition(".")[0], plain(spelled.rpartition(".")[0]))
    return table


def _habits(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Beginnings of names that differ between two spellings:
    one -> the other, from modules that both have.

    Each ends with the first part that both have, e.g. model.layers -> model.language_model.layers.
    """
    habits: dict[str, str] = {}
    for one, other in pairs:
        a, b = one.split("."), other.split(".")
        first: list[str] = []
        while a and b and a[-1] == b[-1]:
            first = [a.pop()]
            b.pop()
        if one != other:
            habits[".".join([*a, *first])] = ".".join([*b, *first])
    return habits


def _translated(name: str, habits: Mapping[str, str]) -> str:
    for old in sorted(habits, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return habits[old] + name[len(old) :]
    return name


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=4)
