"""SAP and comparisons from the shell: a folder of images, a base model in a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, CLIPConfig, CLIPModel

import sapmerge as sm
from sapmerge.cli import main

from ..anchors.test_loading import clip_processor
from ..models import files, save_lora
from .shell import fails

Image = pytest.importorskip("PIL.Image")


def tiny_clip() -> CLIPModel:
    torch.manual_seed(0)
    narrow = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**narrow, "vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 49}
    vision = {**narrow, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("anchored")
    tiny_clip().save_pretrained(root / "base")
    clip_processor(root / "base").save_pretrained(root / "base")
    for seed, name in enumerate(("art", "sketch", "cartoon")):
        save_lora(root / name, seed, tiny_clip(), targets=["q_proj", "v_proj"], size=0.1)
    (root / "photos").mkdir()
    random.seed(0)
    captions = {}
    for number in range(6):
        pixels = bytes(random.randrange(256) for _ in range(192))
        Image.frombytes("RGB", (8, 8), pixels).save(root / "photos" / f"{number}.png")
        captions[f"{number}.png"] = "abcdef"[number] + " thing"
    (root / "photos" / "captions.json").write_text(json.dumps(captions))
    return root


ADAPTERS = ("art", "sketch", "cartoon")


def loader(size: int = 16) -> list[dict[str, Any]]:
    return sm.anchors.from_folder("photos", AutoProcessor.from_pretrained("base"), size)


def test_sap_from_the_shell_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as from Python."""
    command = ["merge", *ADAPTERS, "-o", "out", "--anchors", "photos", "--model", "base"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "anchor loss" in out
    assert repr(sm.sap()) in out
    sm.merge(list(ADAPTERS), loader(), CLIPModel.from_pretrained("base")).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_what_goes_with_anchors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--loss", "contrastive", "--batch-size", "3", "--device", "cpu"]
    command = ["merge", *ADAPTERS, "-o", "out", "--anchors", "photos", "--model", "base", *options]
    command += ["--dtype", "float32", "--cache", "kept", "--method", "sap_original", "--quiet"]
    assert main([*command, "--density", "0.5"]) == 0
    model = CLIPModel.from_pretrained("base")
    merged = sm.merge(
        list(ADAPTERS), loader(3), model, method=sm.sap_original(0.5), loss=sm.contrastive
    )
    merged.save_pretrained("python")
    assert files(here / "out") == files(here / "python")
    assert any((here / "kept").iterdir())


def test_a_model_without_anchors(here: Path) -> None:
    """A folder serves names and shapes; nothing of it is loaded."""
    command = ["merge", *ADAPTERS, "-o", "out", "--model", "base", "--method", "mean", "--quiet"]
    assert main(command) == 0
    sm.merge(list(ADAPTERS), model="base", method=sm.mean()).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_errors_name_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = ("merge", *ADAPTERS, "-o", "out")
    assert "--anchors DIR and --model give sap" in fails(capsys, *merge)
    assert "add --model" in fails(capsys, *merge, "--anchors", "photos")
    assert "no such folder" in fails(capsys, *merge, "--anchors", "none", "--model", "base")
    assert "--loss is of anchors" in fails(capsys, *merge, "--method", "mean", "--loss", "entropy")
    assert "--cache is of anchors" in fails(capsys, *merge, "--method", "mean", "--cache", "x")
    both = ("--setup", "mine:setup", "--anchors", "photos", "--model", "base")
    assert "--setup makes what --anchors names" in fails(capsys, *merge, *both)
    with_base = (*merge, "--model", "base", "--anchors", "photos")
    assert "--batch-size 0" in fails(capsys, *with_base, "--batch-size", "0")
    assert "add --method" in fails(capsys, *with_base, "--density", "0.5")
    (here / "nothing").mkdir()
    err = fails(capsys, *merge, "--model", "nothing", "--anchors", "photos")
    assert "--model nothing" in err


MINE = """
import sapmerge as sm
from transformers import AutoProcessor

BATCH = sm.anchors.from_folder("photos", AutoProcessor.from_pretrained("base"))[0]

def right(model):
    found = model(**BATCH).logits_per_image.argmax(-1)
    return [float(k == int(one)) for k, one in enumerate(found)]

def margin(model):
    logits = model(**BATCH).logits_per_image
    return {"margin": float(logits.diagonal().mean()), "right": right(model)}
"""


def test_compare(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(MINE)
    command = ["compare", *ADAPTERS, "--model", "base", "--evaluate", "mine:right", "--quiet"]
    command += ["--methods", "mean,ties(density=0.5), tsv"]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    names = [(row["name"], row["length"]) for row in data["results"]]
    assert names == [
        ("base model", ""),
        ("mean", "own"),
        ("mean", "matched"),
        ("ties(density=0.5)", "own"),
        ("ties(density=0.5)", "matched"),
        ("tsv", "own"),
        ("tsv", "matched"),
    ]
    import mine  # type: ignore[import-not-found]

    table = sm.compare(
        list(ADAPTERS),
        ["mean", "ties(density=0.5)", "tsv"],
        model=CLIPModel.from_pretrained("base").eval(),
        evaluate=mine.right,
    )
    for row, wanted in zip(data["results"], table.results, strict=True):
        assert row["scores"]["score"]["value"] == wanted.scores["score"].value
    assert main([*command, "--folder", "kept"]) == 0
    assert "noise" in capsys.readouterr().out
    assert len(list((here / "kept" / "results").iterdir())) == 7


def test_compare_with_anchors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(MINE)
    command = ["compare", *ADAPTERS, "--model", "base", "--evaluate", "mine:margin", "--quiet"]
    command += ["--methods", "mean,sap", "--anchors", "photos", "--own-length", "--minimize"]
    assert main([*command, "--metric", "margin", "--plot", "compare.svg"]) == 0
    out = capsys.readouterr().out
    assert "sap" in out
    assert "margin" in out
    assert (here / "compare.svg").exists()


def test_errors_of_compare(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ("compare", *ADAPTERS, "--evaluate", "mine:right", "--methods")
    (here / "mine.py").write_text(MINE)
    assert "add --model" in fails(capsys, *compare, "mean")
    assert "did you mean 'ties'" in fails(capsys, *compare, "tise", "--model", "base")
