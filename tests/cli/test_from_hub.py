"""hf://user/name, and user/name with `--hub`, of every command that takes a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

import sapmerge as sm
from sapmerge.cli import main
from tests.versions import OLD_TORCH

from ..io.formats.test_convert import kohya, mlx, torchtune, updates
from ..models import files
from .shell import Hub, fails
from .test_clients import gpt2


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Where somebody/art is what lies in `left`."""
    return of(monkeypatch, {"somebody/art": here / "left"})


def of(monkeypatch: pytest.MonkeyPatch, folders: Mapping[str, Path]) -> Hub:
    hub = Hub(folders)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    return hub


def test_merge_and_inspect(here: Path, hub: Hub) -> None:
    command = ["merge", "hf://somebody/art@v1", "right", "-o", "out", "--method", "mean", "--quiet"]
    assert main(command) == 0
    assert set(hub.asked) == {("somebody/art", "v1", None)}
    sm.merge({"art": "left", "right": "right"}, method=sm.mean()).save_pretrained("python")
    one, other = sm.Adapter.load("out"), sm.Adapter.load("python")
    assert one.digest == other.digest
    shutil.copytree(here / "left", here / "repository" / "sub" / "folder")
    hub.folders = {"somebody/art": here / "repository"}
    assert main(["inspect", "hf://somebody/art/sub/folder"]) == 0
    assert hub.asked[-1] == ("somebody/art", None, "sub/folder")


def test_bare_names_of_the_hub(here: Path, hub: Hub) -> None:
    """With --hub, and only what is no folder; without it nothing is downloaded."""
    (here / "a").mkdir()
    (here / "a" / "b").symlink_to(here / "right")
    command = ["merge", "x=somebody/art@v1", "y=a/b", "-o", "out", "--method", "mean", "--hub"]
    assert main([*command, "--dump-recipe", "r.yaml", "--quiet"]) == 0
    assert set(hub.asked) == {("somebody/art", "v1", None)}
    sm.merge({"x": "left", "y": "right"}, method=sm.mean()).save_pretrained("python")
    assert sm.Adapter.load("out").digest == sm.Adapter.load("python").digest
    assert "path: hf://somebody/art@v1" in (here / "r.yaml").read_text()
    hub.asked.clear()
    assert main(["inspect", "somebody/art", "right"]) == 2
    assert not hub.asked
    assert main(["inspect", "somebody/art", "right", "--hub"]) == 0


def test_names_of_the_hub_that_are_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ("merge", "hf://art", "-o", "out", "--method", "mean"),
        ("check", "hf://art", "--serving", "vllm"),
        ("verify", "hf://art"),
        ("convert", "hf://art", "-o", "out"),
        ("prompts", "hf://art", "-o", "out"),
    ):
        assert "expected hf://user/name" in fails(capsys, *command)


def test_check_verify_reproduce(here: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Output and inputs from the Hub; without --hub bare names are folders."""
    sm.merge(["left", "right"], method=sm.mean()).save_pretrained("merged")
    hub.folders = {"me/both": here / "merged", "somebody/art": here / "left"}
    assert main(["check", "hf://me/both@v2", "--serving", "vllm"]) == 0
    assert hub.asked[-1] == ("me/both", "v2", None)
    inputs = ["--inputs", "right", "somebody/art@v1"]
    for command in ("verify", "reproduce"):
        hub.asked.clear()
        assert main([command, "me/both", *inputs, "--hub"]) == 0
        assert set(hub.asked) == {("me/both", None, None), ("somebody/art", "v1", None)}
        hub.asked.clear()
        assert main([command, "me/both", *inputs]) == 2
        assert not hub.asked
    capsys.readouterr()
    hub.folders = {**hub.folders, "somebody/art": here / "same"}
    assert main(["verify", "hf://me/both", "--inputs", "right", "hf://somebody/art"]) == 2
    assert "is not an input of this output" in capsys.readouterr().err
    assert main(["reproduce", "hf://me/both", "--inputs", "right", "hf://somebody/art"]) == 2


def test_a_round(here: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["round", "new", "r", "--manifest", "left", "--max-share", "1"]) == 0
    for client, name in (("one", "hf://somebody/art@v1"), ("two", "left")):
        assert main(["round", "add", "r", name, "--client", client]) == 0
    assert set(hub.asked) == {("somebody/art", "v1", None)}
    assert main(["round", "add", "r", "somebody/art", "--client", "three", "--hub"]) == 0
    assert main(["round", "add", "r", "somebody/art", "--client", "four"]) == 2
    capsys.readouterr()
    assert main(["round", "report", "r", "--json"]) == 0
    clients = json.loads(capsys.readouterr().out)["clients"]
    assert len({client["digest"] for client in clients}) == 1  # all are `left`
    assert {client["client"] for client in clients} == {"one", "two", "three"}


def test_convert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository whose format is found out, and a file of one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "styles" / "old").mkdir(parents=True)
    dense = kohya(tmp_path / "styles" / "old" / "style.safetensors")
    wanted = mlx(tmp_path / "adapters")
    torchtune(tmp_path / "tune")
    hub = of(
        monkeypatch,
        {"a/mlx": tmp_path / "adapters", "a/style": tmp_path / "styles", "a/tt": tmp_path / "tune"},
    )
    assert main(["convert", "hf://a/mlx", "-o", "peft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == "mlx"
    for name, update in updates(tmp_path / "peft").items():
        torch.testing.assert_close(update, wanted[name])
    assert main(["convert", "a/style/old/style.safetensors@v3", "-o", "style", "--hub"]) == 0
    assert hub.asked[-1] == ("a/style", "v3", "old")
    for component, table in dense.items():
        found = updates(tmp_path / "style" / component)
        for name, update in table.items():
            torch.testing.assert_close(found[name], update)
    capsys.readouterr()
    assert "has none of adapter_config.json, adapter_model.safetensors, adapters" in fails(
        capsys, "convert", "hf://a/style", "-o", "out"
    )
    for name in ("hf://a/tt", "hf://a/tt/adapter_model.pt"):
        assert "--allow-pickle" in fails(capsys, "convert", name, "-o", "out")
        leave = ("convert", name, "-o", "out", "--allow-pickle")
        wanted = "2.10 or newer" if OLD_TORCH else "--model"  # the file is read
        assert wanted in fails(capsys, *leave)
    sm.convert("styles/old/style.safetensors", "parts")
    hub.folders = {"a/unet": tmp_path / "parts" / "unet", "a/text": tmp_path / "parts/text_encoder"}
    command = ["convert", "unet=a/unet", "text_encoder=hf://a/text", "--to", "kohya", "--hub"]
    assert main([*command, "-o", "new.safetensors"]) == 0
    first, back = load_file("styles/old/style.safetensors"), load_file("new.safetensors")
    assert all(torch.equal(back[name], first[name]) for name in first)


def test_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        get_peft_model(gpt2(), config).save_pretrained(name)
    hub = of(monkeypatch, {"a/one": tmp_path / "one"})
    assert main(["prompts", "one", "two", "-o", "here"]) == 0
    assert main(["prompts", "a/one@v1", "two", "-o", "there", "--hub"]) == 0
    assert set(hub.asked) == {("a/one", "v1", None)}
    assert files(tmp_path / "here") == files(tmp_path / "there")
