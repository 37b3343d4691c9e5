"""Rounds of a thousand clients: what works in one pass, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sapmerge as sm

pytestmark = pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")

CLIENTS = 1000


def clients() -> dict[str, Any]:
    """Adapters of rank 2 of one layer, (24, 20)."""
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    name = "base_model.model.layers.0.q_proj"
    return {
        f"client{k}": (
            config,
            {
                f"{name}.lora_A.weight": torch.randn(2, 20, generator=generator),
                f"{name}.lora_B.weight": torch.randn(24, 2, generator=generator),
            },
        )
        for k in range(CLIENTS)
    }


def dense(pair: Any) -> torch.Tensor:
    A, B = (tensor.double() for tensor in pair[1].values())
    return B @ A


def test_the_mean_of_a_thousand() -> None:
    made = clients()
    merged = sm.merge(made, method=sm.mean(), rank=16, progress=False)
    wanted = torch.stack([dense(pair) for pair in made.values()]).mean(0)
    (_, update), *rest = merged.updates()
    assert not rest
    assert (update.dense().double() - wanted).norm() < 1e-5 * wanted.norm()
    row = merged.report.layers[0]
    sigma = torch.linalg.svdvals(wanted).square()
    assert row.energy_kept == pytest.approx(float(sigma[:16].sum() / sigma.sum()), rel=1e-5)
    units = torch.stack([dense(pair) / dense(pair).norm() for pair in made.values()]).flatten(1)
    cosines = units @ units.T
    mean = (cosines.sum() - CLIENTS) / (CLIENTS * (CLIENTS - 1))
    assert row.cosine == pytest.approx(float(mean), abs=1e-6)
    assert not merged.report.cosine, "a thousand clients have half a million pairs"


def test_directions_for_each_of_a_thousand_are_refused() -> None:
    with pytest.raises(sm.LimitExceededError, match="20 orthogonal directions, fewer than one for"):
        sm.merge(clients(), method=sm.tsv(), progress=False)
