"""AdaLoRA: B diag(E) A, where training has cut the rank of every module.
A LoRA, once E is multiplied into A.

PEFT scales it by lora_alpha / (rank at the start + 1e-5), or by 1 where lora_alpha is not positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from sapmerge.errors import AdapterConfigError
from sapmerge.io.files import shown

__all__ = ["as_lora", "scaling_of"]

# Keys that steered the training; nothing of the update is left in them.
_TRAINING = (
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
)
_LEAVES = (".lora_E", ".lora_A", ".lora_B")


def as_lora(config: Mapping[str, object], where: str) -> dict[str, object]:
    """The config as a plain LoRA's: `init_r` is the rank,
    `rank_pattern` gives the ranks that were left.

    Raises:
        AdapterConfigError: `init_r` or `rank_pattern` is not what AdaLoRA writes.
    """
    start = config.get("init_r")
    if isinstance(start, bool) or not isinstance(start, int) or start < 1:
        raise AdapterConfigError(
            f"{where}: 'init_r' is {shown(start)}, expected a positive whole number"
        )
    kept = {
        key: value
        for key, value in config.items()
        if key not in (*_TRAINING, "init_r", "rank_pattern")
    }
    return kept | {
        "peft_type": "LORA",
        "r": start,
        "rank_pattern": _ranks(config.get("rank_pattern"), where),
    }


def _ranks(pattern: object, where: str) -> dict[str, int]:
    """Module -> the rank that is left, from the masks that PEFT stores."""
    if pattern is None:
        return {}
    masks = cast("Mapping[str, object]", pattern) if isinstance(pattern, Mapping) else {"": None}
    ranks: dict[str, int] = {}
    for name, mask in masks.items():
        flags = cast("list[object]", mask) if isinstance(mask, list) else [None]
        if not all(isinstance(flag, bool) for flag in flags):
            raise AdapterConfigError(
                f"{where}: 'rank_pattern' of {shown(name)} is not a list of true and false"
            )
        module = next((name.partition(leaf)[0] for leaf in _LEAVES if leaf in name), name)
        ranks[module] = sum(map(bool, flags))
    return ranks


def scaling_of(alpha: float, start: int) -> float:
    """What PEFT multiplies B diag(E) A by.

    Args:
        alpha: lora_alpha.
        start: the rank that training began with.
    """
    return (alpha if alpha > 0 else float(start)) / (start + 1e-5)
