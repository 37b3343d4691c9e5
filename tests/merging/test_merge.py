"""`merge`: numbers against dense formulas, refusals before any work,
and nothing that depends on order or chance.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sapmerge as sm
from tests import oracles
from tests.conftest import error
from tests.models import (
    BASE,
    PREFIX,
    Block,
    Zoo,
    deltas,
    files,
    load,
    lora,
    matrices,
    products,
    save_lora,
)

LINEAR = ("q", "v")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(24), Block(24)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def net(folder: Path, seed: int, **options: object) -> Path:
    return save_lora(folder, seed, Net(), **({"targets": LINEAR} | options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Ranks 4, 8, 16, different alphas, one rsLoRA, one float16, one without a layer;
    with their scalings.
    """
    root = tmp_path_factory.mktemp("three")
    return [
        (net(root / "first", 1, r=4, alpha=8), 2.0),
        (net(root / "second", 2, r=8, alpha=3, use_rslora=True), 3 / math.sqrt(8)),
        (
            net(
                root / "third",
                3,
                r=16,
                alpha=8,
                dtype=torch.float16,
                targets=r"layers\.[01]\.v|layers\.0\.q",
            ),
            0.5,
        ),
    ]


@pytest.fixture(scope="module")
def dense_three(three: list[tuple[Path, float]]) -> list[dict[str, Tensor]]:
    found = [products(*pair) for pair in three]
    zero = torch.zeros(24, 24, dtype=torch.float64)
    assert set(found[0]) == set(found[1]) == {*found[2], "layers.1.q"} != set(found[2])
    return [{name: adapter.get(name, zero) for name in found[0]} for adapter in found]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [net(root / "left", 11), net(root / "right", 12)]


def paths(three: list[tuple[Path, float]]) -> list[Path]:
    return [path for path, _ in three]


def combined(adapters: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    return {n: sum(w * a[n] for w, a in zip(weights, adapters)) for n in adapters[0]}  # type: ignore[misc]


def updates(merged: sm.Merged) -> dict[str, Tensor]:
    return {name: update.dense().double() for name, update in merged.updates()}


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], within: float = 1e-6) -> None:
    assert set(got) == set(wanted)
    for name in wanted:
        assert error(got[name], wanted[name]) < within, name


def refuses(error_type: type[Exception], *parts: str, **call: object) -> str:
    """merge(...) fails, and its message has all parts."""
    adapters = call.pop("adapters")
    with pytest.raises(error_type) as caught:
        sm.merge(adapters, **call)  # type: ignore[arg-type]
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


# Numbers


def test_mean_of_three_different_adapters_is_the_dense_mean(
    three: list[tuple[Path, float]], dense_three: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    wanted = combined(dense_three, [1 / 3] * 3)
    merged = sm.merge(paths(three), method=sm.mean())
    close(updates(merged), wanted)
    merged.save_pretrained(tmp_path / "out")
    close(matrices(deltas(load(tmp_path / "out", Net())), Net()), wanted)
    again = sm.Adapter.load(tmp_path / "out")
    close({name: again.update(name).dense().double() for name in again.modules}, wanted)
    assert merged.report.energy_kept == 1.0
    assert {row.name: row.rank for row in merged.report.layers} == {
        "layers.0.q": 24,  # 4 + 8 + 16 columns, and a matrix of 24 x 24
        "layers.0.v": 24,
        "layers.1.q": 12,
        "layers.1.v": 24,
    }
    assert again.base_model == BASE


@pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5], [1, -1, 3]])
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_weights_and_scale(
    three: list[tuple[Path, float]],
    dense_three: list[dict[str, Tensor]],
    weights: list[float],
    scale: float,
) -> None:
    total = sum(weights)
    mean = sm.merge(paths(three), method=sm.mean(), weights=weights, scale=scale)
    close(updates(mean), combined(dense_three, [scale * w / total for w in weights]))
    named = {path.name: weight for path, weight in zip(paths(three), weights)}
    added = sm.merge(paths(three), method=sm.task_arithmetic(), weights=named, scale=scale)
    close(updates(added), combined(dense_three, [scale * w for w in weights]))
    assert added.recipe["weights"] == named
    assert added.recipe["scale"] == scale


