"""Keys of modules, held against the classes of transformers and its own table of
renamed weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from torch import nn

from sapmerge.io.names import FAMILIES, STYLES, Stem, alike, canonical, plain, respelled, stem
from sapmerge.models import Names

transformers = pytest.importorskip("transformers")
# SAPMERGE_ALL_CLASSES=1 holds the table against every class (four minutes); otherwise every 40th,
# and these.
EVERY = 1 if os.environ.get("SAPMERGE_ALL_CLASSES") else 40
CHOSEN = (
    "ASTForAudioClassification",
    "CLIPModel",
    "CLIPVisionModel",
    "DeiTForImageClassification",
    "Dinov2ForImageClassification",
    "Gemma3Model",
    "InternVLForConditionalGeneration",
    "InternVLModel",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaModel",
    "LlavaNextForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "SegformerForImageClassification",
    "SwinForImageClassification",
    "VideoLlavaForConditionalGeneration",
    "ViTForImageClassification",
    "YolosForObjectDetection",
)


def classes() -> list[str]:
    """Names of classes with a head or without one, from the tables of the auto classes."""
    from transformers.models.auto import modeling_auto

    found = set(CHOSEN)
    tables = [
        table
        for name, table in vars(modeling_auto).items()
        if name.startswith("MODEL_") and name.endswith("_NAMES")
    ]
    every = {
        one
        for table in tables
        for name in table.values()
        for one in ([name] if isinstance(name, str) else name)
    }
    return sorted(found | set(sorted(every)[::EVERY]))


@lru_cache(maxsize=4)
def built(name: str) -> nn.Module:
    """The class from its default config, without memory."""
    try:
        cls = getattr(transformers, name)
        with torch.device("meta"):
            return cls(cls.config_class())
    except Exception as error:
        pytest.skip(f"{name} cannot be built from its default config: {type(error).__name__}")


def true_names(model: nn.Module) -> Iterator[str]:
    """Names of what an adapter can change."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (name for name, module in model.named_modules() if name and isinstance(module, kinds))


@pytest.mark.parametrize("name", classes())
def test_no_true_name_is_taken_for_another(name: str) -> None:
    """Different modules have different keys, none are taken for two spellings of one,
    and each is found as itself.
    """
    model = built(name)
    names = list(true_names(model))
    keys = {canonical(one): one for one in names}
    assert len(keys) == len(names)
    assert [one for one in names if plain(one) != one] == []
    by_path: dict[str, list[str]] = {}
    for key in keys:
        by_path.setdefault(stem(key).path, []).append(key)
    assert [
        group
        for group in by_path.values()
        if any(alike(a, b) for a in group for b in group if a != b)
    ] == []
    own = Names(model)
    assert own.locate(dict.fromkeys(keys)) == {key: key for key in keys}
    assert {key: own.plain[own.paths[key]] for key in keys} == keys


@pytest.mark.parametrize("name", CHOSEN)
def test_the_table_agrees_with_that_of_transformers(name: str) -> None:
    """What transformers calls a weight in a file of version 4 leads to the module
    that has it now.
    """
    loading = pytest.importorskip("transformers.core_model_loading")
    if not hasattr(loading, "revert_weight_conversion"):
        pytest.skip("the installed transformers renames nothing")
    model = built(name)
    own, changed, inner = Names(model), 0, name.endswith("Model")
    for one in true_names(model):
        module = model.get_submodule(one)
        old = list(loading.revert_weight_conversion(model, {f"{one}.weight": module.weight}))
        if len(old) == 1:
            key, was = canonical(one), canonical(old[0].removesuffix(".weight"))
            changed += old[0] != f"{one}.weight"
            assert own.locate({was: None}) == {was: key}, (one, old)
            assert was == key or alike(was, key), (one, old)
    assert changed or inner or name in ("Llama4ForConditionalGeneration", "YolosForObjectDetection")


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("module.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("_orig_mod.module.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        (
            "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj",
            "model.layers.0.mlp.up_proj",
        ),
        ("model.layers.0.mlp.up_proj._fsdp_wrapped_module", "model.layers.0.mlp.up_proj"),
        ("tower.module._orig_mod.fc", "tower.fc"),
        ("tower.module.fc", "tower.module.fc"),  # perhaps its true name
        ("module", "module"),
    ],
)
def test_wrappers_are_no_part_of_a_name(spelled: str, name: str) -> None:
    assert plain(spelled) == name
    assert canonical(spelled) == name.replace("module.", "")


@pytest.mark.parametrize(
    ("key", "family", "older"),
    [
        ("vit.layers.0.attention.q_proj", "", "vit.encoder.layer.0.attention.attention.query"),
        ("vit.layers.3.mlp.fc2", "", "vit.encoder.layer.3.output.dense"),
        ("segformer.stages.1.blocks.0.mlp.fc1", "", "segformer.encoder.block.1.0.mlp.dense1"),
        (
            "model.language_model.layers.0.mlp.up_proj",
            "llava",
            "language_model.model.layers.0.mlp.up_proj",
        ),
        (
            "model.vision_tower.encoder.layers.0.mlp.fc1",
            "llava",
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        ),
        (
            "model.vision_tower.transformer.layers.0.mlp",
            "llava",
            "vision_tower.transformer.layers.0.mlp",
        ),
        ("model.multi_modal_projector.linear_1", "llava", "multi_modal_projector.linear_1"),
        ("lm_head", "llava", "language_model.lm_head"),
        ("model.language_model.layers.0.mlp.up_proj", "qwen", "model.layers.0.mlp.up_proj"),
        ("model.visual.blocks.0.attn.qkv", "qwen", "visual.blocks.0.attn.qkv"),
        ("lm_head", "qwen", "lm_head"),
    ],
)
def test_older_spellings_lead_back(key: str, family: str, older: str) -> None:
    assert respelled(key, "transformers 4", family) == older
    assert canonical(older) == key or (family == "qwen" and alike(canonical(older), key))
    assert respelled(key, "transformers 5", family) == key


@pytest.mark.parametrize(
    ("original", "key"),
    [
        ("model.mm_projector.0", "model.multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "model.multi_modal_projector.linear_2"),
        (
            "model.vision_tower.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj",
            "model.vision_tower.encoder.layers.3.self_attn.q_proj",
        ),
        ("lm_head", "lm_head"),
    ],
)
def test_the_names_of_the_original_llava(original: str, key: str) -> None:
    assert canonical(original) == key
    assert respelled(key, "llava", "llava") == original
    assert (
        respelled("model.language_model.layers.0.mlp.up_proj", "llava", "llava")
        == "model.layers.0.mlp.up_proj"
    )


def test_towers_are_told_apart() -> None:
    assert stem("thinker.model.layers.0.mlp") == Stem("layers.0.mlp", "")
    assert stem("bert.encoder.layer.0.output.dense") == Stem("encoder.layer.0.output.dense", "")
    text, vision = "text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc1"
    bare = "encoder.layers.0.mlp.fc1"
    assert not alike(text, vision)
    assert not alike(text, bare)
    assert alike(text, bare, same_class=True)
    assert alike("model.layers.0.mlp", "model.language_model.layers.0.mlp")
    assert not alike("model.layers.0.mlp", "model.vision_tower.layers.0.mlp")
    assert STYLES
    assert "" in FAMILIES
