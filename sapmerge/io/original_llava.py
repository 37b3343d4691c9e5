"""How one knows a checkpoint of the original code of LLaVA: it has the config of its model beside
the adapter.
"""

from __future__ import annotations

import os

from sapmerge.errors import SapmergeError
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile
from sapmerge.io.strict_json import parse

__all__ = ["MODEL_CONFIG", "is_original_llava"]

MODEL_CONFIG = "config.json"
_KINDS = ("llava_llama", "llava_mistral", "llava_qwen", "llava_mpt", "llava")


def is_original_llava(folder: str | None) -> bool:
    """Whether `config.json` in the folder of an adapter is that of the original LLaVA code.

    Args:
        folder: None, or without such a file, or with one that cannot be read: False.
    """
    path = os.path.join(folder or "", MODEL_CONFIG)
    if folder is None or not os.path.lexists(path):
        return False
    try:
        with RegularFile(path, MODEL_CONFIG) as file:
            raw = bytes(file.read(0, min(file.size, DEFAULT_LIMITS.config_bytes + 1)))
        config = parse(raw, MODEL_CONFIG, DEFAULT_LIMITS)
    except SapmergeError:
        return False
    # transformers' own LLaVA has model_type "llava" too, and no mm_projector_type
    return config.get("model_type") in _KINDS and (
        config.get("model_type") != "llava" or "mm_projector_type" in config
    )