@pytest.mark.filterwarnings("ignore::sapmerge.SapmergeWarning")
def test_numbers_of_arrays_give_the_same_bytes(pair: list[Path], tmp_path: Path) -> None:
    def merged(name: str, density: object, weights: object, scale: object, rank: object) -> Path:
        method: Any = sm.ties(density)  # type: ignore[arg-type]
        done = sm.merge(pair, method=method, weights=weights, scale=scale, rank=rank)  # type: ignore[arg-type]
        done.save_pretrained(tmp_path / name)
        return tmp_path / name

    plain = files(merged("plain", 0.5, [1.0, 0.25], 0.5, 2))
    number = np.float64(0.5)
    made = merged("numpy", number, np.array([1.0, 0.25], dtype=np.float32), number, np.int64(2))
    assert files(made) == plain
    assert sm.reproduce(made, pair) == []
    assert files(merged("torch", 0.5, torch.tensor([1.0, 0.25]), torch.tensor(0.5), 2)) == plain


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, -0.5]])
def test_ties_is_the_textbook_on_the_dense_updates_of_the_files(
    three: list[tuple[Path, float]],
    dense_three: list[dict[str, Tensor]],
    weights: list[float] | None,
) -> None:
    names = list(dense_three[0])
    model = [[adapter[name].numpy() for adapter in dense_three] for name in names]
    wanted = dict(zip(names, map(torch.from_numpy, oracles.ties(model, 0.2, weights))))
    got = updates(sm.merge(paths(three), method=sm.ties(density=0.2), weights=weights))
    for name in names:
        # Which of two nearly equal entries is kept is float32's to decide; all others are equal.
        differs = (got[name] - wanted[name]).abs() > 1e-6 * wanted[name].abs().max()
        assert differs.sum() <= 2, name


@pytest.mark.parametrize(
    "method",
    [sm.mean(), sm.task_arithmetic(), sm.ties(density=1.0), sm.knots(density=1.0)],
    ids=repr,
)
def test_one_adapter_comes_back(tmp_path: Path, method: sm.Method) -> None:
    folder = net(tmp_path / "one", 5, r=3, alpha=7)
    wanted = products(folder, 7 / 3)
    merged = sm.merge([folder], method=method)
    close(updates(merged), wanted)
    merged.save_pretrained(tmp_path / "out")
    close(matrices(deltas(load(tmp_path / "out", Net())), Net()), wanted, 2e-6)


def test_nothing_is_lost_by_an_adapter_without_a_layer_in_disjoint_mean(
    three: list[tuple[Path, float]], dense_three: list[dict[str, Tensor]]
) -> None:
    got = updates(sm.merge(paths(three), method=sm.Chain(sm.DisjointMean())))
    stack = torch.stack([adapter["layers.1.q"] for adapter in dense_three[:2]])
    one, two = stack
    mean = torch.where(
        one.sign() == two.sign(), stack.mean(0), torch.where(one.abs() > two.abs(), one, two)
    )
    elected = updates(sm.merge(paths(three), method=sm.Chain(sm.ElectSign(), sm.DisjointMean())))
    assert error(elected["layers.1.q"], mean) < 1e-6
    assert error(got["layers.1.q"], stack.mean(0)) < 1e-6


# Rank


def spectrum(dense_three: list[dict[str, Tensor]], name: str) -> np.ndarray:
    return np.linalg.svd(combined(dense_three, [1 / 3] * 3)[name].numpy(), compute_uv=False)


@pytest.mark.parametrize("rank", [1, 5, 0.5, 0.99, "exact"])
def test_rank_is_the_best_approximation(
    three: list[tuple[Path, float]],
    dense_three: list[dict[str, Tensor]],
    rank: int | float | str,
    tmp_path: Path,
) -> None:
    merged = sm.merge(paths(three), method=sm.mean(), rank=rank)
    if rank in (1, 5, 0.5):
        with pytest.warns(
            sm.SapmergeWarning, match=r"keeps \d+% of the merged update's energy.*apply_to.*rank="
        ):
            merged.save_pretrained(tmp_path / "out", uniform_rank=False)
    else:
        merged.save_pretrained(tmp_path / "out", uniform_rank=False)
    stored = sm.Adapter.load(tmp_path / "out")
    for row in merged.report.layers:
        sigma = spectrum(dense_three, row.name)
        shares = np.cumsum(sigma**2) / (sigma**2).sum()
        if isinstance(rank, float):
            wanted = int(np.argmax(shares >= rank)) + 1
        else:
            wanted = rank if isinstance(rank, int) else int((sigma > 1e-6 * sigma[0]).sum())
        assert row.rank == stored.modules[row.name].rank == wanted
        assert row.energy_kept == pytest.approx(shares[wanted - 1], abs=1e-6)
        best = torch.from_numpy(
            oracles.best_rank(combined(dense_three, [1 / 3] * 3)[row.name].numpy(), wanted)
        )
        assert error(stored.update(row.name).dense(), best) < 1e-5
    if isinstance(rank, float):
        assert merged.report.energy_kept >= rank


