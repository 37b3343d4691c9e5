"""`inspect`: its numbers against numpy, and why adapters do not fit together."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.merging.report import describe
from tests.conftest import low_rank
from tests.models import BASE, Block, load, lora, products, save_lora


class Net(nn.Module):
    def __init__(self, width: int = 100) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width), Block(width)])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("inspect")
    return [
        save_lora(root / "a", 1, Net(), targets=["q", "v"], r=4, alpha=8),
        save_lora(
            root / "b",
            2,
            Net(),
            targets=["q", "v"],
            r=8,
            alpha=4,
            use_rslora=True,
            dtype=torch.bfloat16,
        ),
        save_lora(
            root / "c", 3, Net(), targets=["q"], r=2, alpha=2, rank_pattern={"layers.1.q": 3}
        ),
    ]


def dense(three: list[Path]) -> list[dict[str, Tensor]]:
    found = [products(three[0], 2.0), products(three[1], 4 / math.sqrt(8)), products(three[2], 1.0)]
    found[2]["layers.1.q"] *= 2 / 3
    return found


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))


def conflict(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.sign(x) != np.sign(y)))


def test_energies_and_ranks_of_layers(three: list[Path]) -> None:
    by_label = dict(zip("abc", dense(three)))
    for layer in sm.inspect(three).layers:
        wanted = {label: float(by_label[label][layer.name].norm()) ** 2 for label in layer.adapters}
        assert layer.energies == pytest.approx(wanted, rel=1e-5)
    ranks = {layer.name: layer.ranks for layer in sm.inspect(three).layers}
    assert ranks["layers.1.q"] == {"a": 4, "b": 8, "c": 3}
    assert ranks["layers.0.v"] == {"a": 4, "b": 8}


def test_a_report_has_the_pairs_of_whole_adapters(three: list[Path]) -> None:
    report, updates = sm.merge(three, method=sm.mean()).report, dict(zip("abc", dense(three)))
    whole = {
        label: np.concatenate(
            [
                found.get(name, torch.zeros(100, 100)).numpy().ravel()
                for name in sorted(updates["a"])
            ]
        )
        for label, found in updates.items()
    }
    for x in "abc":
        for y in "abc":
            assert report.cosine[x][y] == pytest.approx(cosine(whole[x], whole[y]), abs=1e-5)
    rows = [row * 100 // 64 for row in range(64)]  # the rows that are looked at
    pairs = {
        name: (updates["a"][name].numpy()[rows], updates["b"][name].numpy()[rows])
        for name in updates["a"]
    }
    wanted = np.mean([conflict(x, y) for x, y in pairs.values()])
    assert report.sign_conflict["a"]["b"] == pytest.approx(wanted, abs=2e-4)
    assert "pairs" not in report.to_dict()["layers"][0]
    assert sm.merge(three[:1], method=sm.mean()).report.cosine == {}


def test_numbers_are_those_of_the_dense_matrices(three: list[Path]) -> None:
    found, updates = sm.inspect(three), dense(three)
    assert found.problem is None
    by_label = dict(zip("abc", updates))
    for layer in found.layers:
        assert layer.shape == (100, 100)
        owners = [label for label in "abc" if layer.name in by_label[label]]
        assert list(layer.adapters) == owners
        pairs = [(x, y) for k, x in enumerate(owners) for y in owners[:k]]
        arrays = {label: by_label[label][layer.name].numpy() for label in owners}
        assert layer.cosine == pytest.approx(
            np.mean([cosine(arrays[x], arrays[y]) for x, y in pairs]), abs=1e-6
        )
        # entries next to zero may change their sign by rounding; there are 10,000 of them
        wanted = np.mean([conflict(arrays[x], arrays[y]) for x, y in pairs])
        assert layer.sign_conflict == pytest.approx(wanted, abs=2e-4)
    assert [layer.name for layer in found.layers] == [
        "layers.0.q",
        "layers.0.v",
        "layers.1.q",
        "layers.1.v",
    ]
    names = list(updates[0])
    whole = {
        label: np.concatenate(
            [by_label[label].get(n, torch.zeros(100, 100)).numpy().ravel() for n in names]
        )
        for label in "abc"
    }
    for x in "abc":
        for y in "abc":
            assert found.cosine[x][y] == pytest.approx(cosine(whole[x], whole[y]), abs=1e-6)
            there = (whole[x] != 0) & (whole[y] != 0)
            opposed = conflict(whole[x][there], whole[y][there])
            assert found.sign_conflict[x][y] == pytest.approx(opposed, abs=2e-4)
        assert found.adapters["abc".index(x)].norm == pytest.approx(
            np.linalg.norm(whole[x]), rel=1e-6
        )


def test_one_line_per_adapter(three: list[Path]) -> None:
    a, b, c = sm.inspect(three).adapters
    assert (a.label, a.source, a.base_model, a.kinds, a.layers, a.ranks, a.dtype) == (
        "a", str(three[0]), BASE, "linear", 4, "4", "float32")  # fmt: skip
    assert (b.ranks, b.alphas, b.dtype) == ("8", "4", "bfloat16")
    assert (c.ranks, c.layers, c.alphas) == ("2, 3", 2, "2")
    assert a.modules_to_save == ()


def test_the_page_and_the_data(three: list[Path]) -> None:
    found = sm.inspect(three)
    page = str(found)
    for text in (
        "mergeable: yes",
        "cosine",
        "sign conflict",
        "layers.1.v",
        "100x100",
        "missing in",
        BASE,
        "bfloat16",
    ):
        assert text in page
    missing = [
        line for line in page.splitlines() if line.startswith("layers.") and line.endswith(" c")
    ]
    assert len(missing) == 2
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["problem"] is None
    assert data["cosine"]["a"]["b"] == found.cosine["a"]["b"]
    assert [row["name"] for row in data["layers"]] == [layer.name for layer in found.layers]


def test_a_single_adapter(three: list[Path]) -> None:
    found = sm.inspect(three[:1])
    assert found.cosine == found.sign_conflict == {}
    assert found.adapters[0].norm == pytest.approx(
        math.sqrt(sum(float(D.square().sum()) for D in dense(three)[0].values()))
    )
    assert all(layer.cosine is None and layer.sign_conflict is None for layer in found.layers)
    assert "mergeable" not in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_no_large_matrix_is_formed(monkeypatch: pytest.MonkeyPatch, three: list[Path]) -> None:
    def never(self: sm.LowRank) -> Tensor:
        raise AssertionError("a dense update was formed")

    monkeypatch.setattr(sm.LowRank, "dense", never)
    sm.inspect(three)
    assert sm.merge(three, method=sm.mean()).report.layers


def test_why_not(three: list[Path], tmp_path: Path) -> None:
    narrow = save_lora(tmp_path / "narrow", 1, Net(60), targets=["q"])
    found = sm.inspect([three[0], narrow])
    assert found.problem is not None
    for part in ("'layers.0.q'", "(100, 100)", "(60, 60)", "'a'", "'narrow'"):
        assert part in found.problem
    assert found.layers == ()
    assert found.cosine == {}
    assert f"mergeable: no: {found.problem}" in str(found)
    assert found.adapters[0].norm == pytest.approx(sm.inspect(three[:1]).adapters[0].norm)
    json.dumps(found.to_dict(), allow_nan=False)
    other = save_lora(
        tmp_path / "other", 1, Net(), targets=["q"], base_model_name_or_path="else/where"
    )
    assert "different base models" in str(sm.inspect([three[0], other]).problem)


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(sm.AdapterFormatError, match="nowhere"):
        sm.inspect([tmp_path / "nowhere"])
    with pytest.raises(sm.MethodError, match="empty"):
        sm.inspect([])


def test_adapters_that_share_no_layer(tmp_path: Path) -> None:
    folders = [save_lora(tmp_path / part, 1, Net(), targets=[part]) for part in "qv"]
    found = sm.inspect(folders)
    assert found.problem is None
    assert found.cosine["q"]["v"] == found.sign_conflict["q"]["v"] == 0.0
    assert all(layer.cosine is None for layer in found.layers)
    assert "missing in" in str(found)


def test_twins_and_opposites(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "x", 1, Net(), targets=["q"])
    twin = sm.Adapter.load(folder, label="twin")
    model = load(folder, Net())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.neg_()
    opposite = sm.Adapter.from_peft_model(model, "default", label="opposite")
    found = sm.inspect([folder, twin, opposite])
    assert found.cosine["x"]["twin"] == pytest.approx(1.0)
    assert found.cosine["x"]["opposite"] == pytest.approx(-1.0)
    assert found.sign_conflict["x"]["twin"] == 0.0
    assert found.sign_conflict["x"]["opposite"] == 1.0


def test_names_of_adapters_in_a_live_model() -> None:
    model = lora(Net(), 1, targets=["q"], name="mine")
    assert sm.inspect(["mine"], model).adapters[0].source == "PeftModel['mine']"


def test_energies_beyond_float64_are_infinite() -> None:
    layer = sm.Layer("l", (low_rank((4, 4), 2, 0),), weights=(1e200,))
    assert describe(layer, layer.updates[0], {}).energies == {"adapter0": float("inf")}


@pytest.mark.parametrize("count", [1, 2])
def test_where_no_adapter_can_be_read(count: int, three: list[Path], tmp_path: Path) -> None:
    for path in three[:count]:
        shutil.copytree(path, tmp_path / path.name)
        os.truncate(tmp_path / path.name / "adapter_model.safetensors", 1000)
    found = sm.inspect([tmp_path / path.name for path in three[:count]])
    assert [one.label for one in found.adapters] == ["a", "b"][:count]
    assert found.problem is not None
    assert "truncated" in found.problem
    for one in found.adapters:
        assert one.problem is not None
        place = str(tmp_path / one.label)
        assert one.problem.startswith(f"adapter {place!r}, adapter_model.safetensors: 1000 bytes")
        assert f"{one.label} is refused: {one.problem}" in str(found)
    assert found.layers == ()
