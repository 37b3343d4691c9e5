"""What `merge` is called with by mistake, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sapmerge as sm

from ..models import save_lora


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [save_lora(tmp_path / name, k, targets=["q"]) for k, name in enumerate(("a", "b"))]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ties",), {"density": 0.2}, r"method=sm\.ties\(density=\.\.\.\)"),
        (("ties",), {}, r"merge\(adapters, method=sm\.ties\(\)\)"),
        ((sm.mean(),), {}, "A method is method="),
        ((), {"method": sm.mean(), "weihgts": [1, 2]}, "did you mean weights="),
        ((None, None, sm.mean()), {}, "by name: method="),
    ],
)
def test_what_is_meant(
    folders: list[Path], arguments: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(sm.MethodError, match=message):
        sm.merge(folders, *arguments, **options)


def test_a_scorer_with_a_wrong_signature() -> None:
    def score(values: Any) -> Any:
        return values.abs()

    with pytest.raises(sm.MethodError, match=r"with 2 arguments, \(Tensor, Stats\)"):
        sm.Prune(score, sm.TopFraction(0.5))
    with pytest.raises(
        sm.MethodError,
        match="mask is called with 1",
    ):
        sm.Prune(sm.Magnitude(), lambda: None)


def test_inspect_refuses_what_merge_refuses(tmp_path: Path) -> None:
    """A module that one adapter changes and the other saves whole."""
    one = save_lora(tmp_path / "one", 1, targets=["q", "narrow"])
    two = save_lora(tmp_path / "two", 2, targets=["q"], modules_to_save=["narrow"])
    with pytest.raises(sm.IncompatibleAdaptersError) as refused:
        sm.merge([one, two], method=sm.mean(), modules_to_save="mean")
    assert sm.inspect([one, two]).problem == str(refused.value)
    heads = [
        save_lora(tmp_path / name, k, targets=["q"], modules_to_save=["head"])
        for k, name in enumerate("ab")
    ]
    found = sm.inspect(heads)
    assert found.problem is None
    assert "modules_to_save (head)" in str(found)