def test_a_dense_result_takes_the_largest_rank_of_the_inputs_and_warns(
    three: list[tuple[Path, float]], dense_three: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    merged = sm.merge(paths(three)[:2], method=sm.ties(density=0.2))
    with pytest.warns(sm.SapmergeWarning, match="energy") as caught:
        merged.save_pretrained(tmp_path / "out")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    stored = sm.Adapter.load(tmp_path / "out")
    exact, energies, total = updates(merged), 0.0, 0.0
    for row in merged.report.layers:
        assert row.rank == stored.modules[row.name].rank == 8
        matrix = exact[row.name].numpy()
        assert (
            error(stored.update(row.name).dense(), torch.from_numpy(oracles.best_rank(matrix, 8)))
            < 1e-5
        )
        assert row.energy_kept == pytest.approx(oracles.energy_kept(matrix, 8), abs=1e-6)
        assert row.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
        energies, total = energies + row.energy_kept * row.norm**2, total + row.norm**2
    assert merged.report.energy_kept == pytest.approx(energies / total)
    assert merged.report.energy_kept < 0.9
    sm.merge(paths(three)[:2], method=sm.ties(density=0.2), rank="exact").save_pretrained(
        tmp_path / "exact"
    )
    whole = sm.Adapter.load(tmp_path / "exact")
    close({name: whole.update(name).dense().double() for name in whole.modules}, exact, 1e-5)


def test_lazy_until_a_sink_or_the_report_asks(three: list[tuple[Path, float]]) -> None:
    calls: list[str] = []

    def spying(layer: sm.Layer) -> sm.Update:
        calls.append(layer.name)
        return layer.updates[0]

    merged = sm.merge(paths(three), method=spying)
    assert calls == []
    assert merged.report is merged.report
    assert calls == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]


# Inputs and labels


def test_adapters_of_a_live_model_by_name(tmp_path: Path) -> None:
    model = lora(Net(), 1, targets=LINEAR, name="medical")
    model.add_adapter(
        "legal", model.peft_config["medical"].__class__(r=2, lora_alpha=6, target_modules=["q"])
    )
    for name, parameter in model.named_parameters():
        if ".legal." in name:
            parameter.data = torch.randn_like(parameter)
    model.peft_config["legal"].base_model_name_or_path = BASE
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    medical, legal = (matrices(deltas(model, name), Net()) for name in ("medical", "legal"))
    merged = sm.merge(["medical", "legal"], model=model, method=sm.task_arithmetic())
    assert [adapter.label for adapter in merged.adapters] == ["medical", "legal"]
    close(
        updates(merged),
        {n: medical[n] + legal.get(n, torch.zeros_like(medical[n])) for n in medical},
    )
    labelled = sm.merge({"x": "legal", "y": "medical"}, model=model, method=sm.task_arithmetic())
    assert [adapter.label for adapter in labelled.adapters] == ["x", "y"]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    (tmp_path / "medical").mkdir()
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        refuses(sm.MethodError, "adapter of the model and a folder too", "Adapter.from_peft_model",
                adapters=["medical", "legal"], model=model, method=sm.mean())  # fmt: skip
    finally:
        os.chdir(here)


def test_configs_with_state_dicts(pair: list[Path]) -> None:
    in_memory = []
    for path in pair:
        model = load(path, Net())
        in_memory.append((model.peft_config["default"], get_peft_model_state_dict(model)))
    config = json.loads((pair[1] / "adapter_config.json").read_text())
    in_memory[1] = (config, in_memory[1][1])
    merged = sm.merge(in_memory, method=sm.mean())
    assert sorted(adapter.label for adapter in merged.adapters) == ["adapter", "adapter-2"]
    close(updates(merged), updates(sm.merge(pair, method=sm.mean())), 1e-7)


