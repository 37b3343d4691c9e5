"""The base as a folder: what needs its weights reads them there, and a merged model is streamed
from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sapmerge as sm

from . import helpers as h
from .helpers import QV, merged, train

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _saved(make: h.Make, folder: Path, shard: str = "5GB") -> Path:
    model: Any = make()
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def _loaded(make: h.Make, folder: Path) -> dict[str, torch.Tensor]:
    model: Any = type(make()).from_pretrained(folder)
    return h.state(model)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_dora_biases_and_tokens_from_a_folder(shard: str, tmp_path: Path) -> None:
    base = _saved(h.biased_llama, tmp_path / "base", shard)
    assert (base / "model.safetensors.index.json").exists() == (shard != "5GB")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    paths = [
        train(inputs, h.biased_llama, 1, r=4, target_modules=QV, use_dora=True, bias="all"),
        train(
            inputs,
            h.biased_llama,
            2,
            r=4,
            target_modules=QV,
            trainable_token_indices={"embed_tokens": [1, 5]},
        ),
        train(inputs, h.biased_llama, 3, r=4, target_modules=QV, lora_bias=True),
    ]
    wanted = h.target(h.biased_llama, paths, [1.0, 2.0, 0.5])
    done = merged(paths, model=base, weights=[1.0, 2.0, 0.5])
    done.save_pretrained(tmp_path / "out")
    h.compare(h.biased_llama, h.unloaded(h.biased_llama, tmp_path / "out"), wanted, 1e-4)
    done.save_merged(base, tmp_path / "whole")
    h.compare(h.biased_llama, _loaded(h.biased_llama, tmp_path / "whole"), wanted, 1e-4)
    model = h.biased_llama()
    done.apply_to(model)
    h.compare(h.biased_llama, h.state(model), wanted, 1e-4)
    assert sm.reproduce(tmp_path / "out", paths, model=base) == []
    with pytest.raises(sm.OutputExistsError):
        done.save_merged(base, tmp_path / "whole")


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (h.gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
        (h.tied_llama, {"target_modules": QV}),
        (
            h.qwen_moe,
            {"target_modules": QV, "target_parameters": EXPERTS},
        ),
        (h.mixtral, {"target_modules": QV, "target_parameters": EXPERTS}),
    ],
    ids=["gpt2", "tied", "qwen experts", "mixtral experts"],
)
def test_a_merged_model_is_streamed(make: h.Make, settings: dict[str, Any], tmp_path: Path) -> None:
    base = _saved(make, tmp_path / "base", "40KB")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    paths = [train(inputs, make, k, r=2 * k, **settings) for k in (1, 2)]
    merged(paths, model=base).save_merged(base, tmp_path / "whole")
    h.compare(make, _loaded(make, tmp_path / "whole"), h.target(make, paths), 1e-4)


@pytest.mark.parametrize("flag", [True, False])
def test_square_layers_beside_those_of_gpt2_are_not_turned(flag: bool, tmp_path: Path) -> None:
    """One `fan_in_fan_out` says nothing of single modules, and square shapes do not either."""
    base, inputs = tmp_path / "base", tmp_path / "inputs"
    base.mkdir()
    inputs.mkdir()
    tensors = {name: value.clone() for name, value in h.captioner().state_dict().items()}
    save_file(tensors, base / "model.safetensors")
    attention = r".*(attention.*(q_proj|v_proj|query|value)|c_proj|c_attn)"
    paths = [
        train(inputs, h.captioner, k, r=4, target_modules=attention, use_dora=k == 2)
        for k in (1, 2)
    ]
    paths = [h.edit(path, lambda config: {**config, "fan_in_fan_out": flag}) for path in paths]
    names = sm.Adapter.load(paths[0]).modules
    assert {n.split(".")[0] for n in names} == {"encoder", "decoder"}
    done = merged(paths, model=base)
    done.save_merged(base, tmp_path / "whole")
    made = load_file(tmp_path / "whole" / "model.safetensors")
    wanted = h.target(h.captioner, paths)
    assert set(wanted) == set(made)
    for name, value in wanted.items():
        torch.testing.assert_close(made[name].double(), value, atol=1e-4, rtol=0)


def test_token_rows_beside_a_lora_of_their_embedding(tmp_path: Path) -> None:
    base = _saved(h.llama, tmp_path / "base")
    rows: dict[str, Any] = {
        "target_modules": QV,
        "trainable_token_indices": {"embed_tokens": [1, 5]},
    }
    paths = [
        train(tmp_path, h.llama, 1, r=4, **rows),
        train(tmp_path, h.llama, 2, r=4, target_modules=[*QV, "embed_tokens"]),
    ]
    done = merged(paths, sm.task_arithmetic(), model=base, weights=[0.5, 2.0])
    done.save_merged(base, tmp_path / "whole")
    wanted = h.target(h.llama, paths, [0.5, 2.0], total=True)
    h.compare(h.llama, _loaded(h.llama, tmp_path / "whole"), wanted)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (h.tied_llama, {"target_modules": [*QV, "embed_tokens"]}),
        (h.tied_llama, {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
        (h.gpt2, {"target_modules": ["c_attn", "wte"]}),  # its config leaves the default out
    ],
)
def test_embeddings_that_are_the_head_are_not_changed_in_both(
    make: h.Make, settings: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT changes the input embeddings alone; the folder has one tensor for both."""
    base = _saved(make, tmp_path / "base")
    done = merged([train(tmp_path, make, 1, r=2, **settings)], modules_to_save="mean")
    with pytest.raises(sm.ModelMismatchError, match="ties its embeddings and its head"):
        done.save_merged(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_beside_a_head_of_its_own(tmp_path: Path) -> None:
    base = _saved(h.llama, tmp_path / "base")
    path = train(tmp_path, h.llama, 1, r=2, target_modules=[*QV, "embed_tokens"])
    merged([path]).save_merged(base, tmp_path / "whole")
    h.compare(h.llama, _loaded(h.llama, tmp_path / "whole"), h.target(h.llama, [path]), 1e-4)


def test_a_bias_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    base = _saved(h.llama, tmp_path / "base")
    path = train(tmp_path, h.biased_llama, 1, r=4, target_modules=QV, bias="all")
    with pytest.raises(sm.ModelMismatchError, match="has no tensor"):
        merged([path]).save_merged(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    base = _saved(h.llama, tmp_path / "base")
    path = train(tmp_path, h.llama, 1, r=4, target_modules=QV)
    wide = train(tmp_path, lambda: h.llama(hidden_size=48), 2, r=4, target_modules=QV)
    with pytest.raises(sm.ModelMismatchError, match="is it the adapters' base"):
        merged([wide], model=base)
    with pytest.raises(sm.ModelMismatchError):
        merged([wide]).save_merged(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(sm.MethodError, match="loaded model"):
        merged([path], anchor_loader=[{}], model=base)
    with pytest.raises(sm.MethodError, match="no folder"):
        merged([path], model=tmp_path / "nowhere")
    (base / "model.safetensors").rename(base / "other.safetensors")
    for table in ({"a": "../x.safetensors"}, {}, {"a": 3}):
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        with pytest.raises(sm.AdapterSecurityError, match="weight_map"):
            merged([path], model=base)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "other.safetensors"}})
    )
    merged([path], model=base)
    (base / "more.safetensors").write_bytes((base / "other.safetensors").read_bytes())
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "other.safetensors", "b": "more.safetensors"}})
    )
    with pytest.raises(sm.AdapterFormatError, match="is in another shard, too"):
        merged([path], model=base)
    assert isinstance(h.llama(), nn.Module)
