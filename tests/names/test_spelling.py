"""One base, two spellings of its modules: merged as the same modules,
written as the files or the model say.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

import sapmerge as sm
from tests.models import PREFIX

from .helpers import (
    QV,
    Make,
    agree,
    folded,
    llama,
    mean,
    modules,
    qwen_vl,
    reconfigured,
    renamed,
    seeded,
    train,
)

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
clip_vision = seeded(
    lambda: CLIPVisionModel(
        CLIPVisionConfig(**TOWER, image_size=32, patch_size=8, projection_dim=16)
    )
)
clip_text = seeded(
    lambda: CLIPTextModel(
        CLIPTextConfig(
            **TOWER,
            vocab_size=64,
            max_position_embeddings=16,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
)


def merged(paths: list[Path], out: Path, **settings: object) -> Path:
    sm.merge(paths, method=sm.mean(), rank="exact", **settings).save_pretrained(out)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
        lambda key: key.replace(PREFIX, PREFIX + "module._orig_mod."),
        lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda key: key.replace(".mlp.", "._fsdp_wrapped_module.mlp.").replace(
            "self_attn", "self_attn._orig_mod"
        ),
    ],
)
def test_wrappers_are_no_part_of_a_name(change: object, tmp_path: Path) -> None:
    one, two = (
        train(llama, tmp_path / f"a{k}", k, target_modules=[*QV, "up_proj"]) for k in (1, 2)
    )
    other = renamed(two, "wrapped", change)  # type: ignore[arg-type]
    for pair in ([one, other], [other, renamed(one, "both", change)]):  # type: ignore[arg-type]
        out = merged(pair, tmp_path / f"out-{pair[1].name}")
        assert modules(out) == modules(one)
        agree(llama, folded(llama, out), mean(llama, [one, two]))


def test_a_text_class_beside_its_multimodal_wrapper(tmp_path: Path) -> None:
    text, both = (
        train(llama, tmp_path / "t", 1, target_modules=QV),
        train(qwen_vl, tmp_path / "b", 2, target_modules=QV),
    )
    with pytest.warns(
        sm.SapmergeWarning, match=r"'t' and 'b' spell .*'model\.layers\.0.*'model\.language_model\."
    ):
        out = merged([text, both], tmp_path / "out")
    assert modules(out) == modules(both)
    # The halves of the mean, by PEFT: each at its own class.
    spelled = renamed(
        text,
        "spelled",
        lambda key: key.replace("model.model.layers", "model.model.language_model.layers"),
    )
    agree(qwen_vl, folded(qwen_vl, out), mean(qwen_vl, [spelled, both]))


def test_files_of_transformers_4_beside_5(tmp_path: Path) -> None:
    targets = [*QV, "qkv"]
    new, other = (train(qwen_vl, tmp_path / f"a{k}", k, target_modules=targets) for k in (1, 2))
    old = renamed(
        other,
        "old",
        lambda key: key.replace("model.language_model.layers", "model.layers").replace(
            ".model.visual", ".visual"
        ),
    )
    wanted = mean(qwen_vl, [new, other])
    with pytest.warns(sm.SapmergeWarning, match="'a1' and 'old'"):
        out = merged([new, old], tmp_path / "out")
    assert modules(out) == modules(new)
    agree(qwen_vl, folded(qwen_vl, out), wanted)
    agree(
        qwen_vl, folded(qwen_vl, merged([old, new], tmp_path / "checked", model=qwen_vl())), wanted
    )
    alone = merged([old], tmp_path / "alone")
    assert modules(alone) == modules(old)
    result = sm.merge([old], method=sm.mean())
    result.save_pretrained(tmp_path / "five", names="transformers 5")
    assert modules(tmp_path / "five") == modules(new)
    sm.merge([new], method=sm.mean()).save_pretrained(tmp_path / "four", names="transformers 4")
    assert modules(tmp_path / "four") == modules(old)


def test_a_module_of_one_adapter_is_spelled_like_the_rest(tmp_path: Path) -> None:
    many = train(qwen_vl, tmp_path / "many", 1, target_modules=[*QV, "up_proj"])
    few = train(qwen_vl, tmp_path / "few", 2, target_modules=["q_proj", "o_proj"])
    old = renamed(
        few, "old", lambda key: key.replace("model.language_model.layers", "model.layers")
    )
    with pytest.warns(sm.SapmergeWarning, match="'many' and 'old'"):
        out = merged([many, old], tmp_path / "out")
    assert modules(out) == modules(many) | modules(few)
    agree(qwen_vl, folded(qwen_vl, out), mean(qwen_vl, [many, few]))


@pytest.mark.parametrize(
    ("make", "prefix"), [(clip_vision, "vision_model"), (clip_text, "text_model")]
)
def test_flattened_towers(make: Make, prefix: str, tmp_path: Path) -> None:
    one, two = (
        train(make, tmp_path / f"a{k}", k, base="openai/clip-vit-base-patch32", target_modules=QV)
        for k in (1, 2)
    )
    if next(iter(modules(one))).startswith(prefix):
        pytest.skip("this transformers has not flattened the tower")
    old = renamed(two, "old", lambda key: key.replace(PREFIX, f"{PREFIX}{prefix}."))
    agree(make, folded(make, merged([old], tmp_path / "alone", model=make())), folded(make, two))
    agree(
        make,
        folded(make, merged([one, old], tmp_path / "out", model=make())),
        mean(make, [one, two]),
    )


def test_a_bare_tower_without_its_class_is_not_guessed(tmp_path: Path) -> None:
    """A bare encoder may be the text or the vision tower:
    two halves, and a warning that names both.
    """
    one, two = (train(clip_vision, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2))
    reconfigured(one, auto_mapping=None)
    old = renamed(
        two, "old", lambda key: key.replace(PREFIX, PREFIX + "text_model."), auto_mapping=None
    )
    with pytest.warns(sm.SapmergeWarning, match="'a1' and 'old' share no module"):
        assert len(sm.merge([one, old], method=sm.mean()).run.stream.modules) == 8


def test_towers_of_one_width_are_not_taken_for_one_another(tmp_path: Path) -> None:
    """The tensors of both have the same names and shapes; only the class tells them apart."""
    text = train(clip_text, tmp_path / "t", 1, target_modules=QV)
    vision = [train(clip_vision, tmp_path / f"v{k}", k, target_modules=QV) for k in (2, 3)]
    assert modules(text) == modules(vision[0])
    for options in ({}, {"base_model": "org/clip"}):
        with pytest.raises(
            sm.IncompatibleAdaptersError, match=r"CLIPTextModel in 't' .*CLIPVisionModel in 'v2'"
        ):
            sm.merge([text, *vision], method=sm.mean(), **options)  # type: ignore[arg-type]
    with pytest.raises(sm.ModelMismatchError, match="trained on CLIPTextModel"):
        sm.merge([text], method=sm.mean(), model=clip_vision())
    agree(
        clip_vision, folded(clip_vision, merged(vision, tmp_path / "o")), mean(clip_vision, vision)
    )


def test_sap_runs_on_adapters_of_transformers_4(tmp_path: Path) -> None:
    paths = [train(clip_vision, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2)]
    old = [
        renamed(path, f"old-{path.name}", lambda key: key.replace(PREFIX, PREFIX + "vision_model."))
        for path in paths
    ]
    anchors = [
        {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    ]

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**batch).pooler_output.square().mean()

    found = []
    for given, name in ((paths, "new"), (old, "old")):
        sm.merge(given, anchors, clip_vision(), loss=loss).save_pretrained(tmp_path / name)
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for key, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][key], atol=1e-6)


def test_saved_from_the_inner_model(tmp_path: Path) -> None:
    one, two = (train(llama, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2))
    inner = renamed(two, "inner", lambda key: key.replace(PREFIX + "model.", PREFIX))
    wanted = mean(llama, [one, two])
    agree(llama, folded(llama, merged([one, inner], tmp_path / "out", model=llama())), wanted)
    with pytest.warns(sm.SapmergeWarning, match="spell"):
        agree(llama, folded(llama, merged([inner, one], tmp_path / "without")), wanted)
    # Another prefix: with the model it is found by its ending, without it the two share no module.
    odd = renamed(two, "odd", lambda key: key.replace(PREFIX, PREFIX + "policy.net."))
    agree(llama, folded(llama, merged([one, odd], tmp_path / "odd-out", model=llama())), wanted)
    with pytest.warns(sm.SapmergeWarning, match="'a1' and 'odd' share no module"):
        sm.merge([one, odd], method=sm.mean())
    result = sm.merge([odd], method=sm.mean())
    model = llama()
    result.apply_to(model)
    agree(llama, {k: v.double() for k, v in model.state_dict().items()}, folded(llama, two))


def fused(path: Path, name: str, whole: str, parts: tuple[str, ...]) -> Path:
    """The same updates with `parts` in one projection: A below each other, B block-diagonal."""
    out = renamed(
        path,
        name,
        lambda key: key,
        target_modules=[whole],
        r=4 * len(parts),
        lora_alpha=8 * len(parts),
    )
    tensors = load_file(path / "adapter_model.safetensors")
    holders = {key[: key.index(parts[0])] for key in tensors if f".{parts[0]}." in key}
    made = {}
    for holder in holders:
        A, B = ([tensors[f"{holder}{part}.lora_{x}.weight"] for part in parts] for x in "AB")
        made[f"{holder}{whole}.lora_A.weight"] = torch.cat(A)
        made[f"{holder}{whole}.lora_B.weight"] = torch.block_diag(*B).contiguous()
    save_file(made, out / "adapter_model.safetensors")
    return out


@pytest.mark.parametrize(
    ("whole", "parts"),
    [("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))],
)
def test_a_fused_projection_beside_its_parts(
    whole: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    one, two = (
        train(llama, tmp_path / f"a{k}", k, target_modules=list(parts), lora_alpha=8)
        for k in (1, 2)
    )
    wanted = mean(llama, [one, two])
    joined = fused(two, "joined", whole, parts)
    with pytest.warns(
        sm.SapmergeWarning, match=rf"'joined' has .*{whole}.* in one piece, 'a1' has parts"
    ):
        agree(llama, folded(llama, merged([one, joined], tmp_path / "out")), wanted)
    agree(llama, folded(llama, merged([one, joined], tmp_path / "checked", model=llama())), wanted)
    # The other way round: the model has one projection, the adapters have parts.
    phi = nn.Module()
    phi.model = nn.Module()
    phi.model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    rows = sum(
        load_file(one / "adapter_model.safetensors")[
            f"{PREFIX}model.layers.0.{place(part)}.lora_B.weight"
        ].shape[0]
        for part in parts
    )
    for layer in phi.model.layers:
        holder = nn.Module()
        holder.add_module(whole, nn.Linear(32, rows, bias=False))
        layer.add_module(place(parts[0]).split(".")[0], holder)
    before = {k: v.clone() for k, v in phi.state_dict().items()}
    sm.merge([one, joined], method=sm.mean(), model=phi).apply_to(phi)
    base = {k: v.double() for k, v in llama().state_dict().items()}
    for k in range(2):
        names = [f"model.layers.{k}.{place(part)}.weight" for part in parts]
        key = f"model.layers.{k}.{place(whole, parts[0])}.weight"
        change = torch.cat([wanted[name] - base[name] for name in names])
        assert torch.allclose(
            phi.state_dict()[key].double() - before[key].double(), change, atol=1e-6
        )


def place(part: str, like: str = "") -> str:
    holder = "self_attn" if (like or part)[0] in "qkv" else "mlp"
    return f"{holder}.{part}"


def test_a_fused_projection_that_cannot_be_cut_is_said(tmp_path: Path) -> None:
    one, two = (
        train(llama, tmp_path / f"a{k}", k, target_modules=["gate_proj", "up_proj"], lora_alpha=8)
        for k in (1, 2)
    )
    joined = fused(two, "joined", "gate_up_proj", ("gate_proj", "up_proj"))
    tensors = load_file(joined / "adapter_model.safetensors")
    save_file(
        {k: v[:-1] if "lora_B" in k else v for k, v in tensors.items()},
        joined / "adapter_model.safetensors",
    )
    with pytest.warns(sm.SapmergeWarning) as caught:
        sm.merge([one, joined], method=sm.mean())
    assert any(
        re.search("'joined' has .* 'a1' .* different modules", str(w.message)) for w in caught
    )


def test_names_that_are_no_choice(tmp_path: Path) -> None:
    one = train(llama, tmp_path / "a", 1, target_modules=QV)
    merge = sm.merge([one], method=sm.mean())
    with pytest.raises(sm.MethodError, match="transformers 4"):
        merge.save_pretrained(tmp_path / "out", names="v4")
    with pytest.raises(sm.MethodError, match="LLaVA"):
        merge.save_pretrained(tmp_path / "out", names="llava")
    assert not (tmp_path / "out").exists()


def test_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    one, two = (train(qwen_vl, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2))
    old = renamed(
        two, "old", lambda key: key.replace("model.language_model.layers", "model.layers")
    )
    files = []
    for k, paths in enumerate(([one, old], [old, one])):
        with pytest.warns(sm.SapmergeWarning, match="spell"):
            files.append(
                (merged(paths, tmp_path / f"o{k}") / "adapter_model.safetensors").read_bytes()
            )
    assert files[0] == files[1]
