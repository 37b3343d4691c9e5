"""Adapters that strangers published: merged, and loaded by PEFT into a model of the
right architecture.

Two of them lie in `tests/data`; the others are read from the `shared` folder beside the repository,
where there is one.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    ViTConfig,
    ViTForImageClassification,
)

import sapmerge as sm
from sapmerge.cli import main
from tests import oracles
from tests.conftest import error
from tests.models import DATA, PREFIX, SHARED, copied, files, lazy_deltas, load, same
from tests.versions import needs_pickles

GPT2 = ["gpt2__gurvineet-best", "gpt2__deepbiolab", "gpt2__gurvineet-checkpoint_epoch_1"]
VIT = ["vit__Yunyi307-best_model", "vit__fanLnen-week2"]
DISTILBERT = ["distilbert__Karangarg01-hate", "distilbert__Tashu014-imdb"]
IDS = torch.arange(24).reshape(2, 12) * 7 % 64
Updates = Mapping[str, Callable[[], Tensor]]
"""Module -> its update, formed when it is asked for:
a real model's do not fit into memory twice.
"""


def folder(name: str) -> Path:
    found = next((root / name for root in (DATA, SHARED) if (root / name).exists()), None)
    if found is None:
        pytest.skip(f"{name} is not in the shared folder beside this repository")
    return found


@lru_cache(maxsize=1)
def _base(architecture: str) -> nn.Module:
    """A random model with the real layers; the vocabulary and the images,
    which no adapter touches, are small.
    """
    torch.manual_seed(0)
    if architecture == "gpt2":
        model = GPT2ForSequenceClassification(
            GPT2Config(vocab_size=64, n_positions=32, num_labels=2, pad_token_id=0)
        )
    elif architecture == "vit":
        model = ViTForImageClassification(ViTConfig(image_size=32, num_labels=2))
    else:
        model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=64, num_labels=2))
    return model.eval()


def base(architecture: str) -> nn.Module:
    return copy.deepcopy(_base(architecture))


def tensors(path: Path) -> dict[str, Tensor]:
    pickled = path / "adapter_model.bin"
    if pickled.exists():
        return torch.load(pickled, map_location="cpu", weights_only=True)
    return load_file(path / "adapter_model.safetensors")


def by_hand(path: Path, scaling: float) -> dict[str, Callable[[], Tensor]]:
    """s B A of every module, from the tensors of the file; float64."""
    found = tensors(path)
    names = [
        name.removesuffix(".lora_A.weight") for name in found if name.endswith("lora_A.weight")
    ]
    return {
        name.removeprefix(PREFIX): lambda name=name: (
            scaling
            * found[f"{name}.lora_B.weight"].double()
            @ found[f"{name}.lora_A.weight"].double()
        )
        for name in names
    }


def combined(adapters: Sequence[Updates], weight: float) -> dict[str, Callable[[], Tensor]]:
    """weight times the sum."""
    names = {name for updates in adapters for name in updates}
    return {
        name: lambda name=name: (
            weight * sum(updates[name]() for updates in adapters if name in updates)
        )
        for name in names
    }


def stored(path: Path) -> dict[str, Callable[[], Tensor]]:
    adapter = sm.Adapter.load(path)
    return {name: lambda name=name: adapter.update(name).dense() for name in adapter.modules}


def close(got: Updates, wanted: Updates, turned: bool = False, within: float = 2e-6) -> None:
    assert set(got) == set(wanted)
    for name in wanted:
        found = got[name]()
        assert error(found.T if turned else found, wanted[name]()) < within, name


def plus(model: nn.Module, changes: Updates, turned: bool = False) -> nn.Module:
    for name, matrix in changes.items():
        model.get_submodule(name).weight.data += (matrix().T if turned else matrix()).float()
    return model


def last_layers(path: Path, count: int = 2) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A real adapter without most of its layers, for the rules that need dense
    matrices; no heads.
    """
    config = json.loads((path / "adapter_config.json").read_text()) | {
        "modules_to_save": None,
        "task_type": None,
    }
    kept = {
        name: tensor
        for name, tensor in tensors(path).items()
        if re.search(rf"\.1[{''.join('10'[:count])}]\.", name)
    }
    return config, {name: tensor for name, tensor in kept.items() if "lora_" in name}


# GPT-2: Conv1D, fan_in_fan_out, heads of 2 and 6 classes