def test_labels(tmp_path: Path, pair: list[Path]) -> None:
    twins = [
        net(tmp_path / "a" / "best", 1),
        net(tmp_path / "b" / "best", 2),
        net(tmp_path / "c" / "best", 3),
    ]
    merged = sm.merge(twins, method=sm.mean())
    labels = [adapter.label for adapter in merged.adapters]
    assert sorted(labels) == ["best", "best-2", "best-3"]
    turned = sm.merge(twins[::-1], method=sm.mean())
    # a label follows its content
    assert [adapter.label for adapter in turned.adapters] == labels[::-1]
    named = sm.merge(
        {"one": twins[0], "two": sm.Adapter.load(twins[1])},
        method=sm.mean(),
        weights={"two": 3, "one": 1},
    )
    assert [(row.label, row.weight) for row in named.report.adapters] == [
        ("one", 1.0),
        ("two", 3.0),
    ]
    taken = net(tmp_path / "best-2", 4)
    assert len({a.label for a in sm.merge([*twins, taken], method=sm.mean()).adapters}) == 4
    refuses(sm.MethodError, "label", adapters={"no spaces": pair[0]}, method=sm.mean())
    same = sm.merge([pair[0], pair[0]], method=sm.mean())
    assert [adapter.label for adapter in same.adapters] == ["left", "left-2"]
    close(updates(same), products(pair[0], 2.0))


def test_adapters_may_be_path_objects_strings_or_adapters(pair: list[Path]) -> None:
    wanted = updates(sm.merge(pair, method=sm.mean()))
    close(
        updates(sm.merge((str(pair[0]), sm.Adapter.load(pair[1])), method=sm.mean())), wanted, 1e-9
    )


# Refusals


def test_what_is_no_list_of_adapters(pair: list[Path]) -> None:
    refuses(sm.MethodError, "a list of adapters", adapters=str(pair[0]), method=sm.mean())
    refuses(
        sm.MethodError, "a list of adapters", adapters=sm.Adapter.load(pair[0]), method=sm.mean()
    )
    refuses(sm.MethodError, "empty", adapters=[], method=sm.mean())
    refuses(sm.MethodError, "empty", adapters={}, method=sm.mean())
    refuses(sm.MethodError, "got int", adapters=[pair[0], 3], method=sm.mean())
    refuses(sm.AdapterFormatError, "nowhere", "from_hub", adapters=["nowhere"], method=sm.mean())


def test_the_method(pair: list[Path]) -> None:
    refuses(
        sm.MethodError, "a method must be given", "sm.mean()", "sm.ties(density=0.2)", adapters=pair
    )
    refuses(
        sm.MethodError,
        "method='ties' is text",
        "sm.ties()",
        "sm.parse('ties')",
        adapters=pair,
        method="ties",
    )
    refuses(sm.MethodError, "cannot be called", adapters=pair, method=3)
    refuses(sm.MethodError, "needs anchors and a model", adapters=pair, method=sm.sap())
    refuses(sm.MethodError, "need a model", adapters=pair, anchor_loader=[{}])
    with pytest.raises(sm.MethodError, match=r"for 20 % write 0\.2"):
        sm.ties(density=20)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", True, None])
def test_scale_is_a_finite_number(pair: list[Path], scale: object) -> None:
    refuses(
        sm.MethodError,
        "scale must be a finite number",
        repr(scale),
        adapters=pair,
        method=sm.mean(),
        scale=scale,
    )


@pytest.mark.parametrize("rank", [0, -1, 1.0, 0.0, 1.5, math.nan, True, "all", "8"])
def test_rank_is_a_number_or_a_share(pair: list[Path], rank: object) -> None:
    refuses(
        sm.MethodError,
        "rank is None",
        "share of energy",
        repr(rank),
        adapters=pair,
        method=sm.mean(),
        rank=rank,
    )


def test_weights_must_fit(pair: list[Path]) -> None:
    for weights, parts in (
        ([1.0], ("2 adapters (left, right)", "got 1")),
        ([1, 2, 3], ("got 3",)),
        ([1, math.nan], ("weight of 'right'", "nan")),
        ([1, "2"], ("weight of 'right'", "'2'")),
        ([True, 1], ("weight of 'left'", "True")),
        ({"left": 1}, ("weights name ['left']", "['left', 'right']")),
        ({"left": 1, "wrong": 2}, ("wrong",)),
    ):
        refuses(sm.MethodError, *parts, adapters=pair, method=sm.mean(), weights=weights)
    with pytest.raises(sm.MethodError, match="zero"):
        sm.merge(pair, method=sm.mean(), weights=[1, -1]).save_pretrained("never")
    assert not os.path.exists("never")


def edited(
    folder: Path, source: Path, tensors: dict[str, Tensor | None] | None = None, **config: object
) -> Path:
    """A copy of an adapter with other tensors (None: without) and another config."""
    found: dict[str, Tensor | None] = dict(load_file(source / "adapter_model.safetensors"))
    found |= tensors or {}
    folder.mkdir(parents=True)
    save_file(
        {k: v for k, v in found.items() if v is not None}, folder / "adapter_model.safetensors"
    )
    old = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(old | config))
    return folder


