"""What `merge` and `inspect` accept as adapters,
and whether those can be merged with each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch

from sapmerge.core.scalars import plain
from sapmerge.errors import IncompatibleAdaptersError, MethodError, warn
from sapmerge.io.adapter import Adapter
from sapmerge.io.base_folder import BaseFolder
from sapmerge.io.base_names import one_base
from sapmerge.io.files import shown
from sapmerge.io.modules import BaseWeights, Module
from sapmerge.merging.towers import base_class, check_towers
from sapmerge.models import ModelWeights

__all__ = [
    "AdapterLike",
    "Adapters",
    "as_given",
    "check_device",
    "check_mergeable",
    "check_numbers",
    "in_content_order",
    "load_adapters",
    "open_base",
    "resolve_weights",
    "sharing",
    "weights_of",
    "with_base",
]

AdapterLike: TypeAlias = "Adapter | str | os.PathLike[str] | tuple[Any, Mapping[str, Any]]"
"""A folder, an `Adapter`, the name of an adapter in the live PeftModel given as `model`,
or (config, state_dict).
"""
Adapters: TypeAlias = "Sequence[AdapterLike] | Mapping[str, AdapterLike]"


def load_adapters(
    adapters: Adapters,
    model: Any = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
) -> list[Adapter]:
    """The adapters, opened and checked, each with a label of its own.

    Args:
        adapters: a sequence, or a mapping label -> adapter.
        model: where adapters given by name live, if it is a PeftModel.
        weights: of the merge: they tell copies of one adapter apart.

    Raises:
        MethodError: not a sequence or mapping, or empty.
        SapmergeError: whatever `Adapter.load` refuses.
    """
    if isinstance(adapters, (str, os.PathLike, Adapter)):
        raise MethodError(
            "merge takes a list of adapters or a mapping label -> adapter; got the single "
            f"{adapters!r}"
        )
    if isinstance(adapters, Mapping):
        opened = sharing(_open(adapter, model, str(label)) for label, adapter in adapters.items())
    elif isinstance(adapters, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        opened = sharing(_open(adapter, model, None) for adapter in adapters)
    else:
        raise MethodError(
            f"merge takes a list of adapters or a mapping label -> adapter; got {shown(adapters)}"
        )
    if not opened:
        raise MethodError("there are no adapters to merge: the list is empty")
    return _uniquely_labelled(opened, weights)


def sharing(adapters: Iterable[Adapter]) -> list[Adapter]:
    """The adapters, with one table of modules for all that have the same: a thousand of them would
    hold hundreds of megabytes of names and shapes.
    """
    found: list[Adapter] = []
    for adapter in adapters:
        found.append(adapter.sharing(found[0]) if found else adapter)
    return found


def _open(adapter: Any, model: Any, label: str | None) -> Adapter:
    if isinstance(adapter, Adapter):
        return adapter if label is None else adapter.relabelled(label)
    if isinstance(adapter, str) and adapter in _live_names(model):
        if os.path.exists(adapter):
            raise MethodError(
                f"{adapter!r} is an adapter of the model and a folder too; say which: "
                f"Adapter.from_peft_model(model, {adapter!r}) or Adapter.load({adapter!r})"
            )
        return Adapter.from_peft_model(model, adapter, label=label)
    if isinstance(adapter, (str, os.PathLike)):
        return Adapter.load(cast("str | os.PathLike[str]", adapter), label=label)
    if isinstance(adapter, tuple) and len(cast("tuple[Any, ...]", adapter)) == 2:
        config, state_dict = cast("tuple[Any, Mapping[str, Any]]", adapter)
        return Adapter.from_state_dict(config, state_dict, label=label)
    raise MethodError(
        "an adapter is a folder, an Adapter, the name of an adapter in a live PeftModel, or "
        f"(config, state_dict); got {type(cast('object', adapter)).__name__}"
    )


def _live_names(model: Any) -> Mapping[str, Any]:
    names = getattr(model, "peft_config", None)
    return cast("Mapping[str, Any]", names) if isinstance(names, Mapping) else {}


def _uniquely_labelled(
    adapters: list[Adapter], weights: Sequence[float] | Mapping[str, float] | None
) -> list[Adapter]:
    """Number equal labels: a, a-2, a-3; by content and weight,
    so that the order of the inputs decides on nothing.
    """
    places = {} if isinstance(weights, Mapping) else dict[int, object](enumerate(weights or ()))
    taken = {adapter.label for adapter in adapters}
    seen, unique = set[str](), dict[int, Adapter]()
    for k in sorted(
        range(len(adapters)), key=lambda k: in_content_order(adapters[k], _weight(places.get(k)))
    ):
        label = adapters[k].label
        if label in seen:
            numbered = (f"{label[:60]}-{number}" for number in range(2, len(adapters) + 2))
            label = next(candidate for candidate in numbered if candidate not in taken)
            taken.add(label)
        seen.add(label)
        unique[k] = adapters[k].relabelled(label)
    return [unique[k] for k in range(len(adapters))]


def _weight(value: object) -> float:
    # others are refused later
    return float(value) if isinstance(value, (int, float)) and is_finite(value) else 0.0


def in_content_order(adapter: Adapter, weight: float) -> tuple[object, ...]:
    """What adapters are sorted by, everywhere: two with the same key are the same for every
    bit of an output.
    """
    return adapter.digest, weight, adapter.label, sorted(adapter.files.items())


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float; Python's integers may be larger than any."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def as_given(
    weights: Sequence[float] | Mapping[str, float] | None,
) -> list[float] | Mapping[str, float] | None:
    """The weights of `merge` as a list, a mapping or None.

    Raises:
        MethodError: anything else.
    """
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        return {label: plain(weight) for label, weight in weights.items()}
    if isinstance(weights, str) or not isinstance(weights, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(
            "weights are one number per adapter, or a mapping label -> number; got "
            f"{shown(weights)}"
        )
    return [plain(weight) for weight in weights]


def resolve_weights(
    weights: Sequence[float] | Mapping[str, float] | None, adapters: Sequence[Adapter]
) -> list[float]:
    """One finite number per adapter.

    Raises:
        MethodError: another count, an unknown label, or something that is not a finite number.
    """
    labels = [adapter.label for adapter in adapters]
    if weights is None:
        return [1.0] * len(labels)
    if isinstance(weights, Mapping):
        if set(weights) != set(labels):
            raise MethodError(
                f"weights name {shown(list(weights))}, the adapters are {sorted(labels)}"
            )
        values: list[Any] = [plain(weights[label]) for label in labels]
    else:
        values = [plain(value) for value in weights]
    if len(values) != len(labels):
        raise MethodError(
            f"{len(labels)} adapters ({', '.join(labels)}) need as many weights; got {len(values)}"
        )
    for label, value in zip(labels, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
            raise MethodError(
                f"the weight of {label!r} must be a finite number; got {shown(value)}"
            )
    numbers = [float(value) for value in values]
    largest = torch.finfo(torch.float32).max
    if sum(abs(number) / largest for number in numbers) > 1:
        raise MethodError(
            f"the weights {numbers} are too large: together they must be finite in float32"
        )
    return numbers


def with_base(adapters: Sequence[Adapter], model: Any) -> list[Adapter]:
    """The adapters, with the weights of the base at hand where a kind needs them (DoRA, PiSSA).

    Raises:
        MethodError: one needs them, and there is no model.
        ModelMismatchError: the model is not the adapters' base.
    """
    needing = {
        m.name: (m, a) for a in adapters for m in a.modules.values() if m.needs_base is not None
    }
    if not needing:
        return list(adapters)
    module, adapter = next(iter(needing.values()))
    if model is None:
        raise MethodError(
            f"adapter {adapter.label!r}, module {module.name!r}: {module.needs_base}; its update "
            "can only be told with the base model at hand: merge(adapters, model=model)"
        )
    weights = weights_of(model, {name: module for name, (module, _) in needing.items()})
    assert weights is not None
    return [adapter.with_base(weights) for adapter in adapters]


def open_base(model: Any) -> BaseFolder | None:
    """The folder of a base, where `model` is a path."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    path = cast("str | os.PathLike[str]", model)
    if not os.path.isdir(path):
        raise MethodError(
            "model must be a torch module, or the folder of the base model's weights; "
            f"{os.fspath(path)!r} is no folder"
        )
    return BaseFolder(path)


