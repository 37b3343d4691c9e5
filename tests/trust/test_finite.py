"""A NaN or an infinity never passes, whatever stage it is put in:
200 injections, 200 errors that name the place.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sapmerge as sm
from tests.anchors import models

BAD = (math.nan, math.inf, -math.inf)
TARGETS = r".*vision_model.*(q_proj|v_proj|fc1)"
PER_STAGE = 34


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("finite")
    base, made = models.clip(), []
    for k, rank in enumerate((2, 3)):
        client = models.with_peft(base, TARGETS, rank=rank, seed=k + 1)
        client.peft_config["default"].base_model_name_or_path = "org/clip"
        client.save_pretrained(root / f"client{k}")
        made.append(root / f"client{k}")
    return made


@pytest.fixture(params=range(PER_STAGE))
def draw(request: pytest.FixtureRequest) -> torch.Generator:
    """A new random place for every injection."""
    return torch.Generator().manual_seed(request.param)


def pick(generator: torch.Generator, among: Any) -> Any:
    return among[int(torch.randint(len(among), (1,), generator=generator))]


def layers_of(folder: Path) -> list[str]:
    return list(sm.Adapter.load(folder).modules)


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def test_in_a_tensor(draw: torch.Generator, folders: list[Path], tmp_path: Path) -> None:
    name = pick(draw, list(load_file(folders[0] / "adapter_model.safetensors")))

    def spoil(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[int(torch.randint(len(flat), (1,), generator=draw))] = pick(draw, BAD)

    broken = changed(folders[0], tmp_path / "broken", spoil)
    with pytest.raises(sm.NonFiniteError) as caught:
        sm.merge([folders[1], broken], method=sm.mean())
    assert "broken" in str(caught.value)
    assert name in str(caught.value)


def test_in_a_product(draw: torch.Generator, folders: list[Path], tmp_path: Path) -> None:
    layer = pick(draw, layers_of(folders[0]))

    def blow_up(tensors: dict[str, Tensor]) -> None:
        for part in "AB":
            tensors[f"base_model.model.{layer}.lora_{part}.weight"].fill_(1e30)

    broken = changed(folders[0], tmp_path / "broken", blow_up)
    with pytest.raises(sm.NonFiniteError) as caught:
        sm.merge([folders[1], broken], method=sm.mean()).save_pretrained(tmp_path / "out")
    assert "broken" in str(caught.value)
    assert layer in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_in_a_gradient(draw: torch.Generator, attention: str, folders: list[Path]) -> None:
    if draw.initial_seed() % 2 != (attention == "eager"):
        pytest.skip("every other place for each attention")
    model = models.clip(attention)
    layer, bad = pick(draw, layers_of(folders[0])), pick(draw, BAD)

    def loss(base: torch.nn.Module, batch: Any) -> Tensor:
        with spoiled_gradient(base.get_submodule(layer), bad):
            return sm.alignment(base, batch)

    with pytest.raises(sm.NonFiniteError) as caught:
        sm.merge(folders, models.pairs(), model, method=sm.sap(0.9), loss=loss)
    assert "client" in str(caught.value)
    assert "vision_model" in str(caught.value)


@contextmanager
def spoiled_gradient(module: torch.nn.Module, bad: float) -> Iterator[None]:
    """The gradient of the module's output, on its way back, gets a bad entry."""

    def put(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output * 1.0
        if output.requires_grad:
            output.register_hook(
                lambda gradient: gradient.clone().index_fill_(0, torch.tensor([0]), bad)
            )
        return output

    handle = module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def test_in_a_score(draw: torch.Generator, folders: list[Path], tmp_path: Path) -> None:
    layer, label, bad = (
        pick(draw, layers_of(folders[0])),
        pick(draw, ["client0", "client1"]),
        pick(draw, BAD),
    )

    def scorer(values: Tensor, stats: sm.Stats) -> Tensor:
        scores = values.abs()
        if (stats.layer, stats.adapter) == (layer, label):
            scores.view(-1)[-1] = bad
        return scores

    merged_or_not = sm.Chain(sm.Prune(scorer, sm.TopFraction(0.5)), sm.Mean())
    with pytest.raises(sm.NonFiniteError) as caught:
        sm.merge(folders, method=merged_or_not).save_pretrained(tmp_path / "out")
    assert layer in str(caught.value)
    assert label in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_in_a_merged_update(draw: torch.Generator, folders: list[Path], tmp_path: Path) -> None:
    layer, bad = pick(draw, layers_of(folders[0])), pick(draw, BAD)
    dense = int(torch.randint(2, (1,), generator=draw))

    def merger(layer_: sm.Layer) -> sm.Update:
        update = layer_.updates[0]
        if layer_.name != layer:
            return update
        return sm.Dense(update.dense() + bad) if dense else sm.LowRank(update.B + bad, update.A)

    base = models.clip()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = sm.merge(folders, method=merger)
    for sink in (lambda: merged.save_pretrained(tmp_path / "out"), lambda: merged.apply_to(base)):
        with pytest.raises(sm.NonFiniteError) as caught:
            sink()
        assert layer in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*differ in norm")
def test_in_the_cast_to_the_output(
    draw: torch.Generator, folders: list[Path], tmp_path: Path
) -> None:
    layer = pick(draw, layers_of(folders[0]))

    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        # fits float16; twice that does not
        tensors[f"base_model.model.{layer}.lora_B.weight"].fill_(6e4)

    halves = [changed(folder, tmp_path / folder.name, halve) for folder in folders]
    with pytest.raises(sm.NonFiniteError) as caught:
        sm.merge(halves, method=sm.task_arithmetic(), scale=4.0).save_pretrained(tmp_path / "out")
    assert layer in str(caught.value)
    assert not (tmp_path / "out").exists()
