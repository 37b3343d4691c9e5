"""Experts in two spellings: a bank (one parameter of three dimensions) and a module per expert."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sapmerge.errors import IncompatibleAdaptersError
from sapmerge.io.adapter import Adapter

__all__ = ["check_experts"]

_ONE = re.compile(r"(?P<bank>.+\.experts)\.\d+\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)")
_PARAMETER = {"w2": "down_proj", "down_proj": "down_proj"}  # the others are parts of gate_up_proj


def check_experts(adapters: Sequence[Adapter]) -> None:
    """Refuse a bank of experts beside modules of the same experts: they are one weight, and PEFT
    has no output that holds both.

    Raises:
        IncompatibleAdaptersError: names both.
    """
    banks = {
        (module.owner.replace("block_sparse_moe", "mlp"), module.parameter): (module, adapter)
        for adapter in adapters
        for module in adapter.modules.values()
        if module.kind == "parameter"
    }
    for adapter in adapters if banks else ():
        for module in adapter.modules.values():
            one = _ONE.fullmatch(module.owner) if module.kind == "linear" else None
            if one is None:
                continue
            owner = one["bank"].replace("block_sparse_moe", "mlp")
            found = banks.get((owner, _PARAMETER.get(one["leaf"], "gate_up_proj")))
            if found is not None:
                bank, other = found
                raise IncompatibleAdaptersError(
                    f"{module.owner!r} of {adapter.label!r} is a part of the bank "
                    f"{bank.parameter!r} of {bank.owner!r} in {other.label!r}: one weight in two "
                    "spellings, and no output holds both. Merge each into the base with PEFT, or "
                    "train both with target_parameters"
                )
