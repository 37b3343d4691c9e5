"""Real adapters of several authors, where the shared data lies beside the repository."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from sapmerge.errors import AdapterConfigError, AdapterSecurityError
from sapmerge.io.adapter import Adapter
from sapmerge.io.names import canonical
from tests.io.helpers import SHARED, accepted, refused, warned
from tests.versions import needs_pickles

ADAPTERS = SHARED / "adapters"
pytestmark = pytest.mark.skipif(
    not ADAPTERS.exists(), reason="the shared data is not beside this repository"
)

GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
EXPECTED = {
    "gpt2__deepbiolab": (36, 8, 4.0, {"score.weight": (2, 768)}),
    "gpt2__gurvineet-best": (36, 8, 4.0, {"score.weight": (6, 768)}),
    "gpt2__gurvineet-checkpoint_epoch_1": (36, 8, 4.0, {"score.weight": (6, 768)}),
    "distilbert__Tashu014-imdb": (12, 8, 2.0, None),
    "distilbert__Karangarg01-hate": (12, 8, 2.0, None),
    "vit__Yunyi307-best_model": (
        24,
        16,
        2.0,
        {"classifier.bias": (2,), "classifier.weight": (2, 768)},
    ),
    "vit__fanLnen-week2": (60, 8, 2.0, {}),
}
DISTILBERT = {
    "classifier.bias": (2,),
    "classifier.weight": (2, 768),
    "pre_classifier.bias": (768,),
    "pre_classifier.weight": (768, 768),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_real_adapters(name: str) -> None:
    from safetensors.torch import load_file

    count, rank, scaling, saved = EXPECTED[name]
    adapter = accepted(ADAPTERS / name)
    assert adapter.label == name
    assert len(adapter.modules) == count
    assert {(module.rank, module.scaling) for module in adapter.modules.values()} == {
        (rank, scaling)
    }
    assert {key: info.shape for key, info in adapter.saved.items()} == (
        DISTILBERT if saved is None else saved
    )
    assert adapter.fan_in_fan_out == name.startswith("gpt2")
    raw = load_file(ADAPTERS / name / "adapter_model.safetensors")
    for module in list(adapter.modules.values())[::7]:
        a, b = (raw[f"base_model.model.{module.spelled}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(adapter.update(module.name).dense(), scaling * b @ a, atol=1e-7)


def test_both_vit_adapters_have_names_of_transformers_5() -> None:
    names = {name for label in ("Yunyi307-best_model", "fanLnen-week2") for name in
             Adapter.load(ADAPTERS / f"vit__{label}").modules}  # fmt: skip
    parts = {name.split(".", 3)[3] for name in names}
    assert parts == {
        "attention.q_proj",
        "attention.k_proj",
        "attention.v_proj",
        "attention.o_proj",
        "mlp.fc2",
    }
    assert {name.split(".")[0:2] == ["vit", "layers"] for name in names} == {True}
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
    assert names <= {name for name, _ in model.named_modules()}


@needs_pickles
def test_a_legacy_bin() -> None:
    path = ADAPTERS / "distilbert__sdtrklse-bin"
    refused(path, "adapter_model.bin", "allow_pickle_weights=True", error=AdapterSecurityError)
    adapter = warned(path, "pickle", allow_pickle_weights=True)
    assert len(adapter.modules) == 12
    assert {key: info.shape for key, info in adapter.saved.items()} == DISTILBERT
    assert set(adapter.files) == {"adapter_config.json", "adapter_model.bin"}
    first = next(iter(adapter.modules))
    assert adapter.update(first).norm() > 0


def test_a_fused_adapter_of_old_peft_is_refused() -> None:
    path = ADAPTERS / "bloom-560m__wujindou-legacy-bin"
    refused(path, "adapter_model.bin", error=AdapterSecurityError)
    refused(path, "enable_lora", error=AdapterConfigError, allow_pickle_weights=True)


def test_digests_differ_between_adapters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digests = {Adapter.load(ADAPTERS / name).digest for name in EXPECTED}
    assert len(digests) == len(EXPECTED)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vit.encoder.layer.3.attention.output.dense", "vit.layers.3.attention.o_proj"),
        ("vit.encoder.layer.3.intermediate.dense", "vit.layers.3.mlp.fc1"),
        (
            "dinov2.encoder.layer.0.attention.attention.key",
            "dinov2.encoder.layer.0.attention.k_proj",
        ),
        ("dinov2.encoder.layer.0.mlp.fc1", "dinov2.encoder.layer.0.mlp.fc1"),
        (
            "bert.encoder.layer.0.attention.output.dense",
            "bert.encoder.layer.0.attention.output.dense",
        ),
        (
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
            "model.vision_tower.encoder.layers.0.mlp.fc1",
        ),
        ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("language_model.lm_head", "lm_head"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("model.language_model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_spelling(old: str, new: str) -> None:
    assert canonical(old, {}) == new
    assert canonical(new, {}) == new


def test_spelling_agrees_with_transformers() -> None:
    """A tiny ViT and LLaVA of the installed transformers have the names that the table gives."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        text_config=LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
    )
    with torch.device("meta"):
        names = {name for name, _ in LlavaForConditionalGeneration(config).named_modules()}
    for old in (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.lm_head",
        "multi_modal_projector.linear_1",
    ):
        assert canonical(old, {}) in names


def test_the_shared_folder_is_only_read(tmp_path: Path) -> None:
    name = "vit__Yunyi307-best_model"
    before = sorted(path.name for path in (ADAPTERS / name).iterdir())
    Adapter.load(ADAPTERS / name).update("vit.layers.0.attention.q_proj")
    assert sorted(path.name for path in (ADAPTERS / name).iterdir()) == before