@pytest.mark.parametrize("count", [2, 3])
def test_gpt2_moves_the_logits_as_the_dense_sum_does(tmp_path: Path, count: int) -> None:
    adapters = [folder(name) for name in GPT2[:count]]
    merged = sm.merge(
        adapters, method=sm.task_arithmetic(), modules_to_save={"score": adapters[1].name}
    )
    merged.save_pretrained(tmp_path / "out")
    wanted = combined([by_hand(path, 4.0) for path in adapters], 1.0)  # alpha 32, r 8
    assert len(wanted) == 36
    peft_model = load(tmp_path / "out", base("gpt2")).eval()
    close(lazy_deltas(peft_model), wanted, turned=True)
    model = base("gpt2")
    with torch.no_grad():
        before = model(IDS).logits
        plus(model, wanted, turned=True)
        model.score.weight.copy_(tensors(adapters[1])[PREFIX + "score.weight"])
        logits = model(IDS).logits
        assert error(peft_model(IDS).logits, logits) < 1e-5
        assert error(logits, before) > 0.1
        applied = base("gpt2")
        merged.apply_to(applied)
        assert error(applied(IDS).logits, logits) < 1e-5


def test_gpt2_one_adapter_is_merge_and_unload() -> None:
    path = folder(GPT2[1])
    mine, theirs = base("gpt2"), load(path, base("gpt2")).merge_and_unload()
    sm.merge([path], method=sm.mean(), modules_to_save="first").apply_to(mine)
    state = mine.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert error(state[name], tensor) < 1e-6, name


def test_gpt2_heads_conflict() -> None:
    adapters = [folder(name) for name in GPT2[:2]]
    with pytest.raises(
        sm.MethodError, match=r"'score' in gpt2__gurvineet-best, gpt2__deepbiolab.*modules_to_save="
    ):
        sm.merge(adapters, method=sm.mean())
    with pytest.raises(
        sm.IncompatibleAdaptersError, match=r"'score\.weight'.*\(6, 768\).*\(2, 768\)"
    ):
        sm.merge(adapters, method=sm.mean(), modules_to_save="mean")


@pytest.mark.parametrize("policy", ["drop", "first"])
def test_gpt2_heads_by_policy(tmp_path: Path, policy: str) -> None:
    adapters = [folder(name) for name in (GPT2[1], GPT2[0])]
    merged = sm.merge(adapters, method=sm.core_space(), modules_to_save=policy)
    merged.save_pretrained(tmp_path / "out")
    assert merged.report.energy_kept == 1.0  # the core space is of low rank
    peft_model = load(tmp_path / "out", base("gpt2"))
    close(lazy_deltas(peft_model), stored(tmp_path / "out"), turned=True)
    if policy == "first":
        head = peft_model.get_base_model().score.modules_to_save["default"].weight
        assert torch.equal(head, tensors(adapters[0])[PREFIX + "score.weight"])


def test_gpt2_by_ties_is_the_textbook() -> None:
    inputs = [last_layers(folder(name), 1) for name in GPT2[:2]]
    merged = sm.merge(inputs, method=sm.ties(0.2))
    by_file = [combined([by_hand(folder(name), 4.0)], 1.0) for name in GPT2[:2]]
    for name, update in merged.updates():
        wanted = oracles.ties([[found[name]().numpy() for found in by_file]], 0.2)[0]
        differs = np.abs(update.dense().double().numpy() - wanted) > 1e-6 * np.abs(wanted).max()
        assert differs.mean() < 1e-5, name  # entries at the cut, where float32 decides


def test_gpt2_is_added_to_a_live_model(tmp_path: Path) -> None:
    adapters = [folder(name) for name in GPT2[:2]]
    live = load(adapters[1], base("gpt2"))
    logits = live.eval()(IDS).logits
    merged = sm.merge(adapters, method=sm.mean(), modules_to_save="drop")
    merged.add_to(live, "merged")
    merged.save_pretrained(tmp_path / "out")
    close(lazy_deltas(live, "merged"), stored(tmp_path / "out"), turned=True)
    assert torch.equal(live(IDS).logits, logits)
    live.set_adapter("merged")  # its head is the base's: the merge has none
    with torch.no_grad():
        wanted = plus(base("gpt2"), stored(tmp_path / "out"), turned=True)(IDS).logits
        assert error(live(IDS).logits, wanted) < 1e-5
    before = copied(live)
    with pytest.raises(sm.ModelMismatchError, match=r"'score\.weight' \(6, 768\).*\(2, 768\)"):
        sm.merge(adapters, method=sm.mean(), modules_to_save="first").add_to(live, "six")
    assert same(before, copied(live))
    assert set(live.peft_config) == {"default", "merged"}


def test_gpt2_does_not_fit_another_model() -> None:
    options = {"method": sm.mean(), "modules_to_save": "drop"}
    with torch.device("meta"):
        headless = GPT2Model(GPT2Config(n_layer=1))
        small = GPT2ForSequenceClassification(GPT2Config(n_embd=96, n_head=4, n_layer=12))
    with pytest.raises(sm.ModelMismatchError, match=r"GPT2Model has no module 'transformer\.h"):
        sm.merge([folder(GPT2[1])], model=headless, **options)
    with pytest.raises(sm.ModelMismatchError, match=r"transformer\.h\.\d+\.\w+\.\w+'.*768"):
        sm.merge([folder(GPT2[1])], model=small, **options)