def weights_of(model: Any, wanted: Mapping[str, Module] | None = None) -> BaseWeights | None:
    """The weights of a base model, if there is one.

    Args:
        wanted: the layers whose matrices will be asked for.
    """
    if model is None or isinstance(model, BaseFolder):
        return model
    return ModelWeights(model, wanted or {})


@dataclass(frozen=True)
class Base:
    """The base model that the merged adapter belongs to."""

    name: str | None
    revision: str | None


def check_mergeable(adapters: Sequence[Adapter], base_model: str | None = None) -> Base:
    """Whether the adapters are for one base model and agree on every module;
    headers only, no tensor is read.

    Args:
        adapters: what is to be merged.
        base_model: which base the output is for, when the adapters name different ones.

    Raises:
        IncompatibleAdaptersError: different bases or revisions without `base_model`, or a module of
            another shape or kind.
    """
    if base_model is not None and not isinstance(base_model, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(
            f"base_model is the name of a model; got a {type(base_model).__name__}. A model is "
            "model=..."
        )
    base = _common_base(adapters, base_model)
    tasks = {adapter.label: adapter.task_type for adapter in adapters if adapter.task_type}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"{label}: {task}" for label, task in tasks.items())
        warn(f"the adapters were trained for different tasks ({listed})")
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            other = first.setdefault(name, adapter)
            known = other.modules[name]
            if (known.kind, known.shape) != (module.kind, module.shape):
                raise IncompatibleAdaptersError(
                    f"module {name!r} is {known.kind} {known.shape} in {other.label!r} but "
                    f"{module.kind} "
                    f"{module.shape} in {adapter.label!r}: the adapters are for different models"
                )
            if (known.experts, known.parameter) != (module.experts, module.parameter):
                raise IncompatibleAdaptersError(
                    f"{known.owner!r} has {known.experts} experts in {other.label!r}, "
                    f"{module.experts} in {adapter.label!r}"
                )
            if known.kind == "conv" and known.a_shape[1:] != module.a_shape[1:]:
                raise IncompatibleAdaptersError(
                    f"module {name!r} is a convolution with kernel {known.a_shape[1:]} in "
                    f"{other.label!r} but {module.a_shape[1:]} in {adapter.label!r}"
                )
    check_towers(adapters)
    return base


