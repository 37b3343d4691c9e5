"""A merge that was killed goes on where it was; what changed is never taken from the cache."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.anchors import runner as passes
from sapmerge.errors import AnchorError
from tests.anchors import models

TARGETS = [
    r".*vision_model.*(q_proj|v_proj)",
    r".*vision_model.*(q_proj|fc1)",
    r".*text_model.*v_proj",
]

PRUNING = sm.sap(0.9)
"""A method that takes gradients, as the default does not."""


def merge(*arguments: Any, method: sm.Method = PRUNING, **given: Any) -> sm.Merged:
    return models.merge(*arguments, method=method, **given)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The adapters for which the anchors were run with gradients."""
    seen: list[int | None] = []
    backward = passes.Runner.backward

    def counting(self: passes.Runner, adapter: int | None, *rest: Any) -> int:
        seen.append(adapter)
        return backward(self, adapter, *rest)

    monkeypatch.setattr(passes.Runner, "backward", counting)
    return seen


def updates_of(merged: sm.Merged) -> dict[str, Tensor]:
    return {name: update.dense() for name, update in merged.updates()}


def test_the_second_run_needs_no_pass_and_gives_the_same_bits(
    tmp_path: Path, counted: list[int | None]
) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS)
    plain = merge(made, models.pairs(), base)
    assert len(counted) == 3
    first = merge(made, models.pairs(), base, cache=tmp_path / "cache")
    assert len(counted) == 6
    again = merge(made[::-1], models.pairs(), base, cache=tmp_path / "cache")
    other_density = merge(
        made, models.pairs(), base, method=sm.sap(density=0.5), cache=tmp_path / "cache"
    )
    assert len(counted) == 6
    for name, update in updates_of(plain).items():
        assert torch.equal(update, updates_of(first)[name])
        assert torch.equal(update, updates_of(again)[name])
    fresh = merge(made, models.pairs(), base, method=sm.sap(density=0.5))
    assert all(
        torch.equal(update, updates_of(fresh)[name])
        for name, update in updates_of(other_density).items()
    )
    assert again.report.notes["anchor loss"] == pytest.approx(
        plain.report.notes["anchor loss"], rel=1e-6
    )


def test_losses_from_the_cache_count_as_used(tmp_path: Path) -> None:
    """No warning that the anchors were not used: warnings are errors in tests."""
    base = models.clip()
    made, _ = models.adapters(base, TARGETS)
    for _ in range(2):
        merge(made, models.pairs(), base, method=sm.sap(), cache=tmp_path / "cache")


LEFT = {"calls": 0}


def dying(model: Any, batch: Any) -> Tensor:
    if torch.is_grad_enabled():
        LEFT["calls"] -= 1
        if LEFT["calls"] < 0:
            raise KeyboardInterrupt
    return sm.alignment(model, batch)


def test_a_run_that_died_goes_on_with_the_adapters_that_are_missing(
    tmp_path: Path, counted: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS)
    LEFT["calls"] = 2 * len(models.pairs())
    with pytest.raises(KeyboardInterrupt):
        merge(made, models.pairs(), base, loss=dying, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    counted.clear()
    LEFT["calls"] = 1000
    merge(made, models.pairs(), base, loss=dying, cache=tmp_path)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "what", ["adapter", "base", "anchors", "loss", "statistic", "units", "frames"]
)
def test_a_changed_input_is_not_reused(
    tmp_path: Path, counted: list[int | None], what: str
) -> None:
    base, anchors, method = models.clip(), models.pairs(), PRUNING
    loss: Callable[..., Tensor] = sm.alignment
    made, live = models.adapters(base, TARGETS[:2], (3, 2))
    merge(made, anchors, base, method=method, loss=loss, cache=tmp_path)
    counted.clear()
    wanted = 2
    if what == "adapter":
        with torch.no_grad():
            next(p for n, p in live[0].named_parameters() if "lora_B" in n).add_(1e-3)
        made, wanted = [models.adapter(live[0], "a0"), made[1]], 1
    elif what == "base":
        with torch.no_grad():
            base.vision_model.encoder.layers[1].mlp.fc2.weight[0, 0] += 1e-3
    elif what == "anchors":
        anchors[1]["pixel_values"][0, 0, 0, 0] += 1e-3
    elif what == "loss":
        loss = lambda model, batch: sm.alignment(model, batch) * 1.0  # noqa: E731
    elif what == "statistic":
        method = sm.sap(0.9, scorer=sm.PerSampleTaylor())
    elif what == "units":
        method = sm.sap(0.9, units=sm.Directions())
    else:
        method = sm.In(sm.CoreSpace(), sm.sap_original())
    merge(made, anchors, base, method=method, loss=loss, cache=tmp_path)
    assert len(counted) == wanted


def test_two_lambdas_of_one_name_are_two_losses(tmp_path: Path, counted: list[int | None]) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS[:1], (3,))
    for factor in ("1.0", "2.0"):
        loss = eval(f"lambda model, batch: sm.alignment(model, batch) * {factor}", {"sm": sm})
        merge(made, models.pairs(), base, loss=loss, cache=tmp_path)
    assert len(counted) == 2