def test_different_bases_need_a_word(pair: list[Path], tmp_path: Path) -> None:
    other = edited(tmp_path / "other", pair[1], base_model_name_or_path="else/where")
    refuses(
        sm.IncompatibleAdaptersError,
        "different base models",
        f"left: '{BASE}'",
        "other: 'else/where'",
        "base_model=",
        adapters=[pair[0], other],
        method=sm.mean(),
    )
    merged = sm.merge([pair[0], other], method=sm.mean(), base_model="my/base")
    merged.save_pretrained(tmp_path / "out")
    assert sm.Adapter.load(tmp_path / "out").base_model == "my/base"
    assert "my/base" in (tmp_path / "out" / "README.md").read_text()
    old = edited(tmp_path / "old", pair[1], revision="v1")
    refuses(
        sm.IncompatibleAdaptersError,
        "different revisions",
        "'v1'",
        adapters=[pair[0], old],
        method=sm.mean(),
    )
    sm.merge([old], method=sm.mean()).save_pretrained(tmp_path / "pinned")
    assert sm.Adapter.load(tmp_path / "pinned").revision == "v1"
    main = edited(tmp_path / "main", pair[1], revision="main")
    sm.merge([pair[0], main], method=sm.mean())  # "main" is what no revision means


def test_modules_of_different_shapes(pair: list[Path], tmp_path: Path) -> None:
    name = PREFIX + "layers.1.v.lora_A.weight"
    wide = edited(tmp_path / "wide", pair[1], {name: torch.randn(4, 25)})
    refuses(
        sm.IncompatibleAdaptersError,
        "'layers.1.v'",
        "(24, 24)",
        "(24, 25)",
        "'left'",
        "'wide'",
        adapters=[pair[0], wide],
        method=sm.mean(),
    )
    conv = {name: torch.randn(4, 6, 2, 2), name.replace("A", "B"): torch.randn(24, 4, 1, 1)}
    kinds = edited(tmp_path / "conv", pair[1], conv)
    refuses(
        sm.IncompatibleAdaptersError,
        "'layers.1.v'",
        "linear",
        "conv",
        adapters=[pair[0], kinds],
        method=sm.mean(),
    )
    kernel = edited(tmp_path / "kernel", kinds, {name: torch.randn(4, 6, 4, 1)})
    refuses(
        sm.IncompatibleAdaptersError,
        "kernel",
        "(6, 2, 2)",
        "(6, 4, 1)",
        adapters=[kinds, kernel],
        method=sm.mean(),
    )


def test_a_model_is_checked_before_any_work(pair: list[Path]) -> None:
    def never(layer: sm.Layer) -> sm.Update:
        raise AssertionError("work was done")

    model = Net()
    sm.merge(pair, model=model, method=never)
    del model.layers[1].q
    refuses(
        sm.ModelMismatchError,
        "Net has no module 'layers.1.q'",
        "base model?",
        adapters=pair,
        model=model,
        method=never,
    )
    refuses(
        sm.ModelMismatchError, "nor 3 others of the 4", adapters=pair, model=Block(24), method=never
    )
    model = Net()
    model.layers[0].v = nn.Linear(24, 23, bias=False)
    refuses(
        sm.ModelMismatchError,
        "'layers.0.v'",
        "(23, 24)",
        "(24, 24)",
        adapters=pair,
        model=model,
        method=never,
    )
    model.layers[0].v = nn.Tanh()  # type: ignore[assignment]
    refuses(
        sm.ModelMismatchError,
        "'layers.0.v' (Tanh)",
        "weight",
        adapters=pair,
        model=model,
        method=never,
    )
    grouped = nn.Module()
    grouped.wave = nn.Conv1d(6, 6, 3, groups=3)
    state = {
        PREFIX + "wave.lora_A.weight": torch.randn(2, 2, 3),
        PREFIX + "wave.lora_B.weight": torch.randn(6, 2, 1),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["wave"]}
    refuses(
        sm.ModelMismatchError, "groups", adapters=[(config, state)], model=grouped, method=never
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named(
    pair: list[Path], tmp_path: Path, value: float
) -> None:
    name = PREFIX + "layers.0.q.lora_B.weight"
    bad = torch.zeros(24, 4)
    bad[3, 2] = value
    broken = edited(tmp_path / "broken", pair[1], {name: bad})
    refuses(
        sm.NonFiniteError, "broken", name, "1 values", adapters=[pair[0], broken], method=sm.mean()
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.norm.weight",
        PREFIX + "layers.0.norm.weight",
        PREFIX + "layers.0.q.base_layer.weight",
    ],
)
def test_a_smuggled_tensor_is_refused_by_name(pair: list[Path], tmp_path: Path, name: str) -> None:
    trojan = edited(tmp_path / "trojan", pair[1], {name: torch.ones(24)})
    refuses(sm.SapmergeError, name, "trojan", adapters=[pair[0], trojan], method=sm.mean())


