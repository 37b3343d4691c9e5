"""The running sum against its golden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sapmerge as sm
from sapmerge.core.updates import LowRank
from sapmerge.federated import MergeState, Sketch
from sapmerge.federated.sketch import recovered

FOUND = load_file(Path(__file__).parents[1] / "goldens" / "federated" / "streaming.safetensors")
COUNT = sum(name.endswith(".A") for name in FOUND)


def client(k: int) -> sm.Adapter:
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 6, "target_modules": ["q"]}
    state = {f"base_model.model.q.lora_{x}.weight": FOUND[f"in.{k}.{x}"] for x in "AB"}
    return sm.Adapter.from_state_dict(config, state, label=f"client{k}")


def gap(state: MergeState, name: str) -> float:
    wanted = FOUND[name].double()
    return float((state.mean()["q"].dense().double() - wanted).norm() / wanted.norm())


@pytest.mark.filterwarnings("ignore:.*is float64")
def test_the_sum_of_the_golden_and_without_one_of_its_clients() -> None:
    """Adapters are read in float32, so that is what a float64 state agrees to."""
    state = MergeState(torch.float64)
    for k in range(COUNT):
        state = state.plus(client(k), k + 1)
    assert gap(state, "mean") < 1e-7
    assert gap(state.without(client(4)), "without_client_4") < 1e-7
    late = state.without(client(4)).plus(client(4), 5)
    assert gap(late, "mean") < 1e-7
    merged = sm.merge(
        [client(k) for k in range(COUNT)], method=sm.mean(), weights=list(range(1, COUNT + 1))
    )
    fresh, wanted = dict(merged.updates())["q"].dense().double(), FOUND["mean"].double()
    assert (fresh - wanted).norm() < 1e-6 * wanted.norm()


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vh[:rank]


def test_a_sketch_of_the_golden() -> None:
    """With its own random matrices; the mean that comes of it errs by 1.2 times the least error."""
    total = 45 * FOUND["mean"].double()
    Y, Z = total @ FOUND["O"].double(), FOUND["P"].double() @ total
    scale = min((1.0, 1 / 45), key=lambda c: float((c * Y - FOUND["sketch.Y"]).norm()))
    assert torch.allclose(scale * Y, FOUND["sketch.Y"].double(), atol=1e-9)
    assert torch.allclose(scale * Z, FOUND["sketch.Z"].double(), atol=1e-9)
    found = recovered(Y, Z, FOUND["P"].double(), 4).dense()
    least = (total - best(total, 4)).norm()
    assert least <= (total - found).norm() < 1.6 * least


@pytest.mark.filterwarnings("ignore:.*is float64")
def test_a_sketch_adds_subtracts_and_combines() -> None:
    whole, halves = Sketch(8), [Sketch(8), Sketch(8)]
    for k in range(COUNT):
        whole = whole.plus(client(k), k + 1)
        halves[k % 2] = halves[k % 2].plus(client(k), k + 1)
    both = halves[0].combined(halves[1])
    again = whole.plus(late := _late(), 3.0).without(late)
    for other in (both, again):
        assert other.members == whole.members
        for one, two in zip(whole.sums["q"], other.sums["q"]):
            assert (one - two).norm() <= 1e-12 * one.norm()
    mean = whole.mean(rank=4)["q"]
    wanted = FOUND["mean"].double()
    least = (wanted - best(wanted, 4)).norm()
    assert isinstance(mean, LowRank)
    assert mean.rank == 4
    assert least <= (wanted - mean.dense().double()).norm() < 2 * least
    with pytest.raises(sm.MethodError, match="in both"):
        whole.combined(halves[0])
    with pytest.raises(sm.MethodError, match="seeds or widths differ"):
        whole.combined(Sketch(8, seed=1))
    with pytest.raises(sm.MethodError, match="already"):
        whole.plus(client(0))
    with pytest.raises(sm.MethodError, match="from 1 to the width"):
        whole.mean(rank=9)
    with pytest.raises(sm.MethodError, match="has no mean"):
        Sketch().mean(rank=1)


def test_a_sketch_that_is_wide_enough_is_exact() -> None:
    """Of rank 6, and of layers that are smaller than its width."""
    for width in (6, 40):
        found = Sketch(width).plus(_late()).mean(rank=6)["q"].dense()
        wanted = _late().update("q").dense()
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), width


def _late() -> sm.Adapter:
    generator = torch.Generator().manual_seed(3)
    config = {"peft_type": "LORA", "r": 6, "lora_alpha": 6, "target_modules": ["q"]}
    state = {
        "base_model.model.q.lora_A.weight": torch.randn(6, 20, generator=generator),
        "base_model.model.q.lora_B.weight": torch.randn(24, 6, generator=generator),
    }
    return sm.Adapter.from_state_dict(config, state)
