"""LoRA files of other programs: the dense update of each by its own formula, and round trips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.io.formats.flat import flattened, unflattened
from tests.versions import needs_pickles

SHAPES = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (6, 4),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (5, 3),
    "up_blocks.2.attentions.0.transformer_blocks.0.ff.net.0.proj": (8, 4),
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (4, 4)}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model_of(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Nested modules of those names."""
    root = nn.Module()
    for seed, (name, (m, n)) in enumerate(shapes.items()):
        at = root
        *path, last = name.split(".")
        for step in path:
            if step not in dict(at.named_children()):
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        linear = nn.Linear(n, m, bias=False)
        linear.weight.data = normal(m, n, seed=100 + seed)
        at.add_module(last, linear)
    return root


def updates(folder: Path) -> dict[str, Tensor]:
    adapter = sm.Adapter.load(folder)
    return {name: adapter.update(name).dense() for name in adapter.modules}


def check(folder: Path, wanted: dict[str, Tensor], shapes: dict[str, tuple[int, int]]) -> None:
    """What this library and PEFT make of a folder."""
    found = updates(folder)
    assert set(found) == set(wanted)
    base = model_of(shapes)
    before = {name: base.get_submodule(name).weight.detach().clone() for name in shapes}
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    for name, dense in wanted.items():
        torch.testing.assert_close(found[name], dense, rtol=1e-5, atol=1e-6)
        after = merged.get_submodule(name).weight
        torch.testing.assert_close(after, before[name] + dense, rtol=1e-5, atol=1e-5)