class Weighted:
    def __init__(self, factor: float) -> None:
        self.factor = torch.tensor(factor)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return sm.alignment(model, batch) * self.factor

    def method(self, model: Any, batch: Any) -> Tensor:
        return self(model, batch)


class WeightedModule(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, model: Any, batch: Any) -> Tensor:
        return sm.alignment(model, batch) * self.factor


def _of_class(factor: float) -> Any:
    """Two classes of one name that differ in the bytecode of a method alone."""
    return type("Own", (), {"__call__": eval(f"lambda self, m, b: f(m, b) * {factor}", GLOBALS)})()


def _of_module(factor: float) -> Any:
    body = eval(f"lambda self, m, b: f(m, b) * {factor}", GLOBALS)
    return type("Own", (torch.nn.Module,), {"forward": body})()


GLOBALS = {"f": sm.alignment}


def weighted(model: Any, batch: Any, factor: float = 1.0) -> Tensor:
    return sm.alignment(model, batch) * factor


def _closure(factor: float) -> Any:
    return lambda model, batch: sm.alignment(model, batch) * factor


def _default(factor: float) -> Any:
    def loss(model: Any, batch: Any, factor: float = factor) -> Tensor:
        return sm.alignment(model, batch) * factor

    return loss


@pytest.mark.parametrize(
    "make",
    [
        _closure,
        _default,
        Weighted,
        WeightedModule,
        _of_class,
        _of_module,
        lambda f: Weighted(f).method,
        lambda f: partial(weighted, factor=f),
    ],
)
def test_what_a_loss_holds_is_a_part_of_it(
    tmp_path: Path, counted: list[int | None], make: Any
) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS[:1], (3,))
    for factor in (1.0, 2.0, 1.0):
        merge(made, models.pairs(), base, loss=make(factor), cache=tmp_path)
    assert len(counted) == 2


def test_a_loss_of_unknown_content_has_no_cache(tmp_path: Path) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS[:1], (3,))
    lock = threading.Lock()

    def loss(model: Any, batch: Any) -> Tensor:
        with lock:
            return sm.alignment(model, batch)

    with pytest.raises(AnchorError, match=r"whether a lock is the same .* without a cache"):
        merge(made, models.pairs(), base, loss=loss, cache=tmp_path)
    merge(made, models.pairs(), base, loss=loss)


def test_one_anchor_with_a_cache(tmp_path: Path) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS)
    found = [merge(made, models.pairs((1,)), base, cache=tmp_path) for _ in range(2)]
    for name, update in updates_of(found[0]).items():
        assert torch.equal(update, updates_of(found[1])[name])


@pytest.mark.parametrize("what", ["activation", "buffer", "attribute"])
def test_another_forward_of_the_same_weights_is_another_model(
    tmp_path: Path, counted: list[int | None], what: str
) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS[:1], (3,))
    merge(made, models.pairs(), base, cache=tmp_path)
    mlp = base.vision_model.encoder.layers[0].mlp
    if what == "activation":
        mlp.activation_fn = torch.nn.Tanh()
    elif what == "attribute":
        base.vision_model.encoder.layers[0].self_attn.scale *= 2
    else:
        mlp.register_buffer("shift", torch.ones(3), persistent=False)
    merge(made, models.pairs(), base, cache=tmp_path)
    assert len(counted) == 2


def test_the_update_that_is_scored_counts(tmp_path: Path) -> None:
    """CapShare changes the factors that are scored, not the adapter."""
    base = models.clip()
    made, _ = models.adapters(base, TARGETS)
    for share in (0.9, 0.35):
        method = sm.CapShare(sm.sap_original(0.3), share)
        cached = updates_of(merge(made, models.pairs(), base, method=method, cache=tmp_path))
        fresh = updates_of(merge(made, models.pairs(), base, method=method))
        assert all(torch.equal(cached[name], fresh[name]) for name in fresh)


def test_a_damaged_file_is_computed_again(tmp_path: Path, counted: list[int | None]) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS[:1], (3,))
    first = updates_of(merge(made, models.pairs(), base, cache=tmp_path))
    [path] = tmp_path.glob("*.safetensors")
    raw = path.read_bytes()
    for damaged in (raw[:-5], b"", raw[:-1] + bytes([raw[-1] ^ 1])):
        path.write_bytes(damaged)
        counted.clear()
        again = updates_of(merge(made, models.pairs(), base, cache=tmp_path))
        assert len(counted) == 1
        assert all(torch.equal(first[name], again[name]) for name in first)
    counted.clear()
    merge(made, models.pairs(), base, cache=tmp_path)
    assert counted == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, "losses"])


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    base = models.clip()
    made, _ = models.adapters(base, TARGETS[:1], (3,))
    (tmp_path / "file").write_text("")
    with pytest.raises(sm.OutputError, match="cache"):
        merge(made, models.pairs(), base, cache=tmp_path / "file")
