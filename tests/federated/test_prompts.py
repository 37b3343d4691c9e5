"""The mean of soft prompts: goldens, PEFT as the reader, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sapmerge as sm
from sapmerge.federated import average_prompts

GOLDEN = load_file(Path(__file__).parents[1] / "goldens" / "federated" / "prompts.safetensors")
SAMPLES = [100, 300, 50]


def checkpoint(kind: str, k: int) -> Any:
    tensor = GOLDEN[f"in.{kind}.{k}"]
    if kind == "ctx":
        return {
            "ctx": tensor,
            "token_prefix": torch.randn(7, 1, 16),
            "token_suffix": torch.randn(7, 70, 16),
        }
    peft_type = "PREFIX_TUNING" if kind == "prefix" else "PROMPT_TUNING"
    return {"peft_type": peft_type, "num_virtual_tokens": 5, "token_dim": 32}, {
        "prompt_embeddings": tensor
    }


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ctx"])
@pytest.mark.parametrize("weighted", [False, True])
def test_goldens(kind: str, weighted: bool) -> None:
    made = average_prompts([checkpoint(kind, k) for k in range(3)], SAMPLES if weighted else None)
    [tensor] = made.tensors.values()
    assert tensor.dtype == torch.float32
    wanted = GOLDEN[f"{kind}.{'weighted' if weighted else 'mean'}"]
    assert torch.allclose(tensor.double(), wanted, rtol=1e-7, atol=1e-9)  # one rounding to float32
    one, two = (
        average_prompts([checkpoint(kind, k) for k in order], [SAMPLES[k] for k in order])
        for order in ((0, 1, 2), (2, 0, 1))
    )
    assert torch.equal(*(next(iter(p.tensors.values())) for p in (one, two)))
    thrice = average_prompts([checkpoint(kind, k) for k in range(3)], [7.0 * n for n in SAMPLES])
    assert torch.allclose(
        next(iter(thrice.tensors.values())), next(iter(one.tensors.values())), atol=1e-7
    )


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


KINDS = {
    "prompt": lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
    "p": lambda: PromptEncoderConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "prefix": lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_mean(kind: str, tmp_path: Path) -> None:
    """Its logits are those of a model whose prompt was set to the mean of the files' tensors."""
    prompts: list[Tensor] = []
    for k in range(3):
        torch.manual_seed(k)
        model = get_peft_model(tiny(), KINDS[kind]())
        model.save_pretrained(tmp_path / f"c{k}")
        prompts.append(
            load_file(tmp_path / f"c{k}" / "adapter_model.safetensors")["prompt_embeddings"]
        )
    made = average_prompts([tmp_path / f"c{k}" for k in range(3)], SAMPLES)
    made.save_pretrained(tmp_path / "mean")
    wanted = sum(n / 450 * prompt.double() for n, prompt in zip(SAMPLES, prompts)).float()
    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "mean").eval()
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, wanted)
    other = PeftModel.from_pretrained(tiny(), tmp_path / "c0").eval()
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(wanted)
        ids = torch.arange(6)[None]
        assert torch.equal(loaded(input_ids=ids).logits, other(input_ids=ids).logits)
    again = average_prompts([tmp_path / "mean"])
    assert torch.equal(again.tensors["prompt_embeddings"], wanted)


def test_coop_files(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"ctx": GOLDEN[f"in.ctx.{k}"].half()}, tmp_path / f"{k}.safetensors")
    made = average_prompts({"a": tmp_path / "0.safetensors", "b": tmp_path / "1.safetensors"})
    wanted = ((GOLDEN["in.ctx.0"].half().double() + GOLDEN["in.ctx.1"].half().double()) / 2).half()
    assert torch.equal(made.tensors["ctx"], wanted)
    made.save_pretrained(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "adapter_model.safetensors")["ctx"], wanted)
    assert made.report["clients"]["a"]["share"] == 0.5
    learner = {f"prompt_learner.{name}": tensor for name, tensor in checkpoint("ctx", 0).items()}
    assert torch.equal(average_prompts([learner]).tensors["ctx"], GOLDEN["in.ctx.0"])
    with pytest.raises(sm.AdapterFormatError, match="A pickle can hold code"):
        average_prompts([tmp_path / "model.pth.tar-50"])


def changed(config: dict[str, Any] | None = None, **tensors: Tensor) -> Any:
    own, state = checkpoint("prompt", 0)
    return {**own, **(config or {})}, {**state, **tensors}


@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        (changed({"peft_type": "P_TUNING"}), sm.IncompatibleAdaptersError, "differ in peft_type"),
        (
            changed({"num_virtual_tokens": 6}),
            sm.IncompatibleAdaptersError,
            "differ in num_virtual_tokens",
        ),
        (
            changed({"base_model_name_or_path": "x"}),
            sm.IncompatibleAdaptersError,
            "differ in base_model",
        ),
        (changed(prompt_embeddings=torch.zeros(4, 32)), sm.IncompatibleAdaptersError, r"\(4, 32\)"),
        (
            changed(prompt_embeddings=torch.full((5, 32), float("nan"))),
            sm.NonFiniteError,
            "prompt_embeddings",
        ),
        (changed(surprise=torch.zeros(1)), sm.AdapterFormatError, "'surprise' has no place"),
        (changed({"peft_type": "LORA"}), sm.AdapterConfigError, "is no prompt"),
        (changed({"peft_type": "MULTITASK_PROMPT_TUNING"}), sm.AdapterConfigError, "multitask"),
        (checkpoint("ctx", 0), sm.IncompatibleAdaptersError, "one is PEFT's"),
        (7, sm.AdapterFormatError, "int is no checkpoint"),
        (
            (changed()[0], {}),
            sm.AdapterFormatError,
            r"has no tensor 'prompt_embeddings'; it has \[\]",
        ),
    ],
)
def test_what_is_refused(other: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        average_prompts([changed(), other])


def test_contexts_of_other_classes_are_refused() -> None:
    with pytest.raises(sm.IncompatibleAdaptersError, match="one list of classes"):
        average_prompts([{"ctx": torch.randn(7, 4, 16)}, {"ctx": torch.randn(9, 4, 16)}])


@pytest.mark.parametrize("samples", [[1, 2], [1, 2, 0], [1, 2, float("nan")], {"a": 1}])
def test_wrong_samples_are_refused(samples: Any) -> None:
    with pytest.raises(sm.MethodError):
        average_prompts([checkpoint("prompt", k) for k in range(3)], samples)
    with pytest.raises(sm.MethodError, match="empty"):
        average_prompts([])