def kohya(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """A file with a UNet and a text encoder, alphas of many kinds; the dense updates."""
    tensors, dense = dict[str, Tensor](), {"unet": {}, "text_encoder": {}}
    for component, prefix, shapes in (
        ("unet", "lora_unet_", SHAPES),
        ("text_encoder", "lora_te_", TEXT),
    ):
        for seed, (name, (m, n)) in enumerate(shapes.items()):
            down, up = normal(2 + seed, n, seed=seed, dtype=dtype), normal(m, 2 + seed, seed=9)
            key, up = prefix + name.replace(".", "_"), up.to(dtype)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            alpha = 2.0 + seed  # none: the rank
            if seed != 1:
                alpha = 1.5
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
            dense[component][name] = alpha / (2 + seed) * up.float() @ down.float()
    save_file(tensors, path)
    return dense


def test_kohya(tmp_path: Path) -> None:
    dense = kohya(tmp_path / "style.safetensors")
    done = sm.convert(tmp_path / "style.safetensors", tmp_path / "out", base_model="some/base")
    assert done.source == "kohya"
    assert {name: len(modules) for name, modules in done.modules.items()} == {
        "unet": 3,
        "text_encoder": 1,
    }
    check(tmp_path / "out" / "unet", dense["unet"], SHAPES)
    check(tmp_path / "out" / "text_encoder", dense["text_encoder"], TEXT)
    assert sm.Adapter.load(tmp_path / "out" / "unet").base_model == "some/base"


def test_kohya_and_back(tmp_path: Path) -> None:
    """The same bits; an alpha that was left out is the rank."""
    kohya(tmp_path / "style.safetensors", torch.bfloat16)
    sm.convert(tmp_path / "style.safetensors", tmp_path / "out")
    folders = {name: tmp_path / "out" / name for name in ("unet", "text_encoder")}
    sm.convert(folders, tmp_path / "back.safetensors", to="kohya")
    first, back = (
        load_file(tmp_path / "style.safetensors"),
        load_file(tmp_path / "back.safetensors"),
    )
    for name, tensor in back.items():
        if name not in first:
            assert name.endswith(".alpha")
            assert float(tensor) == 3.0
        else:
            assert torch.equal(tensor, first.pop(name).to(tensor.dtype))
    assert not first


@pytest.mark.parametrize(
    ("flat", "name"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_4_1_proj_in", "down_blocks.1.attentions.0.proj_in"),
        ("input_blocks_8_0_emb_layers_1", "down_blocks.2.resnets.1.time_emb_proj"),
        ("middle_block_0_out_layers_3", "mid_block.resnets.0.conv2"),
        (
            "middle_block_1_transformer_blocks_9_attn2_to_out_0",
            "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0",
        ),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_3_0_skip_connection", "up_blocks.1.resnets.0.conv_shortcut"),
        ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("down_blocks_0_resnets_1_conv_shortcut", "down_blocks.0.resnets.1.conv_shortcut"),
        ("double_blocks_0_img_attn_qkv", None),
        ("input_blocks_4_1_attn1_to_x", None),
    ],
)
def test_names_of_stable_diffusion(flat: str, name: str | None) -> None:
    """By the table in diffusers' conversion of the original checkpoints."""
    assert unflattened(flat, "unet") == name


def test_names_are_parsed_in_one_way() -> None:
    for name in (*SHAPES, "time_embedding.linear_1", "conv_in"):
        assert unflattened(flattened(name), "unet") == name
    assert unflattened(flattened(next(iter(TEXT))), "text_encoder") == next(iter(TEXT))


def flux(path: Path, *names: str) -> None:
    tensors = {}
    for name in names:
        tensors[f"lora_unet_{name}.lora_down.weight"] = normal(2, 4, seed=1)
        tensors[f"lora_unet_{name}.lora_up.weight"] = normal(4, 2, seed=2)
    save_file(tensors, path)


def test_names_by_the_model(tmp_path: Path) -> None:
    """Of other models only the model can tell where the dots are."""
    path, out = tmp_path / "flux.safetensors", tmp_path / "out"
    flux(path, "double_blocks_0_img_attn_qkv")
    with pytest.raises(sm.AdapterFormatError, match=r"'double_blocks_0_img_attn_qkv'.*model="):
        sm.convert(path, out)
    shapes = {"double_blocks.0.img_attn.qkv": (4, 4)}
    model = model_of(shapes)
    sm.convert(path, out, model=model)
    assert set(updates(out / "unet")) == set(shapes)
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    save_file(dict(model.state_dict()), tmp_path / "pipe" / "unet" / "model.safetensors")
    for number, base in enumerate(("pipe", "pipe/unet")):
        sm.convert(path, tmp_path / str(number), model=tmp_path / base)
        assert set(updates(tmp_path / str(number) / "unet")) == set(shapes)
    two = model_of({**shapes, "double_blocks.0_img.attn.qkv": (4, 4)})
    with pytest.raises(sm.ModelMismatchError, match=r"may be 'double_blocks.*or"):
        sm.convert(path, tmp_path / "two", model=two)
    with pytest.raises(sm.ModelMismatchError, match="is no module of the model's unet"):
        sm.convert(path, tmp_path / "none", model=model_of({"a": (4, 4)}))
    assert not (tmp_path / "two").exists()


OTHERS = {
    "lora_A": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "lora.down": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "linear_layer": ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
    "processor": ("{}.lora.down.weight", "{}.lora.up.weight"),
}


@pytest.mark.parametrize("spelling", OTHERS)
def test_diffusers(spelling: str, tmp_path: Path) -> None:
    """Every spelling of its history is the same update."""
    tensors, dense = {}, {"unet": {}, "text_encoder": {}}
    for component, shapes in (("unet", SHAPES), ("text_encoder", TEXT)):
        for seed, (name, (m, n)) in enumerate(shapes.items()):
            a, b = normal(2, n, seed=seed), normal(m, 2, seed=7)
            keys = [f"{component}.{key.format(name)}" for key in OTHERS[spelling]]
            if spelling == "processor":  # attn1.processor.to_q_lora.down
                for old, new in (
                    ("attn1.to_q.lora", "attn1.processor.to_q_lora"),
                    ("attn2.to_out.0.lora", "attn2.processor.to_out_lora"),
                    ("self_attn.q_proj.lora", "self_attn.to_q_lora"),
                ):
                    keys = [key.replace(old, new) for key in keys]
            tensors |= dict(zip(keys, (a, b), strict=True))
            dense[component][name] = b @ a
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "pytorch_lora_weights.safetensors")
    done = sm.convert(tmp_path / "in", tmp_path / "out")
    assert done.source == "diffusers"
    check(tmp_path / "out" / "unet", dense["unet"], SHAPES)
    check(tmp_path / "out" / "text_encoder", dense["text_encoder"], TEXT)
    folders = {name: tmp_path / "out" / name for name in dense}
    sm.convert(folders, tmp_path / "back", to="diffusers")
    sm.convert(tmp_path / "back", tmp_path / "again")
    for component in dense:
        again = updates(tmp_path / "again" / component)
        assert all(torch.equal(again[name], x) for name, x in updates(folders[component]).items())


