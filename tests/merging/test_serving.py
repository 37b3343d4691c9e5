"""Outputs for engines, read as their sources read them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.io.engines import ENGINES
from tests.kinds import helpers as h
from tests.kinds.helpers import QV, compare, edit, merged, state, target, train, unloaded

PREFIX = "base_model.model."


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Ranks and modules differ; up_proj and k_proj are in one of both, gate_proj in none."""
    one = train(tmp_path, h.llama, 1, r=3, lora_alpha=6, target_modules=QV)
    two = train(tmp_path, h.llama, 2, r=6, lora_alpha=3, target_modules=[*QV, "k_proj", "up_proj"])
    return [edit(p, lambda c: c | {"base_model_name_or_path": "org/base"}) for p in (one, two)]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def in_config(config: Mapping[str, Any], rank: int) -> float:
    return config["lora_alpha"] / config["r"]


def in_tensor(config: Mapping[str, Any], rank: int) -> float:
    return config["lora_alpha"] / rank


def as_one(config: Mapping[str, Any], rank: int) -> float:
    return 1.0


SCALING = {"vllm": in_config, "sglang": in_config, "llama.cpp": in_tensor, "tgi": in_config}
SCALING["diffusers"] = as_one


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_applies_what_peft_applies(
    paths: list[Path], tmp_path: Path, engine: str
) -> None:
    out = tmp_path / "out"
    merged(paths).save_pretrained(out, serving=engine)
    config, tensors = read(out)
    base = state(h.llama())
    got = dict(base)
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[key.replace("lora_A", "lora_B")]
            scaling = SCALING[engine](config, a.shape[0])
            got[f"{module}.weight"] = base[f"{module}.weight"] + scaling * b.double() @ a.double()
    wanted = target(h.llama, paths)
    compare(h.llama, got, wanted)
    compare(h.llama, unloaded(h.llama, out), wanted)
    assert sm.check(out, engine) == []
    assert sm.reproduce(out, [str(path) for path in paths]) == []


def ranks_in(folder: Path) -> set[int]:
    return {t.shape[0] for key, t in read(folder)[1].items() if "lora_A" in key}


def modules_in(folder: Path) -> set[str]:
    return {key.removeprefix(PREFIX).split(".lora_")[0] for key in read(folder)[1]}


def test_vllm_takes_some_ranks_only(paths: list[Path], tmp_path: Path) -> None:
    merged(paths).save_pretrained(tmp_path / "plain")
    assert ranks_in(tmp_path / "plain") == {9}, "3 + 6"
    merged(paths).save_pretrained(tmp_path / "out", serving="vllm")
    assert ranks_in(tmp_path / "out") == {16}
    assert modules_in(tmp_path / "out") == modules_in(tmp_path / "plain")


