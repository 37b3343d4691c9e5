"""Every kind of adapter through every sink, against PEFT's own merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.versions import needs_peft_21

from . import helpers as h
from .helpers import QV, check_sinks, train

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("make", [h.tower, h.wide_tower])
def test_multihead_attention(make: h.Make, tmp_path: Path) -> None:
    paths = [
        train(tmp_path, make, k, r=2 * k, lora_alpha=8, target_modules=["attn", "mlp.0"])
        for k in (1, 2, 3)
    ]
    check_sinks(make, paths, tmp_path, weights=[1.0, 2.0, 0.5])


def test_peft_applies_the_update_of_out_proj_twice(tmp_path: Path) -> None:
    # If this fails, PEFT was mended: TWICE depends on its version then.
    path = train(tmp_path, h.tower, 1, r=4, lora_alpha=8, target_modules=["attn"])
    held, base, found = (
        h.load_file(path / "adapter_model.safetensors"),
        h.state(h.tower()),
        h.unloaded(h.tower, path),
    )
    name = "base_model.model.resblocks.0.attn.base_layer.out_proj"
    stored = 2.0 * held[f"{name}.lora_B.weight"].double() @ held[f"{name}.lora_A.weight"].double()
    delta = found["resblocks.0.attn.out_proj.weight"] - base["resblocks.0.attn.out_proj.weight"]
    torch.testing.assert_close(delta, 2.0 * stored, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (h.qwen_moe, EXPERTS),
        (h.square_moe, EXPERTS),
        (h.qwen_moe, ["mlp.experts.down_proj"]),
        (h.qwen_moe, ["gate_up_proj", "down_proj"]),
        (h.qwen_moe, [*EXPERTS, "mlp.gate.weight"]),
        (h.mixtral, EXPERTS),
        (h.gpt_oss, EXPERTS),
    ],
    ids=["qwen", "square", "down only", "bare names", "router", "mixtral", "gpt-oss"],
)
def test_experts(make: h.Make, parameters: list[str], tmp_path: Path) -> None:
    paths = [
        train(
            tmp_path,
            make,
            k,
            r=k,
            lora_alpha=4 * k,
            target_modules=QV,
            target_parameters=parameters,
        )
        for k in (1, 2)
    ]
    check_sinks(make, paths, tmp_path, weights=[1.0, 3.0])


def test_experts_without_target_modules_and_with_rank_patterns(tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": [], "target_parameters": EXPERTS, "use_rslora": True}
    patterns = {"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"experts.down_proj": 20}}
    paths = [
        train(tmp_path, h.qwen_moe, 1, **settings),
        train(tmp_path, h.qwen_moe, 2, **settings, **patterns),
    ]
    check_sinks(h.qwen_moe, paths, tmp_path)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(h.llama, [*QV, "up_proj"]), (h.gpt2, ["c_attn", "c_fc"]), (h.mixed, ["embed", "conv", "fc"])],
)
def test_dora(make: h.Make, targets: list[str], tmp_path: Path) -> None:
    paths = [
        train(tmp_path, make, k, r=2 * k, lora_alpha=6, target_modules=targets, use_dora=True)
        for k in (1, 2, 3)
    ]
    check_sinks(make, paths, tmp_path, weights=[1.0, 2.0, 0.5], model=make(), tolerance=1e-4)


def test_a_base_with_a_merged_adapter_is_no_base(tmp_path: Path) -> None:
    """DoRA and biases are measured from the weights of the base, which PEFT has changed."""
    dora = train(tmp_path, h.llama, 1, r=4, target_modules=QV, use_dora=True)
    rows = train(tmp_path, h.llama, 2, r=4, target_modules=QV, trainable_token_indices=[3])
    plain = train(tmp_path, h.llama, 3, r=4, target_modules=QV)
    model = PeftModel.from_pretrained(h.llama(), str(plain), adapter_name="other")
    model.merge_adapter()
    with pytest.raises(h.sm.ModelMismatchError, match="unmerge_adapter"):
        h.merged([dora, plain], model=model)
    with pytest.raises(h.sm.ModelMismatchError, match="unmerge_adapter"):
        h.merged([rows, plain], model=model).save_pretrained(tmp_path / "out")
    model.unmerge_adapter()
    h.merged([dora, plain], model=model).save_pretrained(tmp_path / "out")
    wanted = h.target(h.llama, [dora, plain])
    h.compare(h.llama, h.unloaded(h.llama, tmp_path / "out"), wanted, 1e-4)


def test_dora_beside_plain_lora_and_as_a_sum(tmp_path: Path) -> None:
    paths = [
        train(tmp_path, h.llama, 1, r=4, target_modules=QV, use_dora=True),
        train(tmp_path, h.llama, 2, r=4, target_modules=[*QV, "k_proj"]),
    ]
    check_sinks(
        h.llama, paths, tmp_path, total=True, weights=[0.5, -0.25], model=h.llama(), tolerance=1e-4
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize(("make", "targets"), [(h.llama, QV), (h.gpt2, ["c_attn", "c_proj"])])
def test_starts_that_are_subtracted_from_the_base(
    start: str, make: h.Make, targets: list[str], tmp_path: Path
) -> None:
    settings = {"lora_alpha": 8, "target_modules": targets, "init_lora_weights": start}
    if make is h.gpt2 and start == "olora":
        pytest.skip("PEFT 0.21 cannot start OLoRA on a Conv1D")
    paths = [train(tmp_path, make, k, spread=0.03, r=4 * k, **settings) for k in (1, 2)]
    check_sinks(make, paths, tmp_path, model=make(), tolerance=2e-4, live=False)


def test_lora_bias(tmp_path: Path) -> None:
    settings = {"target_modules": QV, "lora_bias": True}
    paths = [train(tmp_path, h.biased_llama, k, r=4, lora_alpha=8 * k, **settings) for k in (1, 2)]
    paths.append(train(tmp_path, h.biased_llama, 3, r=2, target_modules=[*QV, "k_proj"]))
    check_sinks(h.biased_llama, paths, tmp_path, weights=[1.0, 2.0, 3.0])


def test_lora_bias_beside_an_adapted_embedding(tmp_path: Path) -> None:
    # PEFT has no lora_bias for an embedding: the output stores whole biases.
    paths = [
        train(tmp_path, h.mixed, 1, r=2, target_modules=["fc", "conv"], lora_bias=True),
        train(tmp_path, h.mixed, 2, r=2, target_modules=["fc", "embed"]),
    ]
    with pytest.raises(h.sm.MethodError, match=r"lora_bias for embedding layers.*model=model"):
        h.merged(paths).save_pretrained(tmp_path / "refused")
    check_sinks(h.mixed, paths, tmp_path, model=h.mixed(), live=False)


def test_trained_biases(tmp_path: Path) -> None:
    paths = [
        train(tmp_path, h.biased_llama, k, r=4, target_modules=QV, bias=kind)
        for k, kind in enumerate(["all", "lora_only"])
    ]
    check_sinks(h.biased_llama, paths, tmp_path, model=h.biased_llama(), live=False)


@needs_peft_21
def test_trained_biases_of_all_adapters_need_no_base_in_a_mean(tmp_path: Path) -> None:
    paths = [
        train(tmp_path, h.biased_llama, k, r=4, target_modules=QV, bias="lora_only") for k in (1, 2)
    ]
    check_sinks(h.biased_llama, paths, tmp_path, weights=[1.0, 3.0], live=False)
    with pytest.raises(h.sm.MethodError, match=r"q_proj\.bias.*model=model"):
        h.merged(paths, h.sm.task_arithmetic())
    with pytest.raises(h.sm.MethodError, match=r"q_proj\.bias.*model=model"):
        h.merged([*paths, train(tmp_path, h.biased_llama, 3, r=4, target_modules=QV)])


def test_trained_biases_as_a_sum_and_in_a_live_model(tmp_path: Path) -> None:
    paths = [
        train(tmp_path, h.biased_llama, k, r=4, target_modules=QV, bias="lora_only") for k in (1, 2)
    ]
    paths.append(train(tmp_path, h.biased_llama, 3, r=4, target_modules=QV))
    check_sinks(
        h.biased_llama,
        paths[::-1],
        tmp_path,
        total=True,
        weights=[0.5, 1.0, -0.5],
        model=h.biased_llama(),
    )


def test_bert_with_biases_and_a_head(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"}
    paths = [train(tmp_path, h.bert, k, **settings) for k in (1, 2)]
    check_sinks(h.bert, paths, tmp_path, modules_to_save="mean", live=False)


def test_saved_modules_are_named_by_their_endings(tmp_path: Path) -> None:
    """PEFT takes "norm" for every module whose name ends so: all layernorms of a Llama."""
    settings = {"r": 4, "target_modules": QV, "modules_to_save": ["norm"]}
    paths = [train(tmp_path, h.llama, k, **settings) for k in (1, 2)]
    done = check_sinks(
        h.llama, paths, tmp_path, weights=[1.0, 3.0], modules_to_save="mean", live=False
    )
    assert len(done.run.heads.modules) == 5  # two in each of two layers, and the last one


@pytest.mark.parametrize("make", [h.llama, h.tied_llama])
def test_token_rows(make: h.Make, tmp_path: Path) -> None:
    rows = ([1, 2, 3], [3, 4])
    paths = [
        train(
            tmp_path,
            make,
            k,
            r=4,
            target_modules=QV,
            trainable_token_indices={"embed_tokens": rows[k]},
        )
        for k in (0, 1)
    ]
    check_sinks(make, paths, tmp_path, model=make(), weights=[1.0, 3.0])
    with pytest.raises(h.sm.MethodError, match=r"embed_tokens\.weight.*model=model"):
        h.merged(paths)


def test_one_weight_as_a_parameter_and_as_a_module(tmp_path: Path) -> None:
    parameter = {"target_modules": QV, "target_parameters": ["mlp.up_proj.weight"]}
    paths = [
        train(tmp_path, h.llama, 1, r=4, **parameter),
        train(tmp_path, h.llama, 2, r=4, target_modules=[*QV, "up_proj"]),
    ]
    with pytest.raises(h.sm.IncompatibleAdaptersError, match=r"mlp\.up_proj.*target_parameters"):
        h.merged(paths)
    check_sinks(h.llama, paths[:1], tmp_path)


def _rows_beside(folder: Path, **other: Any) -> list[Path]:
    """Two adapters: one with rows of tokens, one with something else on that embedding."""
    rows: dict[str, Any] = {
        "target_modules": QV,
        "trainable_token_indices": {"embed_tokens": [1, 5]},
    }
    return [train(folder, h.llama, 1, r=4, **rows), train(folder, h.llama, 2, r=4, **other)]


@pytest.mark.parametrize("weights", [[1.0, 3.0], [1.0, -0.5]])
def test_token_rows_beside_a_lora_of_their_embedding(weights: list[float], tmp_path: Path) -> None:
    paths = _rows_beside(tmp_path, target_modules=[*QV, "embed_tokens"])
    model = h.llama()
    done = h.merged(paths, h.sm.task_arithmetic(), weights=weights, model=model)
    done.apply_to(model)
    h.compare(h.llama, h.state(model), h.target(h.llama, paths, weights, total=True))
    live = PeftModel.from_pretrained(h.llama(), str(paths[1]), adapter_name="first")
    for sink in (
        lambda: done.save_pretrained(tmp_path / "out"),
        lambda: done.add_to(live, "both"),
    ):
        with pytest.raises(h.sm.IncompatibleAdaptersError, match=r"embed_tokens.*save_merged"):
            sink()
    assert not (tmp_path / "out").exists()
    assert list(live.peft_config) == ["first"]


def test_token_rows_beside_their_embedding_saved_whole(tmp_path: Path) -> None:
    paths = _rows_beside(tmp_path, target_modules=QV, modules_to_save=["embed_tokens"])
    with pytest.raises(h.sm.IncompatibleAdaptersError, match=r"embed_tokens\.weight.*whole"):
        h.merged(paths, model=h.llama(), modules_to_save="mean")
    done = h.merged(paths, model=h.llama(), modules_to_save="drop")
    done.save_pretrained(tmp_path / "out")
    name, plain = "model.embed_tokens.weight", h.state(h.llama())
    moved = h.unloaded(h.llama, tmp_path / "out")[name] - plain[name]
    rows = h.unloaded(h.llama, paths[0])[name] - plain[name]
    assert torch.allclose(moved, rows / 2, atol=1e-6)


def test_the_same_token_rows_need_no_base_in_a_mean(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": QV, "trainable_token_indices": [5, 2]}
    check_sinks(h.llama, [train(tmp_path, h.llama, k, **settings) for k in (1, 2)], tmp_path)
    done = train(
        tmp_path, h.gpt2, 3, r=4, target_modules=["c_attn"], trainable_token_indices={"wte": [7]}
    )
    check_sinks(h.gpt2, [done], done, live=False)


def test_adapted_embeddings_store_copies_of_the_base(tmp_path: Path) -> None:
    settings = {"r": 4, "target_modules": [*QV, "lm_head", "embed_tokens"]}
    paths = [train(tmp_path, h.llama, k, **settings) for k in (1, 2)]
    with pytest.warns(h.sm.SapmergeWarning, match="copies of the base's weight"):
        h.sm.Adapter.load(paths[0])
    check_sinks(h.llama, paths, tmp_path)