def test_diffusers_metadata_and_alphas(tmp_path: Path) -> None:
    name, (m, n) = next(iter(SHAPES.items()))
    a, b = normal(2, n, seed=1), normal(m, 2, seed=2)
    tensors = {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
    config = {"unet.r": 2, "unet.lora_alpha": 6, "unet.target_modules": ["to_q"]}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    sm.convert(tmp_path / "a.safetensors", tmp_path / "a")
    torch.testing.assert_close(updates(tmp_path / "a" / "unet")[name], 3.0 * b @ a)
    save_file({**tensors, f"unet.{name}.alpha": torch.tensor(0.5)}, tmp_path / "b.safetensors")
    sm.convert(tmp_path / "b.safetensors", tmp_path / "b")
    torch.testing.assert_close(updates(tmp_path / "b" / "unet")[name], 0.25 * b @ a)
    # into the format again: there the scaling is 1
    sm.convert({"unet": tmp_path / "a" / "unet"}, tmp_path / "c", to="diffusers")
    found = load_file(tmp_path / "c" / "pytorch_lora_weights.safetensors")
    product = found[f"unet.{name}.lora_B.weight"] @ found[f"unet.{name}.lora_A.weight"]
    torch.testing.assert_close(product, 3.0 * b @ a)


def test_half_precision_is_kept_where_it_is_exact(tmp_path: Path) -> None:
    name, (m, n) = next(iter(SHAPES.items()))
    key = f"lora_unet_{name.replace('.', '_')}"
    for alpha, dtype in ((4.0, torch.bfloat16), (3.0, torch.float32)):
        tensors = {
            f"{key}.lora_down.weight": normal(2, n, seed=1, dtype=torch.bfloat16),
            f"{key}.lora_up.weight": normal(m, 2, seed=2, dtype=torch.bfloat16),
            f"{key}.alpha": torch.tensor(alpha),
        }
        path = tmp_path / f"{alpha}.safetensors"
        save_file(tensors, path)
        sm.convert(path, tmp_path / str(alpha), to="diffusers")
        found = load_file(tmp_path / str(alpha) / "pytorch_lora_weights.safetensors")
        b = found[f"unet.{name}.lora_B.weight"]
        assert b.dtype == dtype
        assert torch.equal(b.float(), tensors[f"{key}.lora_up.weight"].float() * (alpha / 2))


LLAMA = {
    "model.layers.0.self_attn.q_proj": (8, 6),
    "model.layers.0.self_attn.k_proj": (4, 6),
    "model.layers.1.mlp.down_proj": (6, 10),
    "lm_head": (12, 6),
}


def mlx(folder: Path, **config: Any) -> dict[str, Tensor]:
    folder.mkdir()
    tensors, dense = {}, {}
    for seed, (name, (m, n)) in enumerate(LLAMA.items()):
        a, b = normal(n, 3, seed=seed), normal(3, m, seed=20 + seed)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        dense[name] = 10.0 * (a @ b).T
    save_file(tensors, folder / "adapters.safetensors")
    usual = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 3, "scale": 10.0},
        "model": "q/w",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **config}))
    return dense


