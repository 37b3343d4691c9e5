"""One name per module: transformers 5 renamed modules of vision models, and files of both spellings exist.

PEFT and transformers rename tensors when they load them into a model; without a model nobody does. The table covers
what can be told from the names alone. Sources: `transformers/conversion_mapping.py` ("ViTModel", "Dinov2Model",
"llava").
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["canonical"]

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_VIT = re.compile(
    r"(?P<head>(?:.*\.)?(?:vit|deit|beit|ijepa|vivit|audio_spectrogram_transformer|(?P<dino>dinov2|dinov2_with_registers))\.)"
    r"encoder\.layer\.(?P<layer>\d+)\."
    r"(?:attention\.attention\.(?P<part>query|key|value)|(?P<tail>attention\.output|intermediate|output)\.dense)"
)
_TAILS = {"attention.output": "attention.o_proj", "intermediate": "mlp.fc1", "output": "mlp.fc2"}
_LLAVA = (
    ("language_model.lm_head", "lm_head"),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
# BLIP models keep `language_model.model.` in transformers 5, and YOLOS keeps ViT's old names.
_KEEP = ("blip", "yolos")


def canonical(name: str, config: Mapping[str, object]) -> str:
    """The module's name in transformers 5, where it can be told; otherwise the name itself.

    Args:
        name: without "base_model.model.".
        config: the adapter's config; only the name of its base model is looked at.

    Example:
        >>> canonical("vit.encoder.layer.0.attention.attention.query", {})
        'vit.layers.0.attention.q_proj'
        >>> canonical("language_model.model.layers.0.mlp.up_proj", {})
        'model.language_model.layers.0.mlp.up_proj'
        >>> canonical("bert.encoder.layer.0.output.dense", {})
        'bert.encoder.layer.0.output.dense'
    """
    base = str(config.get("base_model_name_or_path")).lower()
    if any(family in base for family in _KEEP):
        return name
    found = _VIT.fullmatch(name)
    if found is not None:
        stack = "encoder.layer" if found["dino"] else "layers"
        if found["part"]:
            return f"{found['head']}{stack}.{found['layer']}.attention.{_ATTENTION[found['part']]}"
        if found["tail"] == "attention.output" or not found["dino"]:
            return f"{found['head']}{stack}.{found['layer']}.{_TAILS[found['tail']]}"
        return name
    for old, new in _LLAVA:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
