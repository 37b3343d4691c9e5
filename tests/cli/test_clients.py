"""`sapmerge neighbours`, `prompts` and `cache merge`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.io.cache import Cache

from .shell import fails


def test_neighbours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["left", "right", "same"]
    command = ["neighbours", *names, "--count", "1", "--distance", "cosine"]
    assert main([*command, "--samples", "1,2,3", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    wanted = sm.federated.neighbours(names, 1, [1, 2, 3], distance="cosine")
    assert list(data) == names
    table = torch.tensor([list(row.values()) for row in data.values()], dtype=torch.float64)
    assert torch.equal(table, wanted)
    assert table.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert main([*command, "--self-weight", "0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["client", *names]
    assert [line.split()[1 + k] for k, line in enumerate(lines[1:])] == ["0.250"] * 3
    assert "self_weight" in fails(capsys, *command, "--self-weight", "2")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16))


def test_prompts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT reads the mean by samples."""
    found = []
    for seed, name in enumerate(("one", "two")):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = get_peft_model(gpt2(), config)
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                generator = torch.Generator().manual_seed(seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(f"prompt-{name}")
        tensors = load_file(f"prompt-{name}/adapter_model.safetensors")
        found.append(tensors["prompt_embeddings"])
    command = ["prompts", "prompt-one", "prompt-two", "-o", "mean/prompt", "--samples", "1,3"]
    assert main([*command, "--json"]) == 0
    shares = [one["share"] for one in json.loads(capsys.readouterr().out)["clients"].values()]
    assert shares == [0.25, 0.75]
    wanted = 0.25 * found[0] + 0.75 * found[1]
    model = PeftModel.from_pretrained(gpt2(), "mean/prompt")
    torch.testing.assert_close(next(model.prompt_encoder.parameters()).detach(), wanted)
    assert main([*command, "--overwrite"]) == 0
    assert "norm kept" in capsys.readouterr().out


def cache(folder: str, **numbers: float) -> Cache:
    made = Cache(folder)
    for key, number in numbers.items():
        made.put(key, {"x": torch.full((3,), number)}, {"key": key})
    return made


def test_cache_merge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results of all, also losses; damaged ones are named, and of two the first is kept."""
    cache("kept", a=1.0)
    cache("node-1", a=1.0, b=2.0, c=5.0)
    cache("node-2", a=9.0, d=4.0)
    cache("node-2/losses", loss=3.0)
    bad = next(
        path for path in Path("node-1").iterdir() if Cache("node-1").key_of(path.name) == "c"
    )
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    with warnings.catch_warnings(record=True):
        assert main(["cache", "merge", "kept", "node-1", "node-2", "--json"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert (data["copied"], data["there"]) == (3, 2)
    assert data["damaged"] == [str(bad)]
    assert len(data["different"]) == 1
    assert f"{str(bad)!r} is damaged" in err
    merged = Cache("kept")
    for key, number in {"a": 1.0, "b": 2.0, "d": 4.0}.items():
        kept = merged.get(key)
        assert kept is not None
        assert kept[0]["x"].tolist() == [number] * 3
        assert kept[1] == {"key": key}
    assert merged.get("c") is None
    assert Cache("kept/losses").get("loss") is not None
    assert "is no folder" in fails(capsys, "cache", "merge", "kept", "nowhere")