def test_mlx(tmp_path: Path) -> None:
    dense = mlx(tmp_path / "mlx")
    done = sm.convert(tmp_path / "mlx", tmp_path / "out")
    assert (done.source, list(done.modules)) == ("mlx", [""])
    check(tmp_path / "out", dense, LLAMA)
    assert sm.Adapter.load(tmp_path / "out").base_model == "q/w"
    sm.convert(tmp_path / "out", tmp_path / "back", to="mlx")
    first = load_file(tmp_path / "mlx" / "adapters.safetensors")
    back = load_file(tmp_path / "back" / "adapters.safetensors")
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 3,
        "scale": 10.0,
        "dropout": 0.0,
        "keys": ["lm_head", "mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj"],
    }


def test_mlx_embeddings(tmp_path: Path) -> None:
    """Of an embedding, lora_a is looked up: the update of the table is scale lora_a lora_b."""
    (tmp_path / "mlx").mkdir()
    a, b = normal(11, 2, seed=1), normal(2, 5, seed=2)
    save_file(
        {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b},
        tmp_path / "mlx" / "adapters.safetensors",
    )
    (tmp_path / "mlx" / "adapter_config.json").write_text('{"lora_parameters": {"scale": 2.0}}')
    sm.convert(tmp_path / "mlx", tmp_path / "out")
    base = nn.Module()
    base.model = nn.Module()
    base.model.embed_tokens = nn.Embedding(11, 5)
    before = base.model.embed_tokens.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload()
    torch.testing.assert_close(merged.model.embed_tokens.weight, before + 2.0 * a @ b)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"lora_parameters": {"rank": 8, "alpha": 16}}, "no lora_parameters.scale"),
    ],
)
def test_mlx_refused(config: dict[str, Any], text: str, tmp_path: Path) -> None:
    mlx(tmp_path / "mlx", **config)
    with pytest.raises(sm.AdapterConfigError, match=text):
        sm.convert(tmp_path / "mlx", tmp_path / "out")


HEADS = {"model_type": "llama", "hidden_size": 6, "num_attention_heads": 2, "head_dim": 4}
BASE = {**HEADS, "num_key_value_heads": 1}


def rotated(x: Tensor, position: int, interleaved: bool) -> Tensor:
    """Rotary embedding of one head: of pairs (torchtune, Meta) or of halves (transformers)."""
    size = x.shape[-1]
    angles = position / 10000 ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        one, two = x[..., ::2], x[..., 1::2]
        return torch.stack([one * cos - two * sin, one * sin + two * cos], -1).flatten(-2)
    one, two = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([one * cos - two * sin, one * sin + two * cos], -1)


def torchtune(folder: Path) -> dict[str, Tensor]:
    """An adapter and its dense updates, in torchtune's order of rows."""
    names = {
        "layers.0.attn.q_proj": "model.layers.0.self_attn.q_proj",
        "layers.0.attn.k_proj": "model.layers.0.self_attn.k_proj",
        "layers.1.mlp.w2": "model.layers.1.mlp.down_proj",
        "output": "lm_head",
    }
    folder.mkdir()
    tensors, dense = {}, {}
    for seed, (theirs, ours) in enumerate(names.items()):
        m, n = LLAMA[ours]
        a, b = normal(2, n, seed=seed), normal(m, 2, seed=30 + seed)
        tensors |= {f"{theirs}.lora_a.weight": a, f"{theirs}.lora_b.weight": b}
        dense[ours] = 4.0 * b @ a
    torch.save(tensors, folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    return dense


@needs_pickles
def test_torchtune(tmp_path: Path) -> None:
    """The scores of attention are the same with the rotation of either library."""
    theirs = torchtune(tmp_path / "tune")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(sm.AdapterSecurityError, match="pickle"):
        sm.convert(tmp_path / "tune", tmp_path / "out", model=tmp_path / "base")
    options: dict[str, Any] = {"model": tmp_path / "base", "allow_pickle": True}
    sm.convert(tmp_path / "tune", tmp_path / "out", **options)
    ours = updates(tmp_path / "out")
    for name in ("model.layers.1.mlp.down_proj", "lm_head"):
        torch.testing.assert_close(ours[name], theirs[name])
    x, y = normal(6, seed=1), normal(6, seed=2)
    for head in range(2):
        scores = []
        for table, interleaved in ((theirs, True), (ours, False)):
            q = table["model.layers.0.self_attn.q_proj"][4 * head : 4 * head + 4] @ x
            k = table["model.layers.0.self_attn.k_proj"] @ y
            scores.append(rotated(q, 7, interleaved) @ rotated(k, 3, interleaved))
        torch.testing.assert_close(scores[0], scores[1])
    sm.convert(tmp_path / "out", tmp_path / "back", to="torchtune", model=tmp_path / "base")
    first, back = (torch.load(tmp_path / one / "adapter_model.pt") for one in ("tune", "back"))
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8)