def test_gpt2_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = [str(folder(name)) for name in GPT2[:2]]
    assert main(["inspect", *adapters]) == 0
    assert "mergeable: yes" in capsys.readouterr().out
    command = ["merge", *adapters, "-o", str(tmp_path / "out"), "--method", "mean"]
    assert main(command) == 2
    assert "'score'" in capsys.readouterr().err
    assert main([*command, "--modules-to-save", "drop"]) == 0
    sm.merge(adapters[::-1], method=sm.mean(), modules_to_save="drop").save_pretrained(
        tmp_path / "turned"
    )
    assert files(tmp_path / "out") == files(tmp_path / "turned")


# ViT: two authors, ranks 16 and 8, other modules, names of transformers 4


def new_name(name: str) -> str:
    """The table of the migration notes, written out."""
    for old, new in (
        ("vit.encoder.layer.", "vit.layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ):
        name = name.replace(old, new)
    return name


def test_vit_of_two_authors(tmp_path: Path) -> None:
    paths = [folder(name) for name in VIT]
    one, two = ({new_name(name): D for name, D in by_hand(path, 2.0).items()} for path in paths)
    assert (len(one), len(two)) == (24, 60)
    wanted = combined([one, two], 0.5)
    merged = sm.merge(paths, method=sm.mean(), modules_to_save="first")
    merged.save_pretrained(tmp_path / "out", names="transformers 5")
    peft_model = load(tmp_path / "out", base("vit")).eval()
    close(lazy_deltas(peft_model), wanted)
    head = peft_model.get_base_model().classifier.modules_to_save["default"]
    assert torch.equal(head.weight, tensors(paths[0])[PREFIX + "classifier.weight"])
    pixels = torch.randn(2, 3, 32, 32)
    model = plus(base("vit"), wanted)
    model.classifier.load_state_dict(head.state_dict())
    with torch.no_grad():
        assert error(peft_model(pixels).logits, model(pixels).logits) < 1e-5
    sm.merge(paths, model=model, method=sm.mean(), modules_to_save="first").save_pretrained(
        tmp_path / "checked"
    )
    assert files(tmp_path / "checked") == files(tmp_path / "out")
    merged.save_pretrained(tmp_path / "as it was")
    spelled = {name for path in paths for name in tensors(path)}
    assert set(load_file(tmp_path / "as it was" / "adapter_model.safetensors")) == spelled


def test_vit_by_a_rule_that_makes_it_dense(tmp_path: Path) -> None:
    inputs = [last_layers(folder(name), 1) for name in VIT]
    merged = sm.merge(inputs, method=sm.ties(0.2), rank=0.95)
    merged.save_pretrained(tmp_path / "out", names="transformers 5")
    assert merged.report.energy_kept >= 0.95
    assert 0 < len(merged.report.layers) == len(stored(tmp_path / "out"))
    close(lazy_deltas(load(tmp_path / "out", base("vit"))), stored(tmp_path / "out"))


# DistilBERT: heads of two modules, one adapter from a pickle


@needs_pickles
def test_distilbert_with_heads(tmp_path: Path) -> None:
    paths = [folder(name) for name in (*DISTILBERT, "distilbert__sdtrklse-bin")]
    with pytest.raises(sm.AdapterSecurityError, match="allow_pickle_weights=True"):
        sm.merge(paths, method=sm.mean(), modules_to_save="mean")
    with pytest.warns(sm.SapmergeWarning, match="pickle"):
        third = sm.Adapter.load(paths[2], allow_pickle_weights=True)
    merged = sm.merge([*paths[:2], third], method=sm.mean(), modules_to_save="mean")
    merged.save_pretrained(tmp_path / "out")
    peft_model = load(tmp_path / "out", base("distilbert"))
    close(
        lazy_deltas(peft_model),
        combined([by_hand(path, s) for path, s in zip(paths, (2.0, 2.0, 4.0))], 1 / 3),
    )
    for module in ("pre_classifier", "classifier"):
        saved = peft_model.get_base_model().get_submodule(module).modules_to_save["default"]
        for part in ("weight", "bias"):
            mean = sum(tensors(path)[f"{PREFIX}{module}.{part}"].double() for path in paths) / 3
            assert error(getattr(saved, part).detach(), mean) < 1e-6


def test_bloom_of_old_peft_is_refused() -> None:
    path = folder("bloom-560m__wujindou-legacy-bin")
    with pytest.raises(sm.AdapterSecurityError, match="allow_pickle_weights=True"):
        sm.merge([path], method=sm.mean())
    with pytest.raises(sm.SapmergeError, match="enable_lora"):
        sm.Adapter.load(path, allow_pickle_weights=True)


def test_adapters_of_different_architectures_are_refused() -> None:
    with pytest.raises(sm.IncompatibleAdaptersError, match="different base models"):
        sm.merge([folder(GPT2[0]), folder(DISTILBERT[0])], method=sm.mean(), modules_to_save="drop")
    assert sm.inspect([folder(GPT2[0]), folder(DISTILBERT[0])]).problem