def test_a_pickle_is_refused_with_the_call_to_make(tmp_path: Path, pair: list[Path]) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((pair[0] / "adapter_config.json").read_bytes())
    torch.save(load_file(pair[0] / "adapter_model.safetensors"), folder / "adapter_model.bin")
    refuses(
        sm.AdapterSecurityError,
        "old",
        "Adapter.load(path, allow_pickle_weights=True)",
        adapters=[folder],
        method=sm.mean(),
    )


def test_a_method_that_returns_no_update_is_named(pair: list[Path], tmp_path: Path) -> None:
    def tensor(layer: sm.Layer) -> Tensor:
        return layer.updates[0].dense()

    def turned(layer: sm.Layer) -> sm.Update:
        return sm.Dense(layer.updates[0].dense()[:3])

    def nan(layer: sm.Layer) -> sm.Update:
        return layer.updates[0].scaled(math.nan)

    for method, kind, part in ((tensor, sm.MethodError, "Tensor"), (turned, sm.MethodError, "(3, "
                                                                                            "24)"),
                               (nan, sm.NonFiniteError, "NaN or infinite")):  # fmt: skip
        merged = sm.merge(pair, method=method)  # type: ignore[arg-type]
        with pytest.raises(kind, match=re.escape(part)) as caught:
            merged.save_pretrained(tmp_path / "out")
        assert "'layers.0.q'" in str(caught.value)
        assert not list(tmp_path.iterdir())


# The user's own functions


def test_a_criterion_in_three_lines(pair: list[Path]) -> None:
    def mine(values: Tensor, stats: sm.Stats) -> Tensor:
        return values.abs() ** 2

    method = sm.Chain(sm.Prune(mine, sm.TopFraction(0.3)), sm.Mean())
    builtin = sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(0.3)), sm.Mean())
    close(updates(sm.merge(pair, method=method)), updates(sm.merge(pair, method=builtin)), 1e-9)


def above(scores: Tensor) -> Tensor:
    return scores >= scores.median()


def doubled(pruned: sm.Update, original: sm.Update) -> sm.Update:
    return pruned.scaled(2.0)


def negated(layer: sm.Layer) -> sm.Layer:
    return layer.with_updates([update.scaled(-1.0) for update in layer])


def last(layer: sm.Layer) -> sm.Update:
    return layer.updates[layer.adapters.index("right")]


def test_plain_functions_fit_everywhere(pair: list[Path]) -> None:
    method = sm.Chain(sm.Prune(lambda v, s: v.abs(), above, doubled), negated, last)
    right = products(pair[1], 2.0)
    wanted = {
        n: -2.0 * torch.where(D.abs() >= D.float().abs().median(), D, 0.0) for n, D in right.items()
    }
    got = updates(sm.merge(pair, method=method))
    for name in wanted:
        assert ((got[name] - wanted[name]).abs() > 1e-5).sum() <= 1
    assert f"{__name__}:negated" in sm.merge(pair, method=method).recipe["method"]
    close(updates(sm.merge(pair, method=last)), right)


# Order, hash seeds, threads


@pytest.mark.parametrize(
    "method",
    [
        sm.mean(),
        sm.ties(0.2),
        sm.dare(0.5, seed=3),
        sm.knots(0.3),
        sm.core_space(),
        sm.MatchEnergy(sm.mean()),
    ],
    ids=repr,
)
@pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")
def test_the_order_of_adapters_changes_no_byte(
    three: list[tuple[Path, float]], tmp_path: Path, method: sm.Method
) -> None:
    found = []
    for number, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 2, 0)]):
        adapters, weights = [paths(three)[k] for k in order], [[1.0, 2.0, 0.5][k] for k in order]
        sm.merge(adapters, method=method, weights=weights).save_pretrained(tmp_path / str(number))
        found.append(files(tmp_path / str(number)))
    assert set(found[0]) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert found[0] == found[1] == found[2]


