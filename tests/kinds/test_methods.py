"""Every method on every kind of adapter: the merged model is the base plus what the method makes
of the updates that PEFT tells, matrix by matrix.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from torch import Tensor

import sapmerge as sm
from sapmerge import methods

from . import helpers as h
from .helpers import QV, train
from .test_kinds import EXPERTS

ANCHORED = {"fisher", "regmean", "sap", "sap_original", "tune"}
DRAWN = {"dare", "dare_ties", "della"}
"""Their draws depend on the names of modules and on the bytes of the files."""
FACTORS = {"factor_average", "lora_lego", "robustmerge"}
"""Their results depend on how an update is split into factors, which PEFT's does not tell."""
METHODS = sorted(
    name
    for name in set(methods.__all__) - ANCHORED - DRAWN - FACTORS
    if inspect.isfunction(getattr(sm, name))
)
KINDS: dict[str, tuple[h.Make, dict[str, Any]]] = {
    "attention": (h.tower, {"target_modules": ["attn", "mlp.0"]}),
    "experts": (h.qwen_moe, {"target_modules": QV, "target_parameters": EXPERTS}),
    "dora": (h.llama, {"target_modules": QV, "use_dora": True}),
    "conv1d": (h.gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "adalora": (
        h.llama,
        {"config": AdaLoraConfig, "target_modules": QV, "init_r": 3, "total_step": 10},
    ),
}
Deltas = list[dict[str, Tensor]]


@pytest.fixture(scope="module", params=KINDS)
def kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[h.Make, list[Path], dict[str, Tensor], Deltas]:
    """How to make the base, three adapters, the base's tensors, and the moves of each adapter."""
    make, settings = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kind")
    rank = {} if "config" in settings else {"r": 3}
    paths = [train(folder, make, k, **rank, **settings) for k in (1, 2, 3)]
    base = h.state(make())
    moved = [{key: value - base[key] for key, value in h.unloaded(make, p).items()} for p in paths]
    return make, paths, base, moved


def transposed(make: h.Make) -> set[str]:
    """Weights that are stored as (inputs, outputs)."""
    return {f"{n}.weight" for n, m in make().named_modules() if type(m).__name__ == "Conv1D"}


def layers_of(make: h.Make, moved: Deltas) -> Iterator[tuple[str, int | None, sm.Layer]]:
    """(tensor, expert or None, its layer) of every matrix that an adapter moves."""
    for key in moved[0]:
        parts = [deltas[key] for deltas in moved]
        if parts[0].ndim < 2 or not any(float(part.norm()) > 1e-6 for part in parts):
            continue
        for expert in range(len(parts[0])) if parts[0].ndim == 3 else [None]:
            matrices = [part if expert is None else part[expert] for part in parts]
            if key in transposed(make):
                matrices = [matrix.T for matrix in matrices]
            layer = sm.Layer(f"{key}.{expert}", [factored(matrix) for matrix in matrices])
            yield key, expert, layer


def factored(matrix: Tensor) -> sm.LowRank | sm.Dense:
    """In factors where the rank is that of a LoRA; DoRA's update has full rank."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((sigma > 1e-5 * sigma[0]).sum())
    if rank > min(matrix.shape) // 2:
        return sm.Dense(matrix)
    return sm.LowRank(U[:, :rank] * sigma[:rank], Vh[:rank])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_of_a_kind_what_it_makes_of_its_updates(
    name: str, kind: tuple[h.Make, list[Path], dict[str, Tensor], Deltas]
) -> None:
    make, paths, base, moved = kind
    if name == "slerp":
        paths, moved = paths[:2], moved[:2]
    method = getattr(sm, name)()
    model = make()
    wanted: Mapping[str, Tensor] = {key: value.clone() for key, value in base.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sm.merge([str(path) for path in paths], model=make(), method=method).apply_to(model)
        found = list(layers_of(make, moved))
        prepared = sm.prepare(method, [layer for _, _, layer in found])
        for key, expert, layer in found:
            update = prepared(layer).dense()
            place = wanted[key] if expert is None else wanted[key][expert]
            place += update.T if key in transposed(make) else update
    for key, value in h.state(model).items():
        if base[key].ndim >= 2:
            size = float((wanted[key] - base[key]).norm())
            error = float((value - wanted[key]).norm())
            assert error <= 2e-3 * max(size, 0.05), f"{key} is off by {error / max(size, 1e-9):.1e}"
