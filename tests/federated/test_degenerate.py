"""Rounds of one client, of a client that has learned nothing, and of clients that are the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge import federated as fed
from sapmerge.errors import MethodError
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


def _three() -> list[sm.Adapter]:
    made: list[sm.Adapter] = []
    for k in range(3):
        generator = torch.Generator().manual_seed(k)
        state = {
            "base_model.model.q.lora_A.weight": torch.randn(2, 5, generator=generator),
            "base_model.model.q.lora_B.weight": torch.randn(4, 2, generator=generator),
        }
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        made.append(sm.Adapter.from_state_dict(config, state, label=f"c{k}"))
    return made


@pytest.mark.parametrize("label", ["../outside", "vqa/coco", "..", "", "a\\b"])
def test_a_label_that_is_no_name_of_a_folder_writes_nothing(tmp_path: Path, label: str) -> None:
    made = fed.by_task(_three(), ["fine", label, "fine"])
    with pytest.raises(sm.OutputError, match="cannot be the name of a folder"):
        made.save_pretrained(tmp_path / "in" / "out" if label == "" else tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_labels_of_rows_may_be_numbers(tmp_path: Path) -> None:
    made = _three()
    fed.personalize(made, [[0, 1, 0]], labels=[7]).save_pretrained(tmp_path / "out")  # type: ignore[list-item]
    again = sm.Adapter.load(tmp_path / "out" / "7").update("q").dense()
    assert torch.allclose(again, made[1].update("q").dense(), atol=1e-6)


def test_pilot_holds_its_rows_and_samples_against_what_they_stand_for() -> None:
    made, tasks = _three(), ["x", "x", "y"]
    W = fed.neighbours(made, 1)
    as_list = fed.pilot(made, tasks, W.tolist())["c0"]
    [(_, update)] = as_list.updates()
    wanted = sum(float(W[0, i]) * a.update("q").dense() for i, a in enumerate(made))
    assert torch.allclose(update.dense(), wanted, atol=1e-6)
    for wrong in (W * 5, W * float("nan"), W[:2], [["a"] * 3] * 3):
        with pytest.raises(MethodError, match=r"W is|rows of W"):
            fed.pilot(made, tasks, wrong)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="samples of task 'x' sum to zero"):
        fed.pilot(made, tasks, W, samples=[0, 0, 1])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "3", None])
def test_a_weight_of_a_state_is_a_finite_number(weight: Any) -> None:
    one, other, _ = _three()
    for state in (fed.MergeState(), fed.Sketch(4)):
        with pytest.raises(MethodError, match="finite number"):
            state.plus(one, 1).plus(other, weight)
    with pytest.raises(MethodError, match="finite number"):
        fed.MergeState().plus(one).replacing(one, weight)


def test_what_a_state_or_a_sketch_cannot_be() -> None:
    one = _three()[0]
    for dtype in (torch.float16, torch.int32):
        with pytest.raises(MethodError, match="float32 or float64"):
            fed.MergeState(dtype)
    with pytest.raises(MethodError, match="rank is"):
        fed.MergeState().plus(one).adapter(rank=0)  # was an adapter of zeros
    with pytest.raises(MethodError, match="width"):
        fed.Sketch(4.5)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="rank is"):
        fed.Sketch(4).plus(one).mean(1.5)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="count"):
        fed.neighbours(_three(), 1.5)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="bits"):
        fed.fixed_point(one.update("q"), "24")  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [[1e308] * 2, ["1", 1], [10**400, 1], [True, 1], [0, 1]])
def test_samples_of_prompts_that_are_no_counts(samples: Any) -> None:
    """Two of 1e308 sum to infinity: the mean was zeros."""
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1, "token_dim": 2}
    prompts = [(config, {"prompt_embeddings": torch.full((1, 2), value)}) for value in (1.0, 3.0)]
    assert fed.average_prompts(prompts, [3, 1]).tensors["prompt_embeddings"].tolist() == [[1.5] * 2]
    with pytest.raises(MethodError, match="positive numbers of samples"):
        fed.average_prompts(prompts, samples)
