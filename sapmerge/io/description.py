"""What a config says about an adapter that cannot be read."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sapmerge.errors import SapmergeError
from sapmerge.io.adapter import label_from
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, shown
from sapmerge.io.folder import CONFIG
from sapmerge.io.strict_json import parse

__all__ = ["Described", "describe_config"]


@dataclass(frozen=True)
class Described:
    """A refused adapter, by its config."""

    label: str
    source: str
    base_model: str | None
    peft_type: str
    rank: str


def describe_config(path: str | os.PathLike[str]) -> Described | None:
    """What a folder's config says; None if it has none that can be read."""
    source = os.fsdecode(path)
    where = f"adapter {shown(source)}, {CONFIG}"
    try:
        with RegularFile(os.path.join(source, CONFIG), where) as file:
            raw = bytes(file.read(0, min(file.size, DEFAULT_LIMITS.config_bytes + 1)))
        config = parse(raw, where, DEFAULT_LIMITS)
    except SapmergeError:
        return None
    base, rank = config.get("base_model_name_or_path"), config.get("r", config.get("init_r"))
    return Described(
        label=label_from(os.path.basename(os.path.abspath(source))),
        source=source,
        base_model=shown(base)[1:-1] if isinstance(base, str) else None,
        peft_type=shown(config.get("peft_type"), 40).strip("'"),
        rank=str(rank) if isinstance(rank, int) and abs(rank) < 10**9 else "-",
    )