SCRIPT = """
import sys, warnings, torch, sapmerge as sm
warnings.simplefilter("ignore")
torch.set_num_threads(int(sys.argv[1]))
adapters = sys.argv[3:]
methods = (sm.mean(), sm.ties(0.2), sm.dare_ties(0.5), sm.knots(0.3), sm.core_space(),
           sm.MatchEnergy(sm.magnitude_prune(0.5)))
for number, method in enumerate(methods):
    merged = sm.merge(adapters, method=method, modules_to_save="mean")
    merged.save_pretrained(f"{sys.argv[2]}-{number}")
"""


def test_hash_seeds_and_threads_change_no_byte(tmp_path: Path) -> None:
    class Wide(nn.Module):  # large enough that matrix products are split between threads
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(384, 256)])
            self.score = nn.Linear(256, 300)

    adapters = [
        save_lora(
            tmp_path / f"w{seed}", seed, Wide(), targets=["0"], r=16, modules_to_save=["score"]
        )
        for seed in (1, 2)
    ]
    for run, (seed, threads) in enumerate([("1", "1"), ("2", "2")]):
        environment = os.environ | {
            "PYTHONHASHSEED": seed,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            threads,
            str(tmp_path / f"out{run}"),
            *map(str, adapters),
        ]
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    for number in range(6):
        first, second = (files(tmp_path / f"out{run}-{number}") for run in (0, 1))
        assert first == second, number


# The report


def test_the_numbers_of_the_report(
    three: list[tuple[Path, float]], dense_three: list[dict[str, Tensor]]
) -> None:
    weights = [1.0, -2.0, 0.5]
    report = sm.merge(
        paths(three), method=sm.magnitude_prune(0.25), weights=weights, scale=2.0, rank="exact"
    ).report
    energy = [
        [w * w * float(D[n].square().sum()) for n in sorted(D)]
        for w, D in zip(weights, dense_three)
    ]
    for row, shares, source in zip(report.adapters, energy, paths(three), strict=True):
        assert row.energy_share == pytest.approx(sum(shares) / sum(map(sum, energy)), rel=1e-5)
        assert (row.label, row.source) == (source.name, str(source))
    assert [row.ranks for row in report.adapters] == ["4", "8", "16"]
    assert [row.layers for row in report.adapters] == [4, 4, 3]
    assert [row.weight for row in report.adapters] == weights
    for number, layer in enumerate(report.layers):
        present = [D[layer.name].numpy() for D in dense_three if D[layer.name].abs().sum() > 0]
        pairs = [(i, j) for i in range(len(present)) for j in range(i)]
        cosines = [
            np.sum(present[i] * present[j])
            / np.linalg.norm(present[i])
            / np.linalg.norm(present[j])
            for i, j in pairs
        ]
        conflicts = [np.mean(np.sign(present[i]) != np.sign(present[j])) for i, j in pairs]
        assert layer.cosine == pytest.approx(np.mean(cosines), abs=1e-6)
        assert layer.sign_conflict == pytest.approx(np.mean(conflicts), abs=1e-6)
        assert sorted(layer.energies.values()) == pytest.approx(
            sorted(row[number] for row in energy), rel=1e-5
        )
        assert layer.density == pytest.approx(144 / 576)
        assert set(layer.adapters) == {"first", "second", "third"} - (
            {"third"} if layer.name == "layers.1.q" else set()
        )
        assert layer.shape == (24, 24)
        assert layer.energy_kept == pytest.approx(1.0)
    assert (report.scale, report.rank, report.base_model) == (2.0, "exact", BASE)


def test_the_report_prints_and_is_data(pair: list[Path]) -> None:
    merged = sm.merge(pair, method=sm.ties(0.2), rank=0.95)
    data = json.loads(json.dumps(merged.report.to_dict(), allow_nan=False))
    assert data["method"] == repr(sm.ties(0.2))
    assert data["energy_kept"] >= 0.95
    assert {row["name"] for row in data["layers"]} == {
        f"layers.{n}.{p}" for n in (0, 1) for p in "qv"
    }
    page = str(merged.report)
    for text in (
        "left",
        "right",
        "layers.0.q",
        "energy share",
        "cosine",
        "sign conflict",
        "20.0%",
        BASE,
        repr(sm.ties(0.2)),
    ):
        assert text in page
    single = sm.merge(pair[:1], method=sm.mean()).report
    assert all(layer.cosine is None and layer.sign_conflict is None for layer in single.layers)
    assert "layers.0.q" in str(single)
    assert sm.parse(merged.recipe["method"]) == merged.method


