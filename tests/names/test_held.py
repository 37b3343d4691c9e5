"""Models as people hold them, and what lies in and beside the folder of an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sapmerge as sm
from tests.models import PREFIX
from tests.versions import needs_pickles

from .helpers import QV, agree, folded, llama, mean, reconfigured, train


def test_compiled_and_wrapped_models_are_unwrapped(tmp_path: Path) -> None:
    one, two = (train(llama, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2))
    wanted = mean(llama, [one, two])
    for k, wrap in enumerate(
        (torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)))
    ):
        sm.merge([one, two], model=wrap(llama()), method=sm.mean()).save_pretrained(
            tmp_path / f"out{k}"
        )
        agree(llama, folded(llama, tmp_path / f"out{k}"), wanted)
        model = wrap(llama())
        sm.merge([one, two], method=sm.mean()).apply_to(model)
        inner = {
            name.replace("_orig_mod.", "").replace("module.", ""): v
            for name, v in model.state_dict().items()
        }
        agree(llama, {name: value.double() for name, value in inner.items()}, wanted)


def test_import_merge_and_save_without_fcntl(tmp_path: Path) -> None:
    path = train(llama, tmp_path / "a", 1, target_modules=QV)
    code = (
        "import sys; sys.modules['fcntl'] = None\nimport sapmerge as sm\n"
        f"sm.merge([{str(path)!r}], method=sm.mean()).save_pretrained({str(tmp_path / 'out')!r})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (
        load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
        == load_file(path / "adapter_model.safetensors").keys()
    )


def test_the_class_of_the_base_is_copied_where_all_agree(tmp_path: Path) -> None:
    one, two = (train(llama, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2))
    written = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    for path in (one, two):
        reconfigured(path, auto_mapping=written)
    sm.merge([one, two], method=sm.mean()).save_pretrained(tmp_path / "out")
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["auto_mapping"]
        == written
    )
    reconfigured(two, auto_mapping=None)
    sm.merge([one, two], method=sm.mean()).save_pretrained(tmp_path / "apart")
    assert (
        json.loads((tmp_path / "apart" / "adapter_config.json").read_text())["auto_mapping"] is None
    )


def pickled(
    path: Path, seed: int, name: str = "base_model.model.model.mm_projector.{}"
) -> dict[str, Tensor]:
    """`non_lora_trainables.bin` as the original code of LLaVA writes it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    found = {
        name.format(key): torch.randn(shape, generator=generator) for key, shape in shapes.items()
    }
    torch.save(found, path / "non_lora_trainables.bin")
    return found


@needs_pickles
def test_the_projector_of_the_original_llava(tmp_path: Path) -> None:
    paths = [train(llama, tmp_path / f"a{k}", k, target_modules=QV) for k in (1, 2)]
    found = [pickled(path, k) for k, path in enumerate(paths)]
    with pytest.raises(
        sm.AdapterSecurityError, match=r"non_lora_trainables\.bin.*allow_pickle_weights=True"
    ):
        sm.merge(paths, method=sm.mean())
    adapters = [sm.Adapter.load(path, allow_pickle_weights=True) for path in paths]
    with pytest.raises(sm.MethodError, match="projector"):
        sm.merge(adapters, method=sm.mean())
    merged = sm.merge(adapters, method=sm.mean(), modules_to_save="mean")
    for names, keys in (
        (None, ("model.mm_projector.0", "model.mm_projector.2")),
        (
            "transformers 5",
            ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
        ),
    ):
        merged.save_pretrained(tmp_path / str(names), names=names)
        written = load_file(tmp_path / str(names) / "adapter_model.safetensors")
        for key, number in zip(keys, "02", strict=True):
            for leaf in ("weight", "bias"):
                parts = [
                    one[f"base_model.model.model.mm_projector.{number}.{leaf}"] for one in found
                ]
                assert torch.allclose(written[f"{PREFIX}{key}.{leaf}"], sum(parts) / 2, atol=1e-6)


@needs_pickles
@pytest.mark.parametrize(
    "name", ["base_model.model.model.layers.0.mlp.down_proj.{}", "base_model.model.model.norm.{}"]
)
def test_nothing_else_of_the_base_is_replaced(name: str, tmp_path: Path) -> None:
    path = train(llama, tmp_path / "a", 1, target_modules=QV)
    pickled(path, 1, name)
    with pytest.raises(sm.AdapterSecurityError, match="would replace a weight of the base"):
        sm.Adapter.load(path, allow_pickle_weights=True)


def test_weights_beside_the_adapter_are_named(tmp_path: Path) -> None:
    path = train(llama, tmp_path / "a", 1, target_modules=QV)
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "scaler.pt",
    ):
        torch.save({}, path / name)
    sm.Adapter.load(path)  # nothing to say
    torch.save({}, path / "value_head.bin")
    with pytest.warns(sm.SapmergeWarning, match=r"value_head\.bin"):
        sm.Adapter.load(path)


def test_a_folder_above_the_adapter_is_told(tmp_path: Path) -> None:
    train(llama, tmp_path / "run" / "checkpoint-20", 1, target_modules=QV)
    with pytest.raises(sm.AdapterFormatError, match="checkpoint-20"):
        sm.Adapter.load(tmp_path / "run")


def test_a_lora_here_and_saved_whole_there(tmp_path: Path) -> None:
    one = train(llama, tmp_path / "a", 1, target_modules=["embed_tokens", *QV])
    two = train(llama, tmp_path / "b", 2, target_modules=QV, modules_to_save=["embed_tokens"])
    with warnings.catch_warnings():
        # of copies of the base's weight in the files
        warnings.simplefilter("ignore", sm.SapmergeWarning)
        adapters = [sm.Adapter.load(path) for path in (one, two)]
    with pytest.raises(sm.IncompatibleAdaptersError, match=r"embed_tokens.*'a'.*'b'"):
        sm.merge(adapters, method=sm.mean(), modules_to_save="mean")


@pytest.mark.parametrize(
    ("config", "signed"),
    [
        ({"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}, True),
        ({"model_type": "llava_qwen"}, True),
        ({"model_type": "llava", "mm_projector_type": "mlp2x_gelu"}, True),
        ({"model_type": "llava", "text_config": {}}, False),
        ({"model_type": "llama"}, False),
        (["llava_llama"], False),
    ],
)
def test_the_config_of_the_original_llava_is_a_sign(
    tmp_path: Path, config: object, signed: bool
) -> None:
    """Its adapters name a base of text, and their modules are those of a text model."""
    one = train(llama, tmp_path / "a", 1, target_modules=QV)
    (one / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merged = sm.merge([one], method=sm.mean())
    said = "".join(str(w.message) for w in found)
    assert ("there is none: the merge is without it" in said) == signed
    if not signed:
        with pytest.raises(sm.MethodError, match="models like LLaVA"):
            merged.save_pretrained(tmp_path / "out", names="llava")
        return
    merged.save_pretrained(tmp_path / "out", names="transformers 4")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert f"{PREFIX}language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    merged.save_pretrained(tmp_path / "own", names="llava")
    wanted = load_file(one / "adapter_model.safetensors").keys()
    assert load_file(tmp_path / "own" / "adapter_model.safetensors").keys() == wanted
