"""Tensor names: part of a module, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sapmerge.errors import (
    AdapterConfigError,
    AdapterFormatError,
    AdapterSecurityError,
    LimitExceededError,
    SapmergeError,
)
from sapmerge.io.files import Limits
from tests.io.helpers import PREFIX, accepted, good_config, good_tensors, module, refused, write

Q = PREFIX + module(0, "q_proj")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.norm.weight", "begin with"),
        (PREFIX + "model.norm.weight", "weight of the base model"),
        (PREFIX + "model.layers.0.mlp.down_proj.weight", "weight of the base model"),
        (Q + ".base_layer.weight", "weight of the base model"),
        (Q + ".lora_A.victim.weight", "another spelling"),
        (Q + ".lora_magnitude_vector", "DoRA"),
        (Q + ".lora_B.bias", "lora_bias"),
        (Q + ".lora_C.weight", "not part of a LoRA"),
        (Q + ".hada_w1_a", "another method"),
        (PREFIX + "score.weight", "modules_to_save names none"),
        (PREFIX + "score.bias", "bias"),
        (PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta", "trained token"),
        ("lora_unet_mid.lora_down.weight", "kohya"),
        (module(0, "q_proj") + ".lora_A.weight", "begin with"),
        (Q.replace("model.model", "model..model") + ".lora_A.weight", "begin with"),
        (Q + "\x1b[31m.lora_A.weight", "\\x1b"),
        (Q + "é.lora_A.weight", "non-ASCII"),
    ],
)
def test_a_stray_tensor_is_refused_by_name(tmp_path: Path, name: str, word: str) -> None:
    tensors = good_tensors() | {name: torch.zeros(4, 16)}
    write(tmp_path, tensors=tensors)
    refused(tmp_path, repr(name), word, error=SapmergeError)


def test_renamed_prefix_and_missing_halves(tmp_path: Path) -> None:
    for part in "AB":
        tensors = good_tensors()
        del tensors[f"{Q}.lora_{part}.weight"]
        write(tmp_path, tensors=tensors)
        refused(tmp_path, f"has no lora_{part}", Q)
    write(
        tmp_path,
        tensors={name.removeprefix("base_model."): value for name, value in good_tensors().items()},
    )
    refused(tmp_path, "begin with")


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ((4, 16), (16, 5), "rank 4 in A, 5 in B"),
        ((4, 16), (4,), "expected A"),
        ((), (), "expected A"),
        ((4, 16, 1), (16, 4), "expected A"),
        ((4, 16, 1, 1, 1, 1), (16, 4, 1, 1, 1, 1), "expected A"),
        ((0, 16), (16, 0), "empty"),
        ((4, 16, 3), (16, 4, 3), "kernel"),
        ((4, 16, 3), (16, 2, 1), "grouped convolution"),
    ],
)
def test_shapes(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], word: str) -> None:
    tensors = good_tensors() | {
        f"{Q}.lora_A.weight": torch.zeros(a),
        f"{Q}.lora_B.weight": torch.zeros(b),
    }
    write(tmp_path, tensors=tensors)
    refused(tmp_path, "q_proj", word, error=AdapterFormatError)


def test_a_rank_above_the_shape(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_A.weight": torch.ones(9, 16), f"{Q}.lora_B.weight": torch.ones(8, 9)}
    write(tmp_path, good_config(r=9, target_modules=["q_proj"]), tensors)
    refused(tmp_path, "rank 9", error=LimitExceededError, limits=Limits(rank_above_shape=False))
    assert accepted(tmp_path).modules[module(0, "q_proj")].rank == 9


def test_modules_to_save(tmp_path: Path) -> None:
    head = {PREFIX + "score.weight": torch.ones(3, 16)}
    write(tmp_path, good_config(modules_to_save=["score", "classifier"]), good_tensors() | head)
    adapter = accepted(tmp_path)
    assert list(adapter.saved) == ["score.weight"]
    assert adapter.saved["score.weight"].shape == (3, 16)
    assert adapter.saved["score.weight"].dtype == torch.float32
    assert torch.equal(adapter.saved_tensor("score.weight"), torch.ones(3, 16))
    # PEFT adds both names for the task, whatever the config says.
    write(tmp_path, good_config(task_type="SEQ_CLS"), good_tensors() | head)
    assert list(accepted(tmp_path).saved) == ["score.weight"]
    # The old spelling, and a module inside the one that was saved.
    old = {PREFIX + "head.modules_to_save.out.weight": torch.ones(2, 2)}
    write(tmp_path, good_config(modules_to_save=["head"]), good_tensors() | old)
    assert list(accepted(tmp_path).saved) == ["head.out.weight"]
    both = old | {PREFIX + "head.out.weight": torch.ones(2, 2)}
    write(tmp_path, good_config(modules_to_save=["head"]), good_tensors() | both)
    refused(tmp_path, "another spelling")


def test_modules_to_save_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, good_config(modules_to_save=["lm_head"]))
    refused(tmp_path, "lm_head", error=AdapterConfigError)
    write(tmp_path, good_config(modules_to_save=["score", "classifier"], task_type="SEQ_CLS"))
    refused(tmp_path, "score", error=AdapterConfigError)
    head = {PREFIX + "embed_head.weight": torch.ones(3, 16)}
    write(tmp_path, good_config(modules_to_save=["head"]), good_tensors() | head)
    assert list(accepted(tmp_path).saved) == ["embed_head.weight"]
    head = {PREFIX + "overhead.weight": torch.ones(3, 16)}  # PEFT compares endings of names
    write(tmp_path, good_config(modules_to_save=["head"]), good_tensors() | head)
    assert list(accepted(tmp_path).saved) == ["overhead.weight"]
    head = {PREFIX + "headroom.weight": torch.ones(3, 16)}
    write(tmp_path, good_config(modules_to_save=["head"]), good_tensors() | head)
    refused(tmp_path, "headroom.weight", error=AdapterSecurityError)


def test_two_spellings_of_one_module(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}vit.{path}.lora_{part}.weight": torch.ones(4, 4)
        for path in ("encoder.layer.0.attention.attention.query", "layers.0.attention.q_proj")
        for part in "AB"
    }
    write(tmp_path, good_config(target_modules=["query", "q_proj"]), tensors)
    refused(tmp_path, "one module", error=AdapterFormatError)
