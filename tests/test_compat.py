"""add_weighted_adapter: PEFT is the oracle where it is right (svd, cat),
the formula on the updates elsewhere.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.compat import COMBINATION_TYPES, add_weighted_adapter
from sapmerge.errors import MethodError, ModelMismatchError, OutputExistsError, SapmergeWarning
from tests import oracles
from tests.conftest import error
from tests.models import KINDS, Zoo, deltas, lora, matrices, quietly
from tests.versions import needs_peft_21

SUMS = ("linear", "cat", "svd")
PRUNING = [name for name in COMBINATION_TYPES if name not in SUMS]
WEIGHTS = [1.0, -0.5, 0.7]


@pytest.fixture(autouse=True)
def _energy_may_be_lost() -> Iterator[None]:
    """A dense rule cut to a small rank loses energy, and says so; that is tested once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the stored adapter keeps")
        yield


def model_with(
    ranks: Sequence[int] = (2, 4, 3),
    targets: Sequence[Sequence[str]] = (KINDS, KINDS, KINDS),
    alphas: Sequence[float] = (4, 8, 1),
    **settings: Any,
) -> PeftModel:
    """A model with adapters a0, a1, ... that PEFT made."""
    model: Any = None
    for k, (rank, names, alpha) in enumerate(zip(ranks, targets, alphas)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names), **settings)
        if model is None:
            model = quietly(get_peft_model, Zoo(), config, adapter_name="a0")
        else:
            quietly(model.add_adapter, f"a{k}", config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def merge_with(
    model: PeftModel, combination_type: str, name: str = "m", adapters: int = 3, **options: Any
) -> None:
    if combination_type not in SUMS:
        options.setdefault("density", 0.5)
    names = [f"a{k}" for k in range(adapters)]
    quietly(
        add_weighted_adapter, model, names, WEIGHTS[:adapters], name, combination_type, **options
    )


def updates(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    return matrices(deltas(model, adapter), model.base_model.model)


def largest(model: PeftModel, adapter: str, module: str) -> int:
    layer = model.base_model.model.get_submodule(module)
    return layer.r[adapter]


def expected(model: PeftModel, rule: str, module: str) -> Tensor:
    """The update that the table of the docstring promises, from PEFT's own deltas;
    an adapter without it is zero.
    """
    found = [updates(model, f"a{k}") for k in range(3)]
    shape = next(f[module] for f in found if module in f).shape
    stack = [f[module].numpy() if module in f else np.zeros(shape) for f in found]
    if rule in SUMS:
        return torch.from_numpy(oracles.weighted_sum(stack, WEIGHTS))
    if rule == "magnitude_prune":
        return torch.from_numpy(
            oracles.weighted_sum([oracles.trim(m, 0.5) for m in stack], WEIGHTS)
        )
    return torch.from_numpy(oracles.ties([stack], 0.5, WEIGHTS)[0])


def test_signature_and_types_are_those_of_peft() -> None:
    theirs = inspect.signature(LoraModel.add_weighted_adapter).parameters
    ours = inspect.signature(add_weighted_adapter).parameters
    assert list(ours)[1:] == [*list(theirs)[1:], "modules_to_save"]
    added = ("peft_model", "modules_to_save")
    assert {n: p.default for n, p in ours.items() if n not in added} == {
        n: p.default for n, p in theirs.items() if n != "self"
    }
    listed = inspect.getdoc(LoraModel.add_weighted_adapter) or ""
    assert all(f"`{name}`" in listed for name in COMBINATION_TYPES)
    assert len(COMBINATION_TYPES) == 11


@needs_peft_21
@pytest.mark.parametrize("svd_rank", [None, 1, 3, 8])
def test_svd_is_that_of_peft(svd_rank: int | None) -> None:
    # PEFT fails at the SVD of 1-D and 3-D kernels, and at ranks above those of a convolution (5
    # here).
    kinds = [
        kind
        for kind in KINDS
        if kind not in ("wave", "video") and (kind != "image" or svd_rank != 8)
    ]
    model = model_with(targets=[kinds] * 3)
    merge_with(model, "svd", svd_rank=svd_rank)
    quietly(
        model.add_weighted_adapter, ["a0", "a1", "a2"], WEIGHTS, "peft", "svd", svd_rank=svd_rank
    )
    ours, theirs = updates(model, "m"), updates(model, "peft")
    assert ours.keys() == theirs.keys()
    for module in theirs:
        assert error(ours[module], theirs[module]) < 1e-5, module
        assert largest(model, "m", module) == min(svd_rank or 4, *ours[module].shape)


def test_cat_is_that_of_peft() -> None:
    model = model_with()
    merge_with(model, "cat")
    quietly(model.add_weighted_adapter, ["a0", "a1", "a2"], WEIGHTS, "peft", "cat")
    ours, theirs = updates(model, "m"), updates(model, "peft")
    assert ours.keys() == theirs.keys()
    for module in theirs:
        assert error(ours[module], theirs[module]) < 1e-5, module


@pytest.mark.parametrize("combination_type", COMBINATION_TYPES)
@pytest.mark.parametrize("svd_rank", [None, 2])
def test_every_type_is_its_formula(combination_type: str, svd_rank: int | None) -> None:
    """Ranks 2, 4, 3, an adapter without some modules, alpha other than r, a negative weight."""
    if combination_type.startswith("dare"):
        pytest.skip("random; below")
    model = model_with(targets=[KINDS, ("q", "gpt", "image"), KINDS])
    before = {name: updates(model, name) for name in ("a0", "a1", "a2")}
    cuts = combination_type.endswith("svd")
    merge_with(model, combination_type, **({"svd_rank": svd_rank} if cuts else {}))
    for module, update in updates(model, "m").items():
        wanted = expected(model, combination_type.removesuffix("_svd"), module)
        if combination_type not in ("linear", "cat"):
            wanted = torch.from_numpy(
                oracles.best_rank(wanted.numpy(), (svd_rank if cuts else None) or 4)
            )
        assert error(update, wanted) < 1e-5, module
    for name, tensors in before.items():
        assert all(
            torch.equal(tensor, updates(model, name)[module]) for module, tensor in tensors.items()
        )


@pytest.mark.parametrize(
    "combination_type", [name for name in COMBINATION_TYPES if name.startswith("dare")]
)
def test_dare_draws_the_same_masks_in_every_run_and_is_unbiased_in_size(
    combination_type: str,
) -> None:
    model = model_with()
    merge_with(model, combination_type, "one", svd_rank=None)
    torch.manual_seed(99)
    merge_with(model, combination_type, "two", svd_rank=None)
    one, two = updates(model, "one"), updates(model, "two")
    assert all(torch.equal(one[module], two[module]) for module in one)
    method = sm.dare(0.5) if "linear" in combination_type else sm.dare_ties(0.5)
    merged = sm.merge(["a0", "a1", "a2"], model=model, method=method, weights=WEIGHTS)
    for module, update in merged.updates():
        cut = torch.from_numpy(oracles.best_rank(update.dense().double().numpy(), 4))
        assert error(one[module], cut) < 1e-5, module


def test_linear_has_no_cross_terms() -> None:
    """What PEFT makes of `linear` is another update altogether."""
    kinds = ("q", "enc.q")
    model = model_with([4, 4, 4], [kinds] * 3, [4, 4, 4])
    merge_with(model, "linear")
    quietly(model.add_weighted_adapter, ["a0", "a1", "a2"], WEIGHTS, "peft", "linear")
    for module in kinds:
        assert error(updates(model, "m")[module], expected(model, "linear", module)) < 1e-5
        assert error(updates(model, "peft")[module], expected(model, "linear", module)) > 0.5


def test_rslora_is_folded_in_and_gone() -> None:
    model = model_with(targets=[("q",)] * 3, use_rslora=True)
    merge_with(model, "cat")
    assert error(updates(model, "m")["q"], expected(model, "cat", "q")) < 1e-5
    assert not model.peft_config["m"].use_rslora


def test_one_adapter_is_treated_by_the_rule_that_was_asked() -> None:
    model = model_with(targets=[("q",)] * 3)
    merge_with(model, "ties", adapters=1)
    found = updates(model, "a0")["q"].numpy()
    assert (
        error(
            updates(model, "m")["q"],
            torch.from_numpy(oracles.best_rank(oracles.trim(found, 0.5), 2)),
        )
        < 1e-5
    )


def test_the_merged_adapter_runs() -> None:
    model = model_with()
    merge_with(model, "ties", density=0.3, majority_sign_method="frequency")
    model.set_adapter("m")
    assert torch.isfinite(model(torch.arange(15).reshape(3, 5) % 20)).all()
    assert add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "none", "cat") is None


def test_lost_energy_is_said() -> None:
    model = model_with(targets=[("q",)] * 3)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with pytest.warns(SapmergeWarning, match="energy"):
            add_weighted_adapter(
                model, ["a0", "a1", "a2"], [1.0] * 3, "m", "ties_svd", density=0.2, svd_rank=1
            )


@pytest.mark.parametrize(
    ("options", "raised", "message"),
    [
        ({"combination_type": "ties_swd"}, MethodError, "magnitude_prune_svd"),
        ({"combination_type": "linear_svd"}, MethodError, "one of linear, cat, svd"),
        ({"adapter_name": "a1"}, OutputExistsError, "already has an adapter 'a1'"),
        ({"weights": [1.0]}, MethodError, "2 adapters .* got 1"),
        ({"weights": [1.0, 2.0, 3.0]}, MethodError, "2 adapters .* got 3"),
        ({"weights": [1.0, float("nan")]}, MethodError, "finite"),
        ({"svd_clamp": 0.99}, MethodError, "svd_clamp is not supported"),
        ({"combination_type": "ties"}, MethodError, "needs density"),
        ({"combination_type": "ties", "density": 20}, MethodError, "write 0.2"),
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "mass"},
            MethodError,
            "majority_sign",
        ),
        ({"adapters": ["a0", "b"]}, MethodError, "no adapter .*b"),
        ({"adapters": []}, MethodError, "list of names"),
        ({"adapters": "a0"}, MethodError, "list of names"),
        ({"svd_rank": 0}, MethodError, "rank"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_added(
    options: dict, raised: type, message: str
) -> None:
    model = model_with([2, 2], [("q",)] * 2, [2, 2])
    call = {"adapters": ["a0", "a1"], "weights": [1.0, 1.0], "adapter_name": "m", **options}
    with pytest.raises(raised, match=message):
        add_weighted_adapter(model, **call)
    assert list(model.peft_config) == ["a0", "a1"]


def test_only_a_peft_model_will_do() -> None:
    with pytest.raises(ModelMismatchError, match="Linear"):
        add_weighted_adapter(nn.Linear(2, 2), ["a"], [1.0], "m")


@pytest.mark.parametrize(
    "options",
    [
        {"combination_type": "linear", "svd_rank": 2},
        {"combination_type": "ties", "density": 0.9, "svd_rank": 2},
        {"combination_type": "svd", "density": 0.5},
        {"combination_type": "svd", "majority_sign_method": "frequency"},
        {"combination_type": "svd", "svd_driver": "gesvd"},
    ],
)
def test_an_argument_that_is_not_read_is_said(options: dict) -> None:
    model = model_with([2, 2], [("q",)] * 2, [2, 2])
    with pytest.warns(SapmergeWarning, match="has no effect"):
        add_weighted_adapter(model, ["a0", "a1"], [1.0, 1.0], "m", **options)


def test_adapters_with_heads() -> None:
    """The heads merge as `merge` does it; PEFT has no say in them."""
    model = lora(Zoo(), 1, targets=["q"], modules_to_save=["head"])
    settings = LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])
    quietly(model.add_adapter, "other", settings)
    torch.nn.init.ones_(model.head.modules_to_save["other"].weight)
    with pytest.raises(MethodError, match="modules_to_save"):
        add_weighted_adapter(model, ["default", "other"], [1.0, 1.0], "merged", "cat")
    add_weighted_adapter(
        model, ["default", "other"], [1.0, 1.0], "merged", "cat", modules_to_save="mean"
    )
    saved = model.head.modules_to_save
    wanted = (saved["default"].weight + saved["other"].weight) / 2
    assert torch.allclose(saved["merged"].weight, wanted, atol=1e-6)
