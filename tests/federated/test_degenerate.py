"""Rounds of one client, of a client that has learned nothing, and of clients that are the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge import federated as fed
from sapmerge.federated import Inbox

SHAPES = {"q": [6, 5], "v": [4, 6]}
RULES = {
    "mean": sm.mean(),
    "matched": sm.MatchEnergy(sm.mean()),
    "agreement": sm.WeighByAgreement(sm.mean()),
    "clipped": sm.ClipNorms(sm.mean()),
    "median": sm.geometric_median(),
    "coordinates": sm.coordinate_median(),
    "clair": sm.clair(),
    "flagged": sm.FlagContaminated(sm.mean(), tests=("shared", "norm")),
    "fedit": fed.fedit(),
    "hetlora": fed.hetlora(),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.SapmergeWarning)
        yield


def upload(seed: int, factor: float = 1.0) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [*SHAPES]}
    state = {}
    for name, (m, n) in SHAPES.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, n, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = factor * torch.randn(
            m, 2, generator=generator
        )
    return config, state


def dense(pair: tuple[Any, dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    A, B = (pair[1][f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    return B @ A


def round_of(folder: Path, *pairs: Any) -> Inbox:
    box = Inbox(folder / "round", manifest=SHAPES, max_rank=4)
    for k, pair in enumerate(pairs):
        assert box.add(pair, f"client{k}", 10)
    return box


@pytest.mark.parametrize("name", RULES)
def test_one_client_gets_back_what_it_sent(name: str, tmp_path: Path) -> None:
    box = round_of(tmp_path, upload(1))
    for module, update in box.merge(method=RULES[name]).updates():
        assert torch.allclose(update.dense(), dense(upload(1), module), atol=1e-5), module
    assert box.report.clients[0].weight == 1.0


@pytest.mark.parametrize("name", RULES)
def test_the_same_from_all_is_that(name: str, tmp_path: Path) -> None:
    """As a round, where copies have one vote; and as a merge of three, where they have three."""
    box = round_of(tmp_path, *[upload(1)] * 3)
    assert len(box.clients) == 3
    merges = [box.merge(method=RULES[name])]
    merges.append(sm.merge({f"c{k}": upload(1) for k in range(3)}, method=RULES[name]))
    for merged in merges:
        for module, update in merged.updates():
            assert torch.allclose(update.dense(), dense(upload(1), module), atol=1e-4), module


@pytest.mark.parametrize("name", RULES)
def test_a_client_that_has_learned_nothing_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    box = round_of(tmp_path, upload(1), upload(2, 0.0), upload(3))
    merged = box.merge(method=RULES[name])
    merged.save_pretrained(tmp_path / "out")
    for module, update in merged.updates():
        assert torch.isfinite(update.dense()).all(), module
        if name == "mean":
            wanted = (dense(upload(1), module) + dense(upload(3), module)) / 3
            assert torch.allclose(update.dense(), wanted, atol=1e-5)
    assert str(box.report)


@pytest.mark.parametrize("name", RULES)
def test_nobody_has_learned_anything(name: str, tmp_path: Path) -> None:
    box = round_of(tmp_path, upload(1, 0.0), upload(2, 0.0), upload(3, 0.0))
    for module, update in box.merge(method=RULES[name]).updates():
        assert not update.dense().any(), module


def test_results_per_client_of_one_and_of_copies() -> None:
    one = {"a": upload(1)}
    assert fed.neighbours(one).tolist() == [[1.0]]
    found = fed.personalize(one, fed.neighbours(one))["a"]
    same = {"a": upload(1), "b": upload(1), "c": upload(1)}
    again = fed.personalize(same, fed.neighbours(same, count=2))
    for merged in (found, *(again[label] for label in same)):
        for module, update in merged.updates():
            assert torch.allclose(update.dense(), dense(upload(1), module), atol=1e-5)


def test_coming_and_going_leaves_nothing_but_rounding(tmp_path: Path) -> None:
    box = round_of(tmp_path, upload(1), upload(2))
    before = {name: update.dense() for name, update in box.state().mean().items()}
    for _ in range(20):
        assert box.add(upload(3), "guest", 10)
        box.state()
        box.remove("guest")
    for name, update in box.state().mean().items():
        assert (update.dense() - before[name]).norm() <= 1e-5 * before[name].norm()
