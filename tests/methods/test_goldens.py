"""Agreement with the numbers of the official implementations (see goldens/README.md).
`pytest -s` prints the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sapmerge as sm
from sapmerge.core.lowrank import truncate
from tests import oracles
from tests.conftest import changed, error, run

HERE = Path(__file__).parents[1] / "goldens"
INDEX = json.loads((HERE / "index.json").read_text())
ENTRIES = {entry["key"]: entry for entry in INDEX["entries"]}
FILES = {path.name: load_file(path) for path in HERE.glob("*.safetensors")}
TOLERANCE = 1e-5

# Goldens that our methods do not reproduce, and why. Each reason is tested below where it can be.
DEVIATES = {
    "ties/*dis-sum*": "variant not offered as a method; Chain(..., ElectSign(), Sum()) gives it "
    "(tested)",
    "ties/*dis-max*": "variant not offered as a method; a plain function as merger gives it "
    "(tested)",
    "ties/*normmass*": "election by squared shares of the norm is not offered; a plain transform "
    "gives it (tested)",
    "peft/ties_svd/*": "PEFT elects without the weights and divides by the number of agreeing "
    "adapters (tested)",
    "peft/dare_ties_svd/*": "as peft/ties_svd (tested)",
    "peft/linear/*": "merges A and B separately, so cross terms B_i A_j enter (tested)",
    "peft/ties/*": "prunes and averages A and B separately: another function of the adapters "
    "(tested)",
    "peft/magnitude_prune/*": "prunes and averages A and B separately: another function of the "
    "adapters (tested)",
    "peft/cat_rslora/*": "PEFT's merged adapter keeps use_rslora, so it is sqrt(sum r) too large "
    "(tested)",
}


def layers_of(entry: dict, names: list[str] | None = None) -> list[sm.Layer]:
    """The input set of an entry as float64 layers, alpha and rsLoRA folded in as PEFT does."""
    name, parameters = entry["set"], entry["hyperparameters"]
    weights = tuple(float(w) for w in parameters.get("weights", parameters.get("weight", ())))
    inputs, layers = FILES["inputs.safetensors"], []
    for layer in names or INDEX["input_sets"][name]["layers"]:
        updates: list[sm.Update] = []
        for k in range(3):
            if f"{name}/t{k}/{layer}/dW" in inputs:
                updates.append(sm.Dense(inputs[f"{name}/t{k}/{layer}/dW"].double()))
                continue
            A, B = (inputs[f"{name}/t{k}/{layer}/{part}"].double() for part in "AB")
            alpha = parameters.get("lora_alpha", [A.shape[0]] * 3)[k]
            rank = math.sqrt(A.shape[0]) if parameters.get("use_rslora") else A.shape[0]
            updates.append(sm.LowRank(B * (alpha / rank), A))
        labels = tuple(f"t{k}" for k in range(3))
        layers.append(sm.Layer(layer, tuple(updates), adapters=labels, weights=weights))
    return layers


def output(entry: dict, name: str) -> Tensor:
    return FILES[entry["file"]][entry["outputs"][name]]


def compare(
    entry: dict, method: sm.Method, scale: float = 1.0, rank: int | None = None, suffix: str = "dW"
) -> float:
    """The worst relative error over the layers of an entry."""
    layers, worst = layers_of(entry), 0.0
    for name, update in run(method, layers).items():
        if rank is not None:
            update = truncate(update, rank, rank)[0]
        worst = max(worst, error(update.dense() * scale, output(entry, f"{name}/{suffix}")))
    return worst


def same_count(share: float, sizes: list[int]) -> float:
    """The density under which floor(density n) equals the official int(share n) + 1 for every n."""
    if share == 1:
        return 1.0
    density = max((int(size * share) + 1) / size for size in sizes)
    assert all(oracles.count(density, size) == int(size * share) + 1 for size in sizes)
    return density


def recorded(masks: dict[tuple[str, str], Tensor]) -> tuple[Callable, Callable]:
    """A scorer and a mask builder, as plain functions, that replay recorded masks:
    (adapter, layer) -> what is kept.
    """

    def scorer(values: Tensor, stats: sm.Stats) -> Tensor:
        return masks[stats.adapter, stats.layer].to(values.dtype)

    def mask(scores: Tensor) -> Tensor:
        return scores > 0

    return scorer, mask


def names(entry: dict) -> list[str]:
    return list(INDEX["input_sets"][entry["set"]]["layers"])


def official_ties(entry: dict, *tail: Callable) -> sm.Method:
    """Trim as the TIES code does, over the whole adapter; then `tail`."""
    density = same_count(entry["hyperparameters"]["K"] / 100, [2 * 24 * 16])
    return sm.Chain(sm.Prune(sm.Magnitude(), sm.TopFraction(density, scope="adapter")), *tail)


def method_of(entry: dict) -> tuple[sm.Method, float, int | None]:
    """(our method, scale, rank of the output) that should reproduce an entry."""
    source, name = entry["key"].split("/")[:2]
    p = entry["hyperparameters"]
    rank: int | None = None
    if source == "ties":
        if name == "task_arithmetic":
            return sm.task_arithmetic(), 1.0, None
        return sm.ties(same_count(p["K"] / 100, [768]), scope="adapter"), p["lambda_"], None
    if source == "knots":
        lam = p["scaling_coeffs"]
        if name == "knots_tv":
            return sm.In(sm.SharedBasis(), sm.task_arithmetic()), lam, None
        if name == "vector_tv":
            return sm.task_arithmetic(), lam, None
        if name == "knots_dare_ties":
            p_drop = p["dare_pruning_coeffs"]
            masks = {
                (f"t{k}", n): output(entry, f"mask/t{k}/{n}")
                for k in range(3)
                for n in names(entry)
            }
            prune = sm.Prune(*recorded(masks), sm.Divide(1 - p_drop))
            return (
                sm.In(sm.SharedBasis(), sm.Chain(prune, sm.ElectSign(), sm.DisjointMean())),
                lam,
                None,
            )
        share = p["topK"] / 100
        if name.startswith("knots"):
            return sm.knots(same_count(share, [12 * (16 + 24)])), lam, None
        return sm.ties(same_count(share, [768]), scope="adapter"), lam, None
    if source == "core_space":
        space, rule = name.split("_")[:2]
        sizes = {"core": [144], "full": [384], "knots": [12 * 16, 12 * 24]}[space]
        inner = {
            "sum": sm.task_arithmetic,
            "mean": sm.mean,
            "ties": lambda: sm.ties(same_count(p["topK"] / 100, sizes)),
        }[rule]()
        if space == "core":
            return sm.core_space(inner, balance=False), 1.0, None
        return (inner if space == "full" else sm.In(sm.SharedBasis(scaled=False), inner)), 1.0, None
    if source == "peft":
        if name.startswith("svd_rank"):
            return sm.task_arithmetic(), 1.0, p["svd_rank"]
        rank = None if name == "cat" else max(p["ranks"])
        if name in ("svd", "cat"):
            return sm.task_arithmetic(), 1.0, rank
        if name == "magnitude_prune_svd":
            return sm.magnitude_prune(p["density"]), 1.0, rank
        if name == "ties_svd":
            return sm.ties(p["density"]), 1.0, rank
        prune = sm.Prune(*recorded(peft_masks(entry)), sm.Divide(p["density"]))
        if name == "dare_linear_svd":
            return sm.Chain(prune, sm.Sum()), 1.0, rank
        return sm.Chain(prune, sm.ElectSign(), sm.DisjointMean()), 1.0, rank
    if source == "mergekit":
        if name == "task_arithmetic":
            return sm.task_arithmetic(), 1.0, None
        if name.startswith("ties"):
            return sm.ties(p["density"]), 1.0, None
        masks = {
            (f"t{k}", n): output(entry, f"{n}/mask_t{k}") for k in range(3) for n in names(entry)
        }
        # mergekit's rescale matches the sum of magnitudes
        prune = sm.Prune(*recorded(masks), sm.MatchNorm(p=1))
        elect = (sm.ElectSign(),) if name.startswith("dare_ties") else ()
        # normalize is off by default: a sum, not a mean
        return (
            sm.Chain(prune, *elect, sm.Sum()),
            1.0,
            None,
        )
    raise AssertionError(entry["key"])


def peft_masks(entry: dict) -> dict[tuple[str, str], Tensor]:
    """PEFT draws the masks layer by layer, all adapters of a layer in turn."""
    return {
        (f"t{k}", n): output(entry, f"mask{3 * i + k}")
        for i, n in enumerate(names(entry))
        for k in range(3)
    }


def deviates(key: str) -> bool:
    return any(fnmatch(key, pattern) for pattern in DEVIATES)


EXACT = [
    key
    for key in ENTRIES
    if not deviates(key)
    and not key.startswith("mergelm/")
    and key != "ties/ties/unit/top50_dis-mean"
]
TABLE: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _table():
    """Print method, entries, worst error at the end (`pytest -s`)."""
    yield
    rows: dict[str, list[float]] = {}
    for key, worst in TABLE.items():
        parts = key.split("/")
        name = parts[2] if parts[0] == parts[1] else parts[1]
        rows.setdefault(f"{parts[0]}: {name if parts[0] != 'ties' else parts[-1]}", []).append(
            worst
        )
    print("\n{:44s} entries  worst".format("source: method"))
    for row, errors in sorted(rows.items()):
        print(f"{row:44s} {len(errors):7d}  {max(errors):.1e}")


def check(key: str, worst: float) -> None:
    TABLE[key] = worst
    assert worst <= TOLERANCE, f"{key}: {worst:.2e}"


@pytest.mark.parametrize("key", EXACT)
def test_official_numbers(key: str) -> None:
    entry = ENTRIES[key]
    method, scale, rank = method_of(entry)
    check(key, compare(entry, method, scale, rank))


@pytest.mark.parametrize("key", [key for key in ENTRIES if key.startswith("mergelm/")])
def test_mergelm_sparsifies_one_task_vector(key: str) -> None:
    """MergeLM's goldens are the pruned task vectors before the sum:
    our methods with one adapter.
    """
    entry, worst = ENTRIES[key], 0.0
    rate = entry["hyperparameters"]["mask_rate"]
    for layer in layers_of(entry):
        size = layer.shape[0] * layer.shape[1]
        for k, update in enumerate(layer):
            one = sm.Layer(layer.name, (update,), adapters=(f"t{k}",))
            if key.startswith("mergelm/dare"):
                keep = ~output(entry, f"t{k}/{layer.name}/dropmask").bool()
                prune = sm.Prune(*recorded({(f"t{k}", layer.name): keep}), sm.Divide(1 - rate))
            else:
                density = (size - int(rate * size)) / size
                prune = sm.Prune(sm.Magnitude(), sm.TopFraction(density), sm.Divide(1 - rate))
            got = sm.Chain(prune, sm.Sum())(one).dense()
            worst = max(worst, error(got, output(entry, f"t{k}/{layer.name}/out")))
    check(key, worst)


def test_official_ties_on_a_vector_with_a_tie() -> None:
    """A column of zeros, opposite entries, and equal magnitudes at the cut."""
    entry = ENTRIES["ties/ties/unit/top50_dis-mean"]
    vectors = output(entry, "in").double()
    layer = sm.Layer("v", tuple(sm.Dense(vector[None]) for vector in vectors))
    method = sm.ties(same_count(0.5, [6]), scope="adapter")
    merged = run(method, [layer])["v"].dense()[0]
    torch.testing.assert_close(merged, output(entry, "out").double())
    trimmed = sm.prepare(method.steps[0], [layer])(layer)
    torch.testing.assert_close(
        torch.cat([u.dense() for u in trimmed]), output(entry, "trimmed").double()
    )


@pytest.mark.parametrize("key", [k for k, e in ENTRIES.items() if "kept_per_task" in e["outputs"]])
def test_official_kept_counts(key: str) -> None:
    """The same number of entries survives in every adapter, over all its layers."""
    entry = ENTRIES[key]
    layers = layers_of(entry)
    prune = sm.prepare(official_ties(entry, sm.Sum()), layers).steps[0]
    kept = torch.zeros(3, dtype=torch.int64)
    for layer in layers:
        kept += torch.tensor([int((update.dense() != 0).sum()) for update in prune(layer)])
    assert kept.tolist() == output(entry, "kept_per_task").tolist()


# --- the entries that deviate, each with its reason
# ----------------------------------------------------------------------------------------


def test_every_deviation_is_named_and_used() -> None:
    assert all(any(fnmatch(key, pattern) for key in ENTRIES) for pattern in DEVIATES)
    assert len(EXACT) + sum(deviates(key) for key in ENTRIES) + 5 + 1 == len(ENTRIES)


def keep_largest(layer: sm.Layer) -> sm.Update:
    """The entry of largest magnitude among the adapters that agree."""
    stack = torch.stack([update.dense() for update in layer])
    return sm.Dense(stack.gather(0, stack.abs().argmax(0, keepdim=True))[0])


@pytest.mark.parametrize(
    "key", [k for k in ENTRIES if k.startswith("ties/ties/") and ("sum_" in k or "max_" in k)]
)
def test_other_disjoint_merges_are_other_mergers(key: str) -> None:
    merger = sm.Sum() if "dis-sum" in key else keep_largest
    check(key, compare(ENTRIES[key], official_ties(ENTRIES[key], sm.ElectSign(), merger)))


@pytest.mark.parametrize("key", [k for k in ENTRIES if "normmass" in k])
def test_normmass_is_a_plain_transform(key: str) -> None:
    """sign(sum_k sign(D_k) D_k^2 / ||D_k||^2), with the norm of the whole trimmed adapter."""
    entry = ENTRIES[key]
    layers = layers_of(entry)
    density = same_count(0.2, [768])
    model = [[update.dense().numpy() for update in layer] for layer in layers]
    norms = [oracles.norm(oracles.trim_all(list(adapter), density)) for adapter in zip(*model)]

    def elect(layer: sm.Layer) -> sm.Layer:
        shares = [u.dense().abs() * u.dense() / size**2 for u, size in zip(layer, norms)]
        sign = torch.stack(shares).sum(0).sign()
        return layer.with_updates([sm.Dense(u.dense() * (u.dense().sign() == sign)) for u in layer])

    check(key, compare(entry, official_ties(entry, elect, sm.DisjointMean())))


@pytest.mark.parametrize(
    "key", [k for k in ENTRIES if k.startswith(("peft/ties_svd", "peft/dare_ties_svd"))]
)
def test_peft_elects_without_weights_and_divides_by_the_count(key: str) -> None:
    entry = ENTRIES[key]
    method, scale, rank = method_of(entry)
    assert compare(entry, method, scale, rank) > 0.1
    weights = torch.tensor(entry["hyperparameters"]["weights"], dtype=torch.float64)

    def unweighted(layer: sm.Layer) -> sm.Layer:
        return changed(layer, weights=(1.0,) * len(layer))

    def divide_by_count(layer: sm.Layer) -> sm.Update:
        stack = torch.stack([update.dense() for update in layer])
        return sm.Dense((weights[:, None, None] * stack).sum(0) / (stack != 0).sum(0).clamp(min=1))

    check(
        key, compare(entry, sm.Chain(unweighted, *method.steps[:-1], divide_by_count), scale, rank)
    )


FACTORWISE = ("peft/linear/", "peft/ties/", "peft/magnitude_prune/")


@pytest.mark.parametrize("key", [key for key in ENTRIES if key.startswith(FACTORWISE)])
def test_peft_merges_factors_separately(key: str) -> None:
    """With A_k and B_k scaled by sqrt(|w s|), sign on one side,
    PEFT's rule on the As times its rule on the Bs.
    """
    from peft.utils import merge_utils

    entry = ENTRIES[key]
    p, inputs = entry["hyperparameters"], FILES["inputs.safetensors"]
    rule = p["combination_type"]
    for layer in names(entry):
        merged = {}
        for part in "AB":
            weights = []
            for w, alpha, rank in zip(p["weights"], p["lora_alpha"], p["ranks"]):
                weights.append(
                    math.copysign(math.sqrt(abs(w) * alpha / rank), w if part == "A" else 1.0)
                )
            factors = [inputs[f"{entry['set']}/t{k}/{layer}/{part}"] for k in range(3)]
            if rule == "linear":
                merged[part] = merge_utils.task_arithmetic(factors, torch.tensor(weights))
            else:
                merged[part] = getattr(merge_utils, rule)(
                    factors, torch.tensor(weights), p["density"]
                )
        wanted = output(entry, f"{layer}/dW")
        assert error(merged["B"] @ merged["A"], wanted) <= TOLERANCE
        sums = sum(
            w * u.dense()
            for w, u in zip(p["weights"], next(x for x in layers_of(entry) if x.name == layer))
        )
        assert error(sums, wanted) > 0.1


def test_peft_rslora_sum_is_too_large() -> None:
    entry = ENTRIES["peft/cat_rslora/s3"]
    layers = layers_of(entry)
    for name, update in run(sm.task_arithmetic(), layers).items():
        assert error(update.dense(), output(entry, f"{name}/true_sum")) <= TOLERANCE
        assert error(update.dense() * math.sqrt(12), output(entry, f"{name}/dW")) <= TOLERANCE


def test_oracles_agree_with_the_official_numbers() -> None:
    """The reference formulas of the law tests are held to the same numbers."""

    def worst(key: str, merged: list[np.ndarray], scale: float = 1.0) -> float:
        entry = ENTRIES[key]
        return max(
            error(torch.from_numpy(m) * scale, output(entry, f"{n}/dW"))
            for n, m in zip(names(entry), merged)
        )

    layers = layers_of(ENTRIES["ties/ties/s3/top20_dis-mean_mass"])
    model = [[update.dense().numpy() for update in layer] for layer in layers]
    factors = [[(u.B.numpy(), u.A.numpy()) for u in layer] for layer in layers]
    assert (
        worst("ties/ties/s3/top20_dis-mean_mass", oracles.ties(model, 154 / 768, scope="adapter"))
        < TOLERANCE
    )
    assert worst("core_space/full_ties_k20/s3", oracles.ties(model, 77 / 384)) < TOLERANCE
    weighted = oracles.ties(model, 0.2, weights=[1.0, 0.5, 0.7])
    assert worst("mergekit/ties_d0.2/s3/w1-0.5-0.7", weighted) < TOLERANCE
    assert worst("knots/knots_ties_top20/s3", oracles.knots(model, 97 / 480), 0.6) < TOLERANCE
    assert worst("core_space/core_ties_k20/s3", oracles.core_ties(factors, 29 / 144)) < TOLERANCE
    assert (
        worst("core_space/knots_ties_k100/s3", oracles.knots(model, 1.0, scaled=False)) < TOLERANCE
    )
