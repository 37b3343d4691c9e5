"""WUDI: the closed form minimises the loss, the steps are the authors' numbers, and the laws."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sapmerge as sm
from sapmerge.errors import MethodError
from tests.conftest import changed, error, low_rank, make_layers, run
from tests.methods import test_laws as laws
from tests.methods.test_goldens import HERE, INDEX

ENTRIES = {
    entry["key"]: entry for entry in json.loads((HERE / "lora_native.json").read_text())["entries"]
}
NUMBERS, INPUTS = (
    load_file(HERE / "lora_native.safetensors"),
    load_file(HERE / "inputs.safetensors"),
)


def loss(X: Tensor, layer: sm.Layer) -> float:
    terms = zip((u.dense() for u in layer), layer.weights)
    return sum(
        abs(w) * float(((X - (1 if w > 0 else -1) * D) @ D.T).square().sum() / D.square().sum())
        for D, w in terms
    )


def closed(layer: sm.Layer) -> Tensor:
    """(sum w D G) (sum |w| G)^+ in float64, with (n, n) matrices."""
    D, w = [u.dense().double() for u in layer], layer.weights
    G = [d.T @ d / d.square().sum() for d in D]
    left = sum(k * d @ g for k, d, g in zip(w, D, G))
    return left @ torch.linalg.pinv(
        sum(abs(k) * g for k, g in zip(w, G)), rtol=1e-11, hermitian=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", ["misc/wudi/s3/it300", "misc/wudi/d3/it300"])
def test_official_numbers(key: str, dtype: torch.dtype) -> None:
    for name in INDEX["input_sets"]["s3"]["layers"]:
        if "/s3/" in key:
            updates = [
                sm.LowRank(*(INPUTS[f"s3/t{k}/{name}/{p}"].to(dtype) for p in "BA"))
                for k in range(3)
            ]
        else:
            updates = [sm.Dense(INPUTS[f"d3/t{k}/{name}/dW"].to(dtype)) for k in range(3)]
        merged = sm.WUDISteps()(sm.Layer(name, tuple(updates)))
        assert error(merged.dense(), NUMBERS[ENTRIES[key]["outputs"][f"{name}/dW"]]) < 1e-5


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 0.7), (1.0, -0.5, 0.7)])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 6), (9, 9, 9), (1, 1, 1)])
def test_closed_form_is_the_formula_and_the_minimum(
    weights: tuple[float, ...], ranks: tuple[int, ...]
) -> None:
    for layer in make_layers(ranks, {"wide": (9, 20), "tall": (20, 9)}, weights=weights):
        merged = sm.wudi()(layer)
        assert isinstance(merged, sm.LowRank)
        assert merged.rank <= min(sum(ranks), layer.shape[1])
        X = merged.dense()
        assert error(X, closed(layer)) < 1e-8
        for seed in range(3):
            assert loss(X + 0.01 * low_rank(layer.shape, 3, seed).dense(), layer) >= loss(
                X, layer
            ) * (1 - 1e-9)
        plain = sum(w * u.dense() for w, u in zip(weights, layer))
        assert loss(X, layer) < loss(plain, layer)


def test_dense_updates_and_low_rank_updates_are_one_thing() -> None:
    layer = make_layers([2, 3, 4])[0]
    mixed = changed(layer, updates=(sm.Dense(layer.updates[0].dense()), *layer.updates[1:]))
    assert error(sm.wudi()(mixed).dense(), sm.wudi()(layer).dense()) < 1e-9
    assert error(sm.WUDISteps()(mixed).dense(), sm.WUDISteps()(layer).dense()) < 1e-9


def test_long_adam_goes_to_the_closed_form() -> None:
    layer = make_layers([2, 2], {"l": (5, 6)})[0]
    far = loss(sm.WUDISteps()(layer).dense(), layer)
    near = loss(sm.WUDISteps(lr=1e-2, steps=3000)(layer).dense(), layer)
    best = loss(sm.wudi()(layer).dense(), layer)
    assert best <= near < best * 1.01 + 1e-6 < far


def test_steps_move_no_entry_far_and_leave_one_adapter_alone() -> None:
    layer = make_layers([3, 3], {"l": (8, 7)})[0]
    moved = sm.WUDISteps()(layer).dense() - sm.task_arithmetic()(layer).dense()
    assert 1e-4 < float(moved.abs().max()) < 4e-3
    one = make_layers([3], {"l": (8, 7)})[0]
    assert error(sm.WUDISteps()(one).dense(), one.updates[0].dense()) < 1e-6


def test_nearly_identical_adapters_have_no_noise_directions() -> None:
    """Two float32 copies that differ by rounding: the cut drops what is left of the difference."""
    update = low_rank((12, 10), 3, 0, torch.float32)
    other = sm.LowRank(update.B * 3, update.A / 3)
    merged = sm.wudi()(sm.Layer("l", (update, other)))
    assert merged.rank == 3
    assert error(merged.dense(), update.dense()) < 1e-5


def test_one_adapter_comes_back() -> None:
    for weight in (1.0, 0.5):
        for layer in make_layers([3], weights=[weight]):
            assert error(sm.wudi()(layer).dense(), layer.updates[0].dense()) < 1e-12


@pytest.mark.parametrize("factor", [-1.0, 3.0, 1e6, 1e-6, -1e-3])
def test_homogeneous(factor: float) -> None:
    laws.test_homogeneous("wudi", sm.wudi(), factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gauge", ["scale", "rotate", "general"])
def test_gauge_invariant(gauge: str, dtype: torch.dtype) -> None:
    laws.test_gauge_invariant("wudi", sm.wudi(), gauge, dtype)


@pytest.mark.parametrize(
    "law",
    [
        laws.test_order_of_adapters_is_irrelevant,
        laws.test_zero_adapter_is_neutral,
        laws.test_zero_weight_is_no_adapter,
        laws.test_identical_adapters_vote_alike,
        laws.test_same_bits_in_any_layer_order_and_thread_count,
        laws.test_float32_and_float64_agree,
        laws.test_inputs_are_not_modified,
        laws.test_linear_methods_stay_low_rank,
    ],
)
def test_laws(law) -> None:
    law("wudi", sm.wudi())


@pytest.mark.parametrize("method", [sm.wudi(), sm.Chain(sm.WUDISteps(steps=20))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", list(laws._degenerate(torch.float64)))
def test_degenerate_inputs_are_ordinary(case: str, method: sm.Method, dtype: torch.dtype) -> None:
    laws.test_degenerate_inputs_are_ordinary("wudi", method, case, dtype)


def test_steps_in_float32_and_float64_agree() -> None:
    laws.test_float32_and_float64_agree("wudi", sm.Chain(sm.WUDISteps()))
    laws.test_order_of_adapters_is_irrelevant("wudi", sm.Chain(sm.WUDISteps()))
    laws.test_same_bits_in_any_layer_order_and_thread_count("wudi", sm.Chain(sm.WUDISteps()))


def test_wrong_arguments_are_named() -> None:
    for make in (
        lambda: sm.WUDI(0.0),
        lambda: sm.WUDISteps(lr=-1.0),
        lambda: sm.WUDISteps(steps=0),
    ):
        with pytest.raises(MethodError):
            make()
    assert repr(sm.parse(repr(sm.wudi()))) == repr(sm.wudi())
    assert set(run(sm.wudi(), make_layers([0, 0])))


# SWUDI: part of the spectrum, part of the way.


def swudi(layer: sm.Layer, share: float | str, start: str, steps: float | None) -> Tensor:
    """X0 (I - V F V^T) + H V (F / L) V^T with (n, n) matrices."""
    D, w = [u.dense().double() for u in layer], layer.weights
    G = [d.T @ d / d.square().sum() for d in D]
    L, V = torch.linalg.eigh(sum(abs(k) * g for k, g in zip(w, G)))
    order = L.argsort(descending=True)
    L, V = L[order], V[:, order]
    count = int(torch.linalg.matrix_rank(torch.diag(L), rtol=1e-12))
    L, V = L[:count], V[:, :count]
    s = L.sqrt()
    count = float(s.sum() ** 2 / s.square().sum()) if share == "auto" else float(share) * len(L)
    F = torch.ones_like(L) if steps is None else 1 - torch.exp(-L * steps)
    F[int(torch.tensor(count - 1e-9).ceil()) :] = 0
    X0 = sum(k * d for k, d in zip(w, D)) / (1 if start == "sum" else sum(w))
    H = sum(k * d @ g for k, d, g in zip(w, D, G))
    return X0 - X0 @ V * F @ V.T + H @ V * (F / L) @ V.T


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, "auto"])
@pytest.mark.parametrize("start", ["sum", "mean"])
@pytest.mark.parametrize("steps", [None, 0.0, 3.0])
def test_swudi_is_its_formula(share: float | str, start: str, steps: float | None) -> None:
    for layer in make_layers((2, 4, 3), {"l": (9, 20), "m": (20, 12)}, weights=(1.0, 0.5, 0.7)):
        merged = sm.wudi(share, start, steps)(layer)  # type: ignore[arg-type]
        assert error(merged.dense(), swudi(layer, share, start, steps)) < 1e-8
        assert merged.rank <= 9


def test_the_whole_spectrum_all_the_way_is_wudi() -> None:
    for layer in make_layers((2, 4, 3)):
        wanted = sm.wudi()(layer).dense()
        assert torch.equal(sm.wudi(1.0, "mean")(layer).dense(), wanted)
        assert error(sm.wudi(steps=1e9)(layer).dense(), wanted) < 1e-7
        start = sm.task_arithmetic()(layer).dense()
        assert error(sm.wudi(steps=0)(layer).dense(), start) < 1e-10


def test_wrong_arguments_of_swudi_are_named() -> None:
    for arguments in ({"share": 0.0}, {"share": 2.0}, {"share": "all"}, {"steps": -1.0}):
        with pytest.raises(MethodError):
            sm.wudi(**arguments)
    layer = make_layers([2, 2], weights=[1.0, -1.0])[0]
    with pytest.raises(MethodError, match="sum to zero"):
        sm.wudi(0.5, "mean")(layer)
    assert repr(sm.parse(repr(sm.wudi("auto", steps=2.0)))) == repr(sm.wudi("auto", steps=2.0))
