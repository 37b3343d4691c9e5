"""Towers of one model whose modules have the same names: CLIP's text model and its vision model are
saved with `encoder.layers.0...` both, for a base of one name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sapmerge.errors import IncompatibleAdaptersError, ModelMismatchError
from sapmerge.io.adapter import Adapter
from sapmerge.naming import base_of

__all__ = ["base_class", "check_tower_of", "check_towers"]

_TOWER = re.compile(r"(Text|Vision|Audio)(?:Model|Transformer|Tower)")


def base_class(adapter: Adapter) -> str | None:
    """The class of the base model, where PEFT has written it down (for models without a task)."""
    written = adapter.config.get("auto_mapping")
    name = (
        cast("Mapping[str, object]", written).get("base_model_class")
        if isinstance(written, Mapping)
        else None
    )
    return name if isinstance(name, str) else None


def check_towers(adapters: Sequence[Adapter]) -> None:
    """Whether modules of one name belong to one tower, as far as the configs tell.

    Raises:
        IncompatibleAdaptersError: a module is one of a text model in one adapter, and one of a
            vision model in another.
    """
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        mine = base_class(adapter)
        if _tower(mine) is None:
            continue
        for name in adapter.modules:
            other = first.setdefault(name, adapter)
            if _tower(base_class(other)) != _tower(mine):
                raise IncompatibleAdaptersError(
                    f"module {name!r} is one of {base_class(other)} in {other.label!r} and one of "
                    f"{mine} in {adapter.label!r}: two towers whose modules have the same names; "
                    "merge the adapters of each tower alone"
                )


def check_tower_of(adapters: Sequence[Adapter], model: Any) -> None:
    """Whether a model is the tower that the adapters were trained on, as far as classes tell.

    Raises:
        ModelMismatchError: it is another one.
    """
    own = type(base_of(model)).__name__
    for adapter in adapters:
        mine = base_class(adapter)
        if None not in (_tower(own), _tower(mine)) and _tower(own) != _tower(mine):
            raise ModelMismatchError(
                f"adapter {adapter.label!r} was trained on {mine}, another tower than {own}, whose "
                "modules may have the same names"
            )


def _tower(name: str | None) -> str | None:
    found = None if name is None else _TOWER.search(name)
    return None if found is None else found[1]