@needs_pickles
def test_torchtune_refused(tmp_path: Path) -> None:
    torchtune(tmp_path / "tune")
    options: dict[str, Any] = {"allow_pickle": True}
    with pytest.raises(sm.ModelMismatchError, match=r"config of the model: model="):
        sm.convert(tmp_path / "tune", tmp_path / "out", **options)
    for change, text in (
        ({"model_type": "qwen2"}, "the base is a 'qwen2'"),
        ({"head_dim": 6}, "has 8 rows; the model's config says 2 heads of 6"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**BASE, **change}))
        with pytest.raises(sm.ModelMismatchError, match=text):
            sm.convert(tmp_path / "tune", tmp_path / "out", model=tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_no_plain_lora_is_named(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_proj_in"
    for extra in ("dora_scale", "hada_w1_a", "lora_mid.weight"):
        tensors = {
            f"{key}.lora_down.weight": normal(2, 4, seed=1),
            f"{key}.lora_up.weight": normal(4, 2, seed=2),
            f"{key}.{extra}": normal(4, 2, seed=3),
        }
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(sm.AdapterFormatError, match=extra):
            sm.convert(tmp_path / "x.safetensors", tmp_path / "out")
    save_file({f"{key}.lora_down.weight": normal(2, 4, seed=1)}, tmp_path / "x.safetensors")
    with pytest.raises(sm.AdapterFormatError, match="has no second factor"):
        sm.convert(tmp_path / "x.safetensors", tmp_path / "out")
    save_file({"weight": normal(2, 4, seed=1)}, tmp_path / "x.safetensors")
    with pytest.raises(sm.AdapterFormatError, match="none of peft, kohya, diffusers, mlx"):
        sm.convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs(tmp_path: Path) -> None:
    kohya(tmp_path / "style.safetensors")
    (tmp_path / "out" / "unet").mkdir(parents=True)
    with pytest.raises(sm.OutputExistsError, match="unet"):
        sm.convert(tmp_path / "style.safetensors", tmp_path / "out")
    with pytest.raises(sm.MethodError, match=r"NAME.safetensors"):
        sm.convert(tmp_path / "style.safetensors", tmp_path / "k", to="kohya")
    with pytest.raises(sm.AdapterFormatError, match=r"has no components; got .*unet"):
        sm.convert(tmp_path / "style.safetensors", tmp_path / "m", to="mlx")
    sm.convert(tmp_path / "style.safetensors", tmp_path / "copy.safetensors", to="kohya")
    with pytest.raises(sm.OutputExistsError):
        sm.convert(tmp_path / "style.safetensors", tmp_path / "copy.safetensors", to="kohya")


def test_peft_of_other_kinds_is_refused(tmp_path: Path) -> None:
    """DoRA, heads saved whole, trained biases: other formats have no place for them."""
    shapes = {"fc": (5, 4), "head": (3, 5)}
    for name, options, text in (
        ("dora", {"use_dora": True}, "of the kind 'dora'"),
        ("head", {"modules_to_save": ["head"]}, "'head.weight' is no LoRA"),
    ):
        config = LoraConfig(r=2, target_modules=["fc"], **options)
        model = get_peft_model(model_of(shapes), config)
        model.save_pretrained(str(tmp_path / name))
        with pytest.raises(sm.AdapterFormatError, match=text):
            sm.convert({"unet": tmp_path / name}, tmp_path / "x.safetensors", to="kohya")
    assert not (tmp_path / "x.safetensors").exists()