def test_sglang_stacks_neighbours(paths: list[Path], tmp_path: Path) -> None:
    """q, k and v are one matrix there, gate and up another."""
    one = train(tmp_path, h.llama, 3, r=4, target_modules=["up_proj", "v_proj", "q_proj"])
    merged([one]).save_pretrained(tmp_path / "out", serving="sglang")
    wanted = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"}
    wanted |= {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up")}
    assert modules_in(tmp_path / "out") == wanted
    tensors = read(tmp_path / "out")[1]
    k = f"{PREFIX}model.layers.0.self_attn.k_proj"
    assert tensors[f"{k}.lora_B.weight"].shape == (16, 4), "as v_proj: two heads of 8"
    assert not tensors[f"{k}.lora_A.weight"].any()


def test_a_shape_that_nobody_knows(tmp_path: Path) -> None:
    one = train(tmp_path, h.llama, 1, r=4, target_modules=["k_proj", "v_proj"])
    with pytest.raises(sm.MethodError, match=r"q_proj.*model=\.\.\."):
        merged([one]).save_pretrained(tmp_path / "out", serving="sglang")
    assert not (tmp_path / "out").exists()
    base = h.llama()
    base.save_pretrained(tmp_path / "base")
    for name, model in (("model", base), ("folder", str(tmp_path / "base"))):
        merged([one], model=model).save_pretrained(tmp_path / name, serving="sglang")
        q = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
        assert read(tmp_path / name)[1][q].shape == (32, 4)


def test_tgi_wants_a_module_in_every_layer(tmp_path: Path) -> None:
    one = train(tmp_path, h.llama, 1, r=4, target_modules=QV, layers_to_transform=[0])
    assert "beside others" in "".join(sm.check(train_two(tmp_path), "tgi"))
    merged([one]).save_pretrained(tmp_path / "alone", serving="tgi")
    assert len(modules_in(tmp_path / "alone")) == 2, "nothing tells of a second layer"
    merged([one], model=h.llama()).save_pretrained(tmp_path / "out", serving="tgi")
    wanted = {f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in QV}
    assert modules_in(tmp_path / "out") == wanted
    compare(h.llama, unloaded(h.llama, tmp_path / "out"), target(h.llama, [one]))


def train_two(folder: Path) -> Path:
    """q_proj in layer 0 only, v_proj in both."""
    one = train(folder, h.llama, 2, r=4, target_modules=QV)
    targets = ["model.layers.0.self_attn.q_proj", "v_proj"]
    return edit(
        one,
        lambda c: c | {"target_modules": targets},
        lambda held: {k: t for k, t in held.items() if "layers.1.self_attn.q" not in k},
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_cannot_load_is_refused(tmp_path: Path, engine: str) -> None:
    kinds: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save", {"modules_to_save": "mean"}),
        ({"bias": "all"}, "bias", {}),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "token rows", {}),
    ]
    for settings, match, call in kinds:
        one = train(tmp_path, h.biased_llama, 1, r=4, target_modules=QV, **settings)
        with pytest.raises(sm.OutputError, match=match):
            merged([one], **call).save_pretrained(tmp_path / "out", serving=engine)
        assert sm.check(one, engine) != []
    experts = train(
        tmp_path, h.qwen_moe, 1, r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"]
    )
    with pytest.raises(sm.OutputError, match="expert"):
        merged([experts]).save_pretrained(tmp_path / "out", serving=engine)
    assert not (tmp_path / "out").exists()


def test_a_merged_dora_is_plain(tmp_path: Path) -> None:
    one = train(tmp_path, h.llama, 1, r=4, target_modules=QV, use_dora=True)
    assert "(dora)" in "".join(sm.check(one, "vllm"))
    done = merged([one], model=h.llama())
    done.save_pretrained(tmp_path / "out", serving="llama.cpp")
    assert sm.check(tmp_path / "out", "llama.cpp") == []
    compare(h.llama, unloaded(h.llama, tmp_path / "out"), target(h.llama, [one]))


def test_ranks_above_the_largest(tmp_path: Path) -> None:
    one = train(tmp_path, lambda: h.llama(hidden_size=1056), 1, r=520, target_modules=["q_proj"])
    with pytest.raises(sm.OutputError, match="rank=512"):
        merged([one]).save_pretrained(tmp_path / "out", serving="vllm")
    assert "above its largest" in "".join(sm.check(one, "vllm"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"rank_pattern": {"q_proj": 8}}, {"vllm": 2.0, "sglang": 2.0, "tgi": 2.0}),
        ({"alpha_pattern": {"q_proj": 8}}, {"vllm": 0.5, "llama.cpp": 0.5, "tgi": 0.5}),
        ({"use_rslora": True}, {"sglang": 0.5, "llama.cpp": 0.5, "diffusers": 0.5}),
        ({"lora_alpha": 8}, {"diffusers": 0.5}),
    ],
)
def test_check_tells_the_strength_of_patterns(
    tmp_path: Path, settings: dict[str, Any], wrong: dict[str, float]
) -> None:
    """Of r = 4 and alpha = 4; what the engine multiplies by over what PEFT does."""
    config = {"r": 4, "lora_alpha": 4, "target_modules": QV} | settings
    one = train(tmp_path, h.llama, 1, **config)
    for engine in ENGINES:
        strength = [line for line in sm.check(one, engine) if "of the strength" in line]
        assert bool(strength) == (engine in wrong or engine in also(settings)), engine
        if engine in wrong:
            assert f"applies {wrong[engine]:.3g} of the strength" in strength[0]


