"""`inspect` of every kind, of what `merge` refuses, and names of quantised bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sapmerge as sm
from sapmerge.io.base_names import one_base, unquantised

from . import helpers as h
from .helpers import QV, edit, merged, train


def test_inspect_describes_what_merge_refuses(tmp_path: Path) -> None:
    plain = train(tmp_path, h.llama, 1, r=4, target_modules=QV)
    strange = edit(plain, lambda c: c | {"peft_type": "IA3", "base_model_name_or_path": "org/base"})
    nested = edit(plain, lambda c: c | {"use_qalora": True, "r": 7})
    found = sm.inspect([plain, strange, nested])
    assert [(a.kinds, a.ranks, a.layers) for a in found.adapters] == [
        ("linear", "4", 4), ("IA3", "4", 0), ("LORA", "7", 0)
    ]  # fmt: skip
    assert found.adapters[1].base_model == "org/base"
    assert "IA3" in (found.adapters[1].problem or "")
    assert "QALoRA" in (found.adapters[2].problem or "")
    assert "is refused" in str(found)
    assert "mergeable: no" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(sm.AdapterConfigError, match="IA3"):
        merged([plain, strange])
    with pytest.raises(sm.AdapterFormatError):
        sm.inspect([tmp_path / "nothing here"])


def test_inspect_of_kinds_that_need_the_base(tmp_path: Path) -> None:
    paths = [train(tmp_path, h.biased_llama, 1, r=4, target_modules=QV, use_dora=True, bias="all")]
    paths.append(train(tmp_path, h.biased_llama, 2, r=4, target_modules=QV, lora_bias=True))
    without = sm.inspect(paths)
    assert without.adapters[0].norm is None
    assert without.adapters[0].kinds == "biases, dora, linear"
    assert without.adapters[1].kinds == "linear, lora_bias"
    assert "model=model" in (without.problem or "")
    found = sm.inspect(paths, h.biased_llama())
    base, moved = h.state(h.biased_llama()), h.unloaded(h.biased_llama, paths[0])
    names = [name for name in base if name.endswith(("q_proj.weight", "v_proj.weight"))]
    wanted = sum(float((moved[name] - base[name]).square().sum()) for name in names) ** 0.5
    assert found.problem is None
    assert found.adapters[0].norm == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-1B"),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit/", "unsloth/Llama-3.2-1B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("org/model-AWQ", "org/model"),
        ("org/model-FP8", "org/model"),
        ("org/awq-model", "org/awq-model"),
        ("-AWQ", "-AWQ"),
    ],
)
def test_unquantised(name: str, plain: str) -> None:
    assert unquantised(name) == plain


def test_one_base() -> None:
    assert one_base(["a/B-bnb-4bit", "a/b", "a/B"]) == "a/B"
    assert one_base(["a/B-bnb-4bit", "a/B-AWQ/"]) == "a/B"
    assert one_base(["a/B", "c/B"]) is None


def test_quantised_copies_of_one_base_merge_with_a_warning(tmp_path: Path) -> None:
    path = train(tmp_path, h.llama, 1, r=4, target_modules=QV)
    names = ["org/Model-bnb-4bit", "org/Model", "org/model-unsloth-bnb-4bit/"]
    paths = [edit(path, lambda c, n=name: c | {"base_model_name_or_path": n}) for name in names]
    with pytest.warns(sm.SapmergeWarning, match=r"bnb-4bit.*the output names 'org/Model'"):
        done = sm.merge(paths, method=sm.mean())
    assert done.base.name == "org/Model"
    other = edit(path, lambda c: c | {"base_model_name_or_path": "org/Model-2"})
    with pytest.raises(sm.IncompatibleAdaptersError, match="different base models"):
        sm.merge([paths[0], other], method=sm.mean())
