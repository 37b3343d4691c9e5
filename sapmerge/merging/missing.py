"""With the base at hand: modules that an adapter's config selects and its file does not have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sapmerge.errors import warn
from sapmerge.io.adapter import Adapter
from sapmerge.io.base_folder import BaseFolder
from sapmerge.io.files import DEFAULT_LIMITS
from sapmerge.io.patterns import Budget, Selection
from sapmerge.naming import Names

__all__ = ["say_what_is_missing"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHOWN = 3


def say_what_is_missing(adapters: Sequence[Adapter], base: Any) -> None:
    """Warn of adapters that are half of a checkpoint: `target_modules` selects a layer of the base
    that has no tensors, while another layer of the same stack has.

    Args:
        adapters: with the base's keys.
        base: the model, or the folder of its weights; None without one.
    """
    if base is None:
        return
    if isinstance(base, BaseFolder):
        keys = list(base.modules())
    else:
        own = Names(base)
        keys = [key for key in own.paths if _NUMBER.search(key) and own.shape(key) is not None]
    for adapter in adapters:
        missing = _missing(adapter, keys)
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            warn(
                f"{adapter.label!r} is half of a checkpoint: its config selects "
                f"{', '.join(map(repr, missing[:_SHOWN]))}{more} of the base, and it has no "
                "tensors of them. A shard may not have been written"
            )


def _missing(adapter: Adapter, keys: Sequence[str]) -> list[str]:
    """Keys of the base that the adapter should have, as its config sees them."""
    stacks = {
        _stack(module.owner): module.spelled
        for module in adapter.modules.values()
        if module.kind in ("linear", "conv") and module.owner == module.name
    }
    mine = {module.owner for module in adapter.modules.values()} | {
        tensor.rpartition(".")[0] for tensor in adapter.saved
    }
    absent = [
        (key, stacks[_stack(key)]) for key in keys if key not in mine and _stack(key) in stacks
    ]
    if not absent:
        return []
    chosen = adapter.settings
    selection = Selection(
        chosen.targets,
        chosen.excluded,
        chosen.layers,
        chosen.layers_pattern,
        (*chosen.saved, *chosen.heads),
        Budget(DEFAULT_LIMITS, f"adapter {adapter.label!r}"),
    )
    return [key for key, spelled in absent if selection.why_not(_like(spelled, key)) is None]


def _stack(name: str) -> str:
    """The name without its numbers."""
    return _NUMBER.sub("*", name)


def _like(spelled: str, key: str) -> str:
    """The name of a module of the same stack in a file, with the numbers of a key."""
    numbers = _NUMBER.findall(key)
    if len(numbers) != len(_NUMBER.findall(spelled)):
        return key
    return _NUMBER.sub(lambda _: numbers.pop(0), spelled)
