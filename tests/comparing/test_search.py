"""Searching: the point that a separate merge confirms, one search per seed, what is said of it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sapmerge as sm

from ..models import copied, same, save_lora
from .test_compare import LABELS, Net, energy, right


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("search")
    return [save_lora(root / f"a{k}", k, Net(), targets=["q", "v"], size=0.2) for k in range(3)]


SPACE: dict[str, dict[str, Any]] = {
    "ties": {"density": (0.1, 1.0), "majority_sign_method": ["total", "frequency"]},
    "krum": {"select": (1, 2), "scope": "layer"},
    "mean": {},
}


def found_by(folders: list[Path], space: Any = SPACE, **options: Any) -> Any:
    pytest.importorskip("optuna", reason="pip install optuna")
    options = {"trials": 12, "evaluate": energy} | options
    model = options.pop("model") if "model" in options else Net()
    return sm.search(folders, space, model=model, **options)


def test_every_trial_is_a_separate_merge(folders: list[Path]) -> None:
    model = Net()
    before = copied(model)
    found = found_by(folders, model=model, scale=(0.5, 2.0), seed=1)
    assert same(before, copied(model))
    assert len(found.trials) == 12
    for trial in found.trials:
        separate = Net().eval()
        sm.merge(folders, method=trial.method, scale=trial.scale).apply_to(separate)
        assert trial.result.scores["score"].value == energy(separate)
        assert 0.5 <= trial.scale <= 2.0
    values = [trial.result.scores["score"].value for trial in found.trials]
    assert found.best.result.scores["score"].value == max(values)
    assert found.table.results[0].scores["score"].value == energy(copy.deepcopy(model).eval())


def test_parameters_are_within_the_space(folders: list[Path]) -> None:
    found = found_by(folders, trials=20)
    for trial in found.trials:
        name = trial.parameters["method"]
        if name == "ties":
            density = trial.parameters["ties.density"]
            assert 0.1 <= density <= 1.0
            style = SPACE["ties"]["majority_sign_method"][
                trial.parameters["ties.majority_sign_method"]
            ]
            wanted = sm.ties(density, majority_sign_method=style)
        else:
            select = trial.parameters.get("krum.select")
            wanted = sm.mean() if name == "mean" else sm.krum(select=select, scope="layer")
        assert trial.method == wanted
    assert len({trial.parameters["method"] for trial in found.trials}) > 1


def test_one_seed_is_one_search(folders: list[Path]) -> None:
    def points(seed: int) -> list[tuple[str, float]]:
        found = found_by(folders, seed=seed, scale=(0.5, 2.0))
        return [(repr(trial.method), trial.scale) for trial in found.trials]

    assert points(3) == points(3)
    assert points(3) != points(4)


def test_a_point_is_evaluated_once(folders: list[Path]) -> None:
    calls: list[int] = []

    def counted(model: nn.Module) -> float:
        calls.append(1)
        return energy(model)

    found = found_by(folders, {"krum": {"select": (1, 2)}}, evaluate=counted)
    assert len(found.trials) == 12
    assert len(calls) == 3  # the base, and two points
    assert len(found.table.rows) == 2


def test_less_may_be_better(folders: list[Path]) -> None:
    found = found_by(folders, maximize=False)
    values = [trial.result.scores["score"].value for trial in found.trials]
    assert found.best.result.scores["score"].value == min(values)


def test_it_says_what_it_was_chosen_on(folders: list[Path]) -> None:
    def both(model: nn.Module) -> dict[str, Any]:
        return {"energy": energy(model), "right": right(model)}

    found = found_by(folders, evaluate=both, metric="right", seed=5)
    text = str(found)
    assert f"{found.best.result.name} was chosen on 'right', the best of 12 trials (seed 5)" in text
    assert "report one from data that the search has not seen" in text
    best = max(trial.result.scores["right"].value for trial in found.trials)
    assert found.best.result.scores["right"].value == best
    assert len(LABELS) == len(found.best.result.scores["right"].samples)
    with pytest.raises(sm.MethodError, match="no 'wrong'"):
        found_by(folders, evaluate=both, metric="wrong")


def test_compositions_are_functions_of_a_trial(folders: list[Path]) -> None:
    def space(trial: Any) -> sm.Method:
        return sm.MatchEnergy(sm.ties(trial.suggest_float("density", 0.2, 0.9)))

    found = found_by(folders, space, trials=4)
    for trial in found.trials:
        assert trial.method == sm.MatchEnergy(sm.ties(trial.parameters["density"]))


def test_what_a_merge_refuses_is_no_result(folders: list[Path]) -> None:
    found = found_by(folders, {"slerp": {}, "mean": {}}, seed=2)  # slerp is of two adapters
    refused = [trial for trial in found.trials if trial.result.problem]
    assert {repr(trial.method) for trial in refused} == {repr(sm.slerp())}
    assert found.best.method == sm.mean()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "a space is"),
        ("ties", "a space is"),
        ({"teis": {}}, "there is no method 'teis'"),
        ({"ties": {"densty": (0.1, 0.2)}}, "has no densty; it takes density"),
        ({"ties": {"density": (0.9, 0.1)}}, "low < high"),
        ({"ties": {"density": (0.1, float("nan"))}}, "low < high"),
        ({"ties": {"density": (0.1, 0.2, 0.3)}}, "low < high"),
        ({"ties": {"density": []}}, "at least one"),
        ({"ties": 0.2}, "is a mapping"),
    ],
    ids=str,
)
def test_wrong_spaces_are_refused(folders: list[Path], space: Any, message: str) -> None:
    with pytest.raises(sm.MethodError, match=message):
        sm.search(folders, space, model=Net(), evaluate=energy)


def test_other_wrong_arguments(folders: list[Path]) -> None:
    for options, message in (
        ({"model": None}, "search needs the loaded base model"),
        ({"evaluate": "energy"}, "evaluate is a function"),
        ({"trials": 0}, "trials is a number from 1 on"),
        ({"scale": (2.0, 1.0)}, "scale: a range"),
    ):
        with pytest.raises(sm.MethodError, match=message):
            sm.search(folders, SPACE, **{"model": Net(), "evaluate": energy} | options)


def test_without_optuna_it_says_what_to_install(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(sm.MethodError, match=r'pip install "sapmerge\[search\]"'):
        sm.search(folders, SPACE, model=Net(), evaluate=energy)


def test_torch_draws_are_not_touched(folders: list[Path]) -> None:
    model = Net()  # seeds torch
    before = torch.get_rng_state()
    found_by(folders, trials=2, model=model)
    assert torch.equal(before, torch.get_rng_state())
