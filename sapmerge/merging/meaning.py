"""Merges that are valid and can hardly be meant: they go through, with a warning that names
the adapter.

What headers and the norms of factors tell is said before any work. The energy of whole adapters
needs reading: before the work only where the norms raise a suspicion, else when it is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, cast

from sapmerge.core.lowrank import gram
from sapmerge.core.part import parts
from sapmerge.core.protocols import Method
from sapmerge.errors import warn
from sapmerge.io.adapter import Adapter
from sapmerge.io.base_names import is_here, is_path
from sapmerge.merging.inputs import Base
from sapmerge.merging.report import LayerReport
from sapmerge.merging.stream import AdapterLayers
from sapmerge.parts.mergers.robust import GeometricMedian, Krum
from sapmerge.parts.outliers import CapShare, ClipNorms, ExcludeOutliers

__all__ = ["say_of_inputs", "say_of_result", "written_base"]

_LOUD = 0.99  # of the energy, above which one adapter drowns the others
_SUSPECT = 0.9  # of the bound of the energy: it is above the energy by a factor of the rank at most
_LEFT = 0.01  # of the norm, below which a result has cancelled
_BOUNDING = (CapShare, ClipNorms, ExcludeOutliers, GeometricMedian, Krum)
_SHOWN = 3


def written_base(base: Base, adapters: Sequence[Adapter], given: str | None, model: Any) -> Base:
    """The base that the output names; no place on somebody else's disk.

    Args:
        base: what the adapters name.
        given: `base_model` of the call, which is written as it is.
        model: of the merge, or its folder, which tells whether the adapters fit; or None.
    """
    if given is not None:
        return base
    unnamed = [adapter.label for adapter in adapters if not adapter.base_model]
    files = [adapter.label for adapter in adapters if adapter.folder is not None]
    if base.name is None and model is None and set(unnamed) & set(files):
        warn(
            f"no adapter names its base model ({_listed(unnamed)}): whether they fit each other is "
            "not known, and the output names none. base_model='...' does"
        )
    if base.name is not None and is_path(base.name):
        here = is_here(base.name)
        warn(
            f"the adapters' base is {base.name!r}, a place on somebody's disk: the model card does "
            f"not name it, {'but the config does' if here else 'nor does the config'}. "
            "base_model='...' says what it is"
        )
        return base if here else Base(None, None)
    return base


def say_of_inputs(layers: AdapterLayers, method: Method) -> frozenset[str]:
    """Warn of adapters without an update, of one that drowns the others, of two that cancel.

    Returns:
        What was said: "loud", "cancel"; it need not be said again of the result.
    """
    _say_untrained(layers)
    reaches = _reaches(layers)
    if reaches is None or not layers.can_be_held():
        return frozenset()
    said = set[str]()
    with layers.holding():
        suspect = _share([math.hypot(*one) for one in reaches]) > _SUSPECT
        if (
            suspect
            and not _bounds_influence(method)
            and _say_loud(layers.adapters, layers.weights, _norms(layers))
        ):
            said.add("loud")
        if _may_cancel(reaches) and _cancel(layers):
            first, second = (adapter.label for adapter in layers.adapters)
            warn(
                f"{first!r} and {second!r} cancel: times their weights, one is the other's "
                "negative. A merge of the two is zero or close to it"
            )
            said.add("cancel")
    return frozenset(said)


def say_of_result(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method,
    scale: float,
    rows: Sequence[LayerReport],
    said: frozenset[str],
) -> None:
    """Warn of a result that cancelled, and of one adapter that drowned the others, once the
    layers were merged.

    Args:
        said: what `say_of_inputs` has said.
    """
    if not rows or not is_dataclass(
        cast("object", method)
    ):  # of a user's own function nobody knows what is meant
        return
    energies = [sum(row.energies[adapter.label] for row in rows) for adapter in adapters]
    norms = [
        math.sqrt(energy) / abs(weight) if weight else 0.0
        for energy, weight in zip(energies, weights, strict=True)
    ]
    if "loud" not in said and not _bounds_influence(method):
        _say_loud(adapters, weights, norms)
    # A mean divides by the sum of the weights, a sum does not.
    there = [math.sqrt(energy) for energy in energies if energy > 0]
    if len(there) < 2 or "cancel" in said or not scale:
        return
    wanted = abs(scale) * min(there) / max(1.0, sum(map(abs, weights)))
    result = math.hypot(*(row.norm for row in rows))
    if result < _LEFT * wanted:
        warn(
            f"the merged update is {result / wanted:.2%} as long as its shortest input would be "
            "alone: the adapters cancel, or the method drops nearly all of them"
        )


def _bounds_influence(method: Method) -> bool:
    """Whether a method bounds what one adapter can bring."""
    return any(isinstance(step, _BOUNDING) for step in parts(method))


def _say_untrained(layers: AdapterLayers) -> None:
    for adapter in layers.adapters:
        if not (adapter.saved or adapter.vectors) and not any(map(adapter.reach, adapter.modules)):
            warn(
                f"the update of {adapter.label!r} is zero in all its {len(adapter.modules)} layers "
                "(lora_B is as it is initialised): it was never trained, or its training was not "
                "saved. A mean counts it"
            )


def _reaches(layers: AdapterLayers) -> list[list[float]] | None:
    """Per adapter the bounds of |w| ||D|| in every layer; None where the base decides."""
    found = [
        [
            abs(weight) * adapter.reach(name) if name in adapter.modules else 0.0
            for name in layers.modules
        ]
        for adapter, weight in zip(layers.adapters, layers.weights, strict=True)
    ]
    return found if all(math.isfinite(bound) for one in found for bound in one) else None


def _share(norms: Sequence[float]) -> float:
    """The largest share of the energy, of several adapters that are not zero; else 0."""
    there = [norm for norm in norms if norm > 0]
    return (max(there) / math.hypot(*there)) ** 2 if len(there) > 1 else 0.0


def _norms(layers: AdapterLayers) -> list[float]:
    squares = [0.0] * len(layers.adapters)
    for layer in layers:
        for k, update in enumerate(layer.updates):
            squares[k] += update.norm() ** 2
    return [math.sqrt(square) for square in squares]


def _say_loud(
    adapters: Sequence[Adapter], weights: Sequence[float], norms: Sequence[float]
) -> bool:
    """Warn of an adapter that drowns the others by itself, and not by the weights alone."""
    weighted = [abs(weight) * norm for weight, norm in zip(weights, norms, strict=True)]
    if min(_share(norms), _share(weighted)) <= _LOUD:
        return False
    loudest = max(range(len(weighted)), key=weighted.__getitem__)
    warn(
        f"{adapters[loudest].label!r} brings {_share(weighted):.2%} of the energy of the merge: "
        "what others bring hardly counts. Look at its lora_alpha, weigh it less (weights=...), or "
        "bound it: CapShare(method, share), ClipNorms(method)"
    )
    return True


def _may_cancel(reaches: Sequence[Sequence[float]]) -> bool:
    """Whether there are two adapters whose bounds agree in every layer."""
    if len(reaches) != 2 or not any(reaches[0]):
        return False
    return all(abs(a - b) <= _LEFT * max(a, b) for a, b in zip(*reaches, strict=True))


def _cancel(layers: AdapterLayers) -> bool:
    """Whether the weighted updates of two adapters are opposite; ends at a layer where they are
    not.
    """
    left = whole = 0.0
    a, b = layers.weights
    for layer in layers:
        products = gram(layer.updates)
        size = a * a * float(products[0, 0])
        rest = size + b * b * float(products[1, 1]) + 2 * a * b * float(products[0, 1])
        if rest > _LEFT * size:
            return False
        left, whole = left + rest, whole + size
    return left < _LEFT**2 * whole


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    return ", ".join(map(repr, labels[:_SHOWN])) + more
