"""Methods by name, by recipe, and of a module of the user's."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import sapmerge as sm
from sapmerge import methods
from sapmerge.cli import main

from ..conftest import error
from ..models import files, products
from .shell import fails

MINE = """
import torch, sapmerge as sm

def score(values, stats):
    return values.abs() ** 2

def half(scores):
    return scores > 0.05

def twice(pruned, original):
    return pruned.scaled(2.0)

def flip(layer):
    return layer.with_updates([u.scaled(-1.0) for u in layer])

def first(layer):
    return layer.updates[layer.adapters.index("left")]

class Named:
    @staticmethod
    def first(layer):
        return first(layer)

constant = 3
"""


def test_functions_of_the_user(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my_rules.py").write_text(MINE)
    left = products(here / "left", 2.0)
    for number, method in enumerate(("my_rules:first", "my_rules:Named.first")):
        assert main(["merge", "left", "right", "-o", f"first{number}", "--method", method]) == 0
        merged = sm.Adapter.load(f"first{number}")
        assert all(error(merged.update(name).dense(), left[name]) < 1e-6 for name in left)
    assert "'my_rules:first'" in capsys.readouterr().out
    recipe = (
        "Chain(Prune('my_rules:score', 'my_rules:half', 'my_rules:twice'), 'my_rules:flip', "
        "'my_rules:first')"
    )
    assert (
        main(
            [
                "merge",
                "left",
                "right",
                "-o",
                "all",
                "--method",
                recipe,
                "--rank",
                "exact",
                "--quiet",
            ]
        )
        == 0
    )
    for name, matrix in left.items():
        wanted = torch.where(matrix**2 > 0.05, -2 * matrix, 0.0)
        assert error(sm.Adapter.load("all").update(name).dense(), wanted) < 1e-5
    capsys.readouterr()
    merge = ("merge", "left", "right", "-o", "out", "--method")
    assert "nothing" in fails(capsys, *merge, "my_rules:nothing")
    assert "not a function" in fails(capsys, *merge, "my_rules:constant")
    assert "no_such_module" in fails(capsys, *merge, "no_such_module:f")
    assert "no_such_module" in fails(capsys, *merge, "Chain('no_such_module:f')")
    (here / "broken_rules.py").write_text("def f(:\n")
    assert "broken_rules" in fails(capsys, *merge, "broken_rules:f")
    (here / "raising_rules.py").write_text("raise RuntimeError('on\\nimport')\n")
    assert "on import" in fails(capsys, *merge, "raising_rules:f")


def needy(density: float) -> sm.Method:
    return sm.ties(density)


def test_a_method_without_defaults_says_what_it_takes(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "needy", needy, raising=False)
    monkeypatch.setattr(methods, "__all__", [*methods.__all__, "needy"])
    command = ("merge", "left", "right", "-o", "out", "--method", "needy")
    assert "'needy' needs density" in fails(capsys, *command)
    assert main([*command, "--density", "0.5", "--rank", "exact"]) == 0


def test_a_recipe(here: Path) -> None:
    recipe = repr(sm.knots(0.4))
    main(["merge", "left", "right", "-o", "out", "--method", recipe, "--rank", "exact", "--quiet"])
    main(
        [
            "merge",
            "left",
            "right",
            "-o",
            "named",
            "--method",
            "knots",
            "--density",
            "0.4",
            "--rank",
            "exact",
            "--quiet",
        ]
    )
    assert files(here / "out") == files(here / "named")


@pytest.mark.parametrize("name", [name for name in methods.__all__ if name.islower()])
def test_every_method_by_its_name(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    factory = getattr(sm, name)
    command = ["merge", "left", "same", "-o", "out", "--rank", "exact", "--method", name]
    if name in methods.anchored.__all__:
        assert "anchors and a model" in fails(capsys, *command)
        return
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "written to out" in out
    assert all(line.startswith("sapmerge: warning: ") for line in err.splitlines())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sm.merge(["left", "same"], method=factory(), rank="exact").save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_options_of_methods(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "merge",
            "left",
            "right",
            "-o",
            "a",
            "--method",
            "dare",
            "--seed",
            "3",
            "--density",
            "0.4",
            "--rank",
            "exact",
        ]
    )
    out = capsys.readouterr().out
    assert "Random(seed=3)" in out
    assert "density=0.4" in out
    assert "has no density" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "mean", "--density", "0.5"
    )
    assert "has no seed" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "ties", "--seed", "1"
    )
    assert "--density goes with a method's name" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "ties()", "--density", "0.5"
    )
    assert "write 0.2" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "ties", "--density", "20"
    )
