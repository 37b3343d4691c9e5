"""PEFT's format: what `sapmerge.io` reads and writes everywhere else."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from sapmerge.errors import AdapterFormatError
from sapmerge.io.files import DEFAULT_LIMITS, shown
from sapmerge.io.folder import BESIDE, check_readable, read_folder, which_weights
from sapmerge.io.formats.lora import Lora
from sapmerge.io.kinds.reading import Factors
from sapmerge.io.writing import CheckpointWriter

__all__ = ["read", "write"]

_PREFIX = "base_model.model."
_KINDS = ("linear", "conv", "embedding")


def read(path: str, allow_pickle: bool = False) -> tuple[dict[str, Lora], str | None]:
    """The factors by module, as they are stored, and the name of the base.

    Raises:
        AdapterFormatError: the adapter has something that other formats have no place for.
    """
    where = f"adapter {shown(path)}"
    name, beside = which_weights(os.path.abspath(path), where, allow_pickle)
    _, config, contents, _ = read_folder(os.path.abspath(path), name, where, DEFAULT_LIMITS)
    contents.check_values(path)
    others = [*contents.saved, *contents.vectors, *([BESIDE] if beside else [])]
    if others:
        raise AdapterFormatError(
            f"{where}: {shown(min(others))} is no LoRA, and other formats have no place for it"
        )
    found = dict[str, Lora]()
    for key, module in contents.modules.items():
        reading = contents.readings[key]
        if module.kind not in _KINDS or not isinstance(reading, Factors) or reading.e is not None:
            kind = module.method or module.kind
            raise AdapterFormatError(
                f"{where}: {shown(key)} is of the kind {shown(kind)}, which other formats do not "
                "have"
            )
        a, b = contents.weights.read(reading.a), contents.weights.read(reading.b)
        alpha = module.scaling * module.rank
        found[module.spelled.removeprefix(_PREFIX)] = Lora(a, b, alpha, module.kind)
    return found, config.base_model


def write(
    path: str | os.PathLike[str],
    modules: Mapping[str, Lora],
    base_model: str | None,
    source: str,
    overwrite: bool,
) -> None:
    """Write a checkpoint folder: the factors as they are, scalings in the config.

    Args:
        source: what it was converted from, for its card.
    """
    ranks = {name: lora.rank for name, lora in modules.items()}
    alphas = {name: _plain(lora.alpha) for name, lora in modules.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _odd(ranks, rank),
        "alpha_pattern": _odd(alphas, alpha),
        "target_modules": sorted(modules),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    head = f"---\nbase_model: {base_model}\nlibrary_name: peft\n---\n\n" if base_model else ""
    card = f"{head}# A LoRA adapter\n\nConverted by sapmerge from {source}.\n"
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        for name, lora in modules.items():
            letters = ("embedding_A", "embedding_B") if lora.kind == "embedding" else ("A", "B")
            weight = "" if lora.kind == "embedding" else ".weight"
            for letter, tensor in zip(letters, (lora.a, lora.b), strict=True):
                writer.add(f"{_PREFIX}{name}.lora_{letter}{weight}", tensor)
        writer.commit(config=config, metadata={}, card=card, check=check_readable)


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _usual(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _odd(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Patterns of PEFT that mean one module each."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}