def _common_base(adapters: Sequence[Adapter], base_model: str | None) -> Base:
    if base_model is not None:
        same = [adapter for adapter in adapters if adapter.base_model == base_model]
        revisions = {_revision(adapter) for adapter in same}
        return Base(base_model, revisions.pop() if len(revisions) == 1 else None)
    named = {adapter.label: adapter.base_model for adapter in adapters if adapter.base_model}
    one = one_base(list(named.values())) if len(set(named.values())) > 1 else None
    if one is not None:
        listed = ", ".join(f"{label}: {value!r}" for label, value in named.items())
        warn(
            f"the adapters name copies of one base ({listed}), which differ by the rounding of "
            f"their weights; the output names {one!r}"
        )
        named = dict.fromkeys(named, one)
    for what, values in (
        ("base models", named),
        (
            "revisions of the base model",
            {adapter.label: _revision(adapter) for adapter in adapters},
        ),
    ):
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{label}: {value!r}" for label, value in values.items())
            raise IncompatibleAdaptersError(
                f"the adapters name different {what} ({listed}); if they do fit one base, say "
                "which: base_model='...'"
            )
    classes = {adapter.label: base_class(adapter) for adapter in adapters if base_class(adapter)}
    unnamed = [adapter.label for adapter in adapters if not adapter.base_model]
    if len(set(classes.values())) > 1 and unnamed:
        listed = ", ".join(f"{label}: {value}" for label, value in classes.items())
        raise IncompatibleAdaptersError(
            f"the adapters were trained on different models ({listed}), and {unnamed} name no "
            "base; if they do fit one base, say which: base_model='...'"
        )
    name = next(iter(named.values()), None)
    return Base(name, _revision(adapters[0]))


def _revision(adapter: Adapter) -> str | None:
    return None if adapter.revision in (None, "main") else adapter.revision


def check_device(device: torch.device | str | int | None) -> torch.device:
    """The device to compute on; an error if this machine has none of the kind."""
    if isinstance(device, bool):
        raise MethodError(
            f"device={device!r} is no device; expected 'cpu', 'cuda', a number of a GPU, or None"
        )
    try:
        checked = torch.device("cpu" if device is None else device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise MethodError(f"device={shown(device)} cannot be used: {error}") from None
    if checked.type == "meta":
        raise MethodError("device='meta' holds no numbers: nothing can be computed there")
    return checked


def check_numbers(scale: float, rank: int | float | str | None) -> None:
    """Whether `scale` and `rank` of `merge` are what they may be."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not is_finite(scale):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(f"scale must be a finite number; got {shown(scale)}")
    fine = rank is None or rank == "exact"
    if isinstance(rank, int) and not isinstance(rank, bool):
        fine = rank >= 1
    elif isinstance(rank, float):
        fine = 0 < rank < 1
    if not fine or isinstance(rank, bool):
        raise MethodError(
            "rank is None, a number >= 1, a share of energy in (0, 1), or 'exact'; got "
            f"{shown(rank)}"
        )
