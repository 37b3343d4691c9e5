"""A method prints as its recipe and reads back; nothing else is ever read."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge import methods
from sapmerge.core.part import parts, recipe
from sapmerge.errors import MethodError
from tests.conftest import Anchored, LinearLoss, dense, make_layers, run

# factor_average says so
pytestmark = pytest.mark.filterwarnings("ignore:A and B are merged separately")


def sqrt_magnitude(values: Tensor, stats: sm.Stats) -> Tensor:
    """A user's scorer."""
    return values.abs().sqrt()


def above_mean(scores: Tensor) -> Tensor:
    """A user's mask builder."""
    return scores > scores.mean()


METHODS = [getattr(methods, name)() for name in methods.__all__] + [
    sm.ties(0.35, "frequency", "adapter"),
    sm.core_space(sm.dare_ties(0.3, seed=7), balance=False),
    sm.MatchEnergy(
        sm.Chain(
            sm.Prune(sm.Magnitude(), sm.TopFraction(0.4), sm.MatchNorm(1), sm.Factors()), sm.Mean()
        )
    ),
    sm.ByModule(
        {"*q_proj": sm.mean(), "*.v_*": sm.MatchEnergy(sm.ties())}, default=sm.knots(scaled=False)
    ),
    sm.Chain(
        sm.Prune(sm.Random(-3), sm.Threshold(-0.5), sm.Divide(0.5), units=sm.Directions()), sm.Sum()
    ),
    sm.Chain(sm.Prune(sm.Magnitude(), sm.Threshold(1e-9), units=sm.Layers()), sm.DisjointMean()),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_recipe_reads_back(method: sm.Method) -> None:
    again = sm.parse(repr(method))
    assert repr(again) == repr(method)
    assert type(again) is type(method)
    assert [type(part) for part in parts(again)] == [type(part) for part in parts(method)]
    layers = make_layers([3, 3], weights=[1.0, 0.7])  # two of one rank: what every method takes
    got, wanted = dense(run(again, layers)), dense(run(method, layers))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", methods.__all__)
def test_named_methods_can_be_called_in_a_recipe(name: str) -> None:
    assert repr(sm.parse(f"{name}()")) == repr(getattr(methods, name)())
    for argument in inspect.signature(getattr(methods, name)).parameters.values():
        assert argument.default is not inspect.Parameter.empty, f"{name}() needs {argument.name}"


def test_preparing_does_not_show() -> None:
    """What a pre-pass found out is not part of the recipe."""
    for method in METHODS:
        made = make_layers([3, 3])
        layers = Anchored(made, LinearLoss(made))
        assert repr(sm.prepare(method, layers)) == repr(method)


def test_parts_are_frozen() -> None:
    for method in METHODS:
        for part in parts(method):
            if dataclasses.is_dataclass(part):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    part.density = 0.9  # type: ignore[attr-defined]


def test_keywords_positions_and_white_space() -> None:
    text = "\n  Chain( Prune(Magnitude(),\n TopFraction(0.2)), ElectSign(), DisjointMean() ) \n"
    assert repr(sm.parse(text)) == repr(sm.ties(0.2))
    assert repr(sm.parse("ties(density=0.2, scope='adapter')")) == repr(
        sm.ties(0.2, scope="adapter")
    )
    assert repr(sm.parse("core_space(inner=dare(0.5, seed=-1), balance=False)")) == repr(
        sm.core_space(sm.dare(0.5, -1), False)
    )


def test_a_users_function_is_resolved_only_when_it_is_passed() -> None:
    method = sm.Chain(sm.Prune(sqrt_magnitude, above_mean), sm.Mean())
    text = repr(method)
    assert "'tests.test_parsing:sqrt_magnitude'" in text
    assert "'tests.test_parsing:above_mean'" in text
    functions = {
        "tests.test_parsing:sqrt_magnitude": sqrt_magnitude,
        "tests.test_parsing:above_mean": above_mean,
    }
    again = sm.parse(text, functions=functions)
    assert repr(again) == text
    layers = make_layers([3, 3])
    got, wanted = dense(run(again, layers)), dense(run(method, layers))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with pytest.raises(MethodError, match=r"tests\.test_parsing:above_mean.*functions="):
        sm.parse(text, functions={"tests.test_parsing:sqrt_magnitude": sqrt_magnitude})
    with pytest.raises(MethodError, match="os:system"):
        sm.parse("Chain('os:system')")


def test_functions_without_a_module_level_name_still_print() -> None:
    def local(layer: sm.Layer) -> sm.Update:
        return layer.updates[0]

    class Thing:
        def __call__(self, layer: sm.Layer) -> sm.Update:
            return layer.updates[0]

    for function in (local, Thing(), lambda layer: layer.updates[0], Thing().__call__):
        shown = recipe(function)
        again = sm.parse(f"Chain({shown})", functions={shown.strip("'"): function})
        assert again.steps == (function,)


REFUSED = {
    "attribute": "Magnitude().__class__",
    "attribute call": "torch.load('x')",
    "attribute of a method": "Chain(Mean()).steps",
    "dunder": "__import__('os')",
    "dunder constant": "__builtins__",
    "builtin": "eval('1')",
    "builtin function": "open('/etc/passwd')",
    "getattr": "getattr(Mean(), 'x')",
    "lambda": "Chain(lambda layer: layer)",
    "comprehension": "Chain(*[Mean() for _ in 'ab'])",
    "star": "Chain(*(Mean(),))",
    "double star": "ties(**{'density': 0.2})",
    "dict unpacking": "ByModule({**{}}, mean())",
    "subscript": "(Mean(),)[0]",
    "arithmetic": "TopFraction(0.1 + 0.1)",
    "power": "Random(9 ** 9 ** 9)",
    "format string": "TopFraction(0.5, scope=f'{1}')",
    "walrus": "(x := Mean())",
    "conditional": "mean() if True else ties()",
    "bare name": "os",
    "bytes": "Chain(b'x')",
    "complex": "Threshold(1j)",
    "ellipsis": "Chain(...)",
    "statement": "import os",
    "two statements": "mean(); mean()",
    "yield": "(yield)",
    "unknown": "Medium()",
    "empty": "",
    "null": "mean()\0",
    "unclosed": "Chain(Mean()",
    "call of a call": "ties()()",
    "wrong argument": "ties(denisty=0.2)",
    "too many": "mean(1, 2, 3)",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
def test_refused(text: str) -> None:
    with pytest.raises(MethodError):
        sm.parse(text)


@pytest.mark.parametrize(
    "name",
    [
        "merge",
        "inspect",
        "parse",
        "prepare",
        "Adapter",
        "Layer",
        "LowRank",
        "Dense",
        "absent",
        "Frames",
        "Coordinates",
        "layer",
        "methods",
        "torch",
        "recipe",
        "part",
        "count_kept",
        "seed_of",
        "SapmergeError",
        "_public",
        "CALLABLE",
        "outputs_only",
        "alignment",
        "from_pairs",
    ],
)
def test_only_parts_and_methods_can_be_called(name: str) -> None:
    for text in (f"{name}()", f"{name}('x')", f"Chain({name}())"):
        with pytest.raises(MethodError, match="not a public"):
            sm.parse(text)


@pytest.mark.parametrize("depth", [250, 500, 900, 3_000, 10_000, 100_000])
@pytest.mark.parametrize(
    ("left", "middle", "right"),
    [
        ("(", "", ""),
        ("(", "Mean()", ")"),
        ("[", "1", "]"),
        ("{", "1", ": 1}"),
        ("MatchEnergy(", "mean(", "))"),
        ("-", "1", ""),
        ("not ", "1", ""),
        ("", "1", " + 1"),
        ("", "Mean()", ".x"),
        ("", "Mean()", "()"),
        ("", "1", " if 1 else 1"),
        ("lambda: ", "1", ""),
    ],
)
def test_deep_nesting_is_refused(left: str, middle: str, right: str, depth: int) -> None:
    with pytest.raises(MethodError) as caught:
        sm.parse(left * depth + middle + right * depth)
    assert len(str(caught.value)) < 2_000


def test_long_flat_recipes_are_read() -> None:
    steps = ", ".join(["ElectSign()"] * 200)
    assert len(sm.parse(f"Chain({steps}, Mean())").steps) == 201


def test_unhashable_keys_are_refused() -> None:
    with pytest.raises(MethodError):
        sm.parse("ByModule({{1: 1}: mean()}, mean())")


def test_the_text_is_never_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eval", "exec"):
        monkeypatch.delattr(f"builtins.{name}")
    assert repr(sm.parse("ties(0.2)")) == repr(sm.ties(0.2))