def test_the_report_of_a_deep_model_is_a_page() -> None:
    names = [f"layers.{n}.q" for n in range(60)]
    state = {f"{PREFIX}{n}.lora_{p}.weight": torch.randn(3, 3) for n in names for p in "AB"}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q"]}
    page = str(sm.merge([(config, state)], method=sm.mean()).report)
    assert re.search(r"^q +0 to 59 +60 +3 ", page, re.MULTILINE)
    assert page.count("\n") < 40


def test_a_merge_of_nothing_but_zeros(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "zero", 1, Net(), targets=LINEAR, size=0.0)
    with pytest.warns(sm.SapmergeWarning, match="zero in all its"):
        merged = sm.merge([folder, folder], method=sm.MatchEnergy(sm.ties()))
    merged.save_pretrained(tmp_path / "out")
    assert str(merged.report)
    assert all(float(D.norm()) == 0 for D in deltas(load(tmp_path / "out", Net())).values())


def test_the_metadata_tells_the_whole_call(pair: list[Path], tmp_path: Path) -> None:
    from safetensors import safe_open

    weights = {"left": 1.0, "right": 2.0}
    merged = sm.merge(pair, method=sm.mean(), weights=weights, scale=0.5, rank=6)
    merged.save_pretrained(tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["sapmerge.version"] == sm.__version__
    recipe = json.loads(metadata["sapmerge.recipe"])
    assert recipe == {
        "method": "Chain(Mean())",
        "weights": weights,
        "scale": 0.5,
        "rank": 6,
        "base_model": BASE,
        "modules_to_save": None,
        "loss": None,
    }
    import hashlib

    for entry in json.loads(metadata["sapmerge.inputs"]):
        source = pair[["left", "right"].index(entry["label"])]
        assert entry["weight"] == weights[entry["label"]]
        assert entry["files"] == {
            name: hashlib.sha256((source / name).read_bytes()).hexdigest()
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }


def test_zoo_runs() -> None:
    assert Zoo()(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 4)


def test_anchor_losses_are_those_of_the_base_whichever_sink_ran(
    pair: list[Path], tmp_path: Path
) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    anchors = [{"x": torch.randn(4, 24), "y": torch.randn(4, 24)}]
    base, applied = Net(), Net()
    wanted = {"base model": base}
    for path in pair:
        wanted[path.name] = load(path, Net())
    wanted["merged adapter"] = Net()
    sm.merge(pair, method=sm.mean()).apply_to(wanted["merged adapter"])
    losses = {label: float(loss(model, anchors[0]).detach()) for label, model in wanted.items()}
    assert len(set(losses.values())) == 4

    def fresh(model: nn.Module) -> sm.Merged:
        return sm.merge(pair, anchors, model, method=sm.sap_original(density=1.0), loss=loss)

    saved, put, both = fresh(base), fresh(applied), fresh(base)
    saved.save_pretrained(tmp_path / "out")
    put.apply_to(applied)
    both.apply_to(base)
    both.save_pretrained(tmp_path / "after")
    assert files(tmp_path / "after") == files(tmp_path / "out")
    for merged in (saved, put, both):
        assert merged.report.notes["anchor loss"] == pytest.approx(losses, rel=1e-5)
    assert "anchor loss" in str(put.report)
    json.dumps(put.report.to_dict(), allow_nan=False)


def test_by_module(pair: list[Path]) -> None:
    method = sm.ByModule({"*.q": sm.task_arithmetic()}, default=sm.mean())
    left, right = (products(path, 2.0) for path in pair)
    wanted = {n: (left[n] + right[n]) * (1.0 if n.endswith("q") else 0.5) for n in left}
    close(updates(sm.merge(pair, method=method)), wanted)


def test_match_energy(pair: list[Path]) -> None:
    left, right = ([D.numpy() for D in products(path, 2.0).values()] for path in pair)
    got = [
        D.numpy()
        for D in updates(sm.merge(pair, method=sm.MatchEnergy(sm.mean()), weights=[1, 3])).values()
    ]
    assert oracles.norm(got) == pytest.approx(
        (oracles.norm(left) + 3 * oracles.norm(right)) / 4, rel=1e-6
    )


# The recipe is the whole call, so that a merge can be made again from its metadata.


def test_a_merge_can_be_repeated_from_its_recipe(pair: list[Path], tmp_path: Path) -> None:
    sm.merge(pair, method=sm.knots(0.4), weights=[2, 1], scale=0.5, rank="exact").save_pretrained(
        tmp_path / "one"
    )
    recipe = dict(
        sm.merge(pair, method=sm.knots(0.4), weights=[2, 1], scale=0.5, rank="exact").recipe
    )
    recipe["method"] = sm.parse(recipe["method"])
    sm.merge(pair, **recipe).save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
