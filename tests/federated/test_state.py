"""The running sum against its golden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sapmerge as sm
from sapmerge.federated import MergeState

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