def also(settings: dict[str, Any]) -> set[str]:
    """Engines that are wrong by a factor that is not spelled out."""
    return {"alpha_pattern": {"sglang", "diffusers"}, "rank_pattern": {"diffusers"}}.get(
        next(iter(settings)), set()
    )


def old_llava(folder: Path, seed: int, tower: str) -> Path:
    modules = [
        "model.language_model.layers.0.self_attn.q_proj",
        f"{tower}.encoder.layers.0.self_attn.q_proj",
    ]
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (4, 16), "B": (16, 4)}
    folder.mkdir()
    save_file(
        {
            f"{PREFIX}{m}.lora_{f}.weight": torch.randn(s, generator=generator)
            for m in modules
            for f, s in shapes.items()
        },
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = "llava-hf/llava-1.5-7b-hf"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_vllm_reads_a_tower_in_the_older_spelling(tmp_path: Path) -> None:
    new = [old_llava(tmp_path / f"new{k}", k, "model.vision_tower") for k in (1, 2)]
    assert "drops" in "".join(sm.check(new[0], "vllm"))
    merged(new).save_pretrained(tmp_path / "out", serving="vllm")
    assert modules_in(tmp_path / "out") == {
        "language_model.model.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
    }
    assert sm.check(tmp_path / "out", "vllm") == []
    with pytest.raises(sm.OutputError, match="outside of the language model"):
        merged(new).save_pretrained(tmp_path / "no", serving="llama.cpp")


def test_wrong_arguments(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(sm.MethodError, match="no engine that is known"):
        merged(paths).save_pretrained(tmp_path / "out", serving="vLLM")
    with pytest.raises(sm.MethodError, match="one rank"):
        merged(paths).save_pretrained(tmp_path / "out", serving="tgi", uniform_rank=False)
    with pytest.raises(sm.MethodError, match="no engine that is known"):
        sm.check(paths[0], "ollama")


def test_on_the_command_line(
    paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    h.llama().save_pretrained(tmp_path / "base")
    merge = ["merge", *map(str, paths), "--method", "mean", "--rank", "exact", "--quiet"]
    base = ["--model", str(tmp_path / "base")]
    out = str(tmp_path / "out")
    assert main([*merge, *base, "-o", out, "--serving", "vllm"]) == 0
    assert main(["check", out, "--serving", "vllm"]) == 0
    assert "vLLM serves it" in capsys.readouterr().out
    assert main([*merge, "-o", f"{out}-2", "--no-uniform-rank"]) == 0
    assert len(ranks_in(Path(f"{out}-2"))) > 1
    assert main(["check", f"{out}-2", "--serving", "sglang"]) == 2
    assert "ranks differ" in capsys.readouterr().err


def test_diffusers_loads_it(tmp_path: Path) -> None:
    """By its own loader, with the line of the table."""
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel

    def make() -> Any:
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            in_channels=4,
        )

    settings: dict[str, Any] = {"target_modules": ["to_q", "to_v"], "lora_alpha": 8}
    both = [train(tmp_path, make, k, r=r, **settings) for k, r in ((1, 4), (2, 2))]
    merged(both).save_pretrained(tmp_path / "out", serving="diffusers")
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_lora_adapter(
            str(tmp_path / "out"),
            prefix="base_model.model",
            weight_name="adapter_model.safetensors",
        )
        model.fuse_lora()
    got = {k: v for k, v in state(model).items() if ".lora_" not in k}
    compare(make, got, target(make, both))
