"""DELLA, Breadcrumbs, SCE, TALL masks, PCB, EMR and Model Stock against the numbers of the
official codes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from tests.conftest import error, run
from tests.methods.golden_entries import (
    ENTRIES,
    NAMES,
    TOLERANCE,
    alone,
    flatten,
    keys,
    layers_of,
    output,
    parameters,
    split,
)

TABLE: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _table():
    """Print entries and worst error per method at the end (`pytest -s`)."""
    yield
    rows: dict[str, list[float]] = {}
    for key, worst in TABLE.items():
        rows.setdefault("/".join(key.split("/")[:2]), []).append(worst)
    for row, errors in sorted(rows.items()):
        print(f"{row:44s} {len(errors):3d}  {max(errors):.1e}")


def check(key: str, *pairs: tuple[Tensor, Tensor]) -> None:
    TABLE[key] = max(error(got, wanted) for got, wanted in pairs)
    assert TABLE[key] <= TOLERANCE, f"{key}: {TABLE[key]:.2e}"


def check_merged(key: str, method: sm.Method) -> None:
    check(
        key,
        *(
            (update.dense(), output(key, f"{name}/dW"))
            for name, update in run(method, layers_of(key)).items()
        ),
    )


class _Nothing:
    """Stats for scorers that look at the values only."""


def test_every_entry_is_used() -> None:
    """Names of families; each is a test below."""
    families = {"/".join(key.split("/")[:2]).split("_d0")[0].split("_k")[0] for key in ENTRIES}
    assert families == {
        "della/della_magnitude_sample",
        "della/della_rank_magnitude_layer",
        "della/della_rank_magnitude_row",
        "mergekit/breadcrumbs",
        "mergekit/breadcrumbs_ties",
        "mergekit/della",
        "mergekit/della_linear",
        "mergekit/magnitude_outliers_bug",
        "mergekit/model_stock_fw0",
        "mergekit/model_stock_fw1",
        "mergekit/sce",
        "misc/breadcrumbs",
        "misc/emr",
        "misc/pcb_PCB",
        "misc/pcb_PCB_merge",
        "misc/sce_official",
        "misc/tall",
    }


@pytest.mark.parametrize("key", keys("della/"))
def test_della_chances_and_rescaling(key: str) -> None:
    """Our chances are the recorded ones; with the recorded masks,
    the pruned updates are the official ones.
    """
    p = parameters(key)
    if "magnitude_sample" in key:
        chance = sm.MagnitudeChance(p["density"], p["window_size"])
    else:
        chance = sm.RankChance(
            p["density"],
            p["window_size"],
            scope="row" if key.split("/")[1].endswith("row") else "layer",
        )
    pairs = []
    for layer in layers_of(key):
        for k, update in enumerate(layer):
            prob, mask, out = (
                output(key, f"t{k}/{layer.name}/{what}") for what in ("prob", "mask", "out")
            )
            pairs.append((chance(update.dense(), _Nothing()), prob))
            prune = sm.Prune(
                lambda values, stats, mask=mask: chance(values, stats) * mask, sm.Reciprocal()
            )
            pairs.append((sm.Chain(prune, sm.DisjointMean())(alone(layer, k)).dense(), out))
    check(key, *pairs)


@pytest.mark.parametrize("key", keys("mergekit/della"))
def test_mergekit_della_matches_the_sum_of_magnitudes(key: str) -> None:
    """mergekit does not divide by p: recorded masks, L1 rescaling, then election and mean (or,
    "linear", a sum).
    """
    layers = layers_of(key)
    masks = {(f"t{k}", name): output(key, f"{name}/mask_t{k}") for k in range(3) for name in NAMES}

    def kept(values: Tensor, stats: sm.Stats) -> Tensor:
        return masks[stats.adapter, stats.layer].to(values.dtype)

    prune = sm.Prune(kept, sm.Threshold(0.5), sm.MatchNorm(p=1))
    tail = (sm.Sum(),) if "linear" in key else (sm.ElectSign(), sm.DisjointMean())
    check_merged(key, sm.Chain(prune, *tail))
    p = parameters(key)
    chance = sm.RankChance(p["density"], 2 * p["epsilon"])
    drawn = torch.cat([masks["t0", name].flatten() for name in NAMES]).double()
    expected = torch.cat(
        [chance(layer.updates[0].dense(), _Nothing()).flatten() for layer in layers]
    )
    assert abs(float((drawn - expected).sum())) < 5 * float(
        (expected * (1 - expected)).sum().sqrt()
    )
    assert float((drawn * (expected - expected.mean())).sum()) > 0, "epsilon is half our window"


@pytest.mark.parametrize("key", keys("mergekit/breadcrumbs"))
def test_mergekit_breadcrumbs(key: str) -> None:
    p = parameters(key)
    if "ties" not in key:
        check_merged(key, sm.breadcrumbs(p["density"], p["gamma"]))
    else:
        prune = sm.Prune(sm.Magnitude(), sm.DropOutliers(p["density"], p["gamma"]))
        check_merged(key, sm.Chain(prune, sm.ElectSign(), sm.Sum()))


def test_mergekit_breadcrumbs_empties_tensors_without_outliers() -> None:
    """Where gamma n < 1 nothing is an outlier; mergekit then keeps nothing at all."""
    key = "mergekit/magnitude_outliers_bug"
    assert not output(key, "out").any()
    layer = layers_of(key)[0]
    ours = sm.breadcrumbs(0.5, 0.001)(alone(layer, 0)).dense()
    wanted = sm.magnitude_prune(0.5)(alone(layer, 0)).dense()
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("key", keys("misc/breadcrumbs"))
def test_official_breadcrumbs_prunes_rows(key: str) -> None:
    p = parameters(key)
    method = sm.breadcrumbs(
        p["top_k_keep"],
        p["top_k_remove"],
        scope="row",
        first="drop" if p["remove_first"] else "keep",
    )
    pairs = []
    for layer in layers_of(key):
        pairs += [
            (method(alone(layer, k)).dense(), output(key, f"t{k}/{layer.name}/out"))
            for k in range(3)
        ]
    check(key, *pairs)


@pytest.mark.parametrize("key", keys("mergekit/sce"))
def test_mergekit_sce_is_the_paper(key: str) -> None:
    check_merged(key, sm.sce(parameters(key)["select_topk"]))


@pytest.mark.parametrize("key", keys("misc/sce_official"))
def test_official_sce_selects_for_the_weights_alone(key: str) -> None:
    select = sm.Select(parameters(key)["select_topk"])
    method = sm.Chain(sm.WeighByEnergy(of=select), sm.DisjointMean())
    check_merged(key, method)
    for layer in layers_of(key):
        weighed = sm.WeighByEnergy(of=select)(layer)
        assert (
            error(torch.tensor(weighed.weights), output(key, f"{layer.name}/weights").flatten())
            < TOLERANCE
        )


@pytest.mark.parametrize("key", keys("misc/tall"))
def test_official_consensus(key: str) -> None:
    p, wanted = parameters(key), split(output(key, "consensus_ta"))
    merged = run(sm.consensus_ta(p["tall_mask_lambda"], p["prun_thre_k"]), layers_of(key))
    check(key, *((merged[name].dense(), wanted[name]) for name in NAMES))
    for name, mask in split(output(key, "consensus_mask_k2")).items():
        assert torch.equal(merged[name].dense() != 0, mask.bool())


PCB = {"pcb_PCB_merge": (1e-4, sm.TanhRaw()), "pcb_PCB": (0.01, sm.TanhNormalised())}


@pytest.mark.parametrize("key", keys("misc/pcb"))
def test_official_pcb(key: str) -> None:
    """The ratios are such that n - int((1 - ratio) n) - 1 is our count."""
    p, (clip, inter) = parameters(key), PCB[key.split("/")[1]]
    assert 768 - int((1 - p["pcb_ratio"]) * 768) - 1 == math.floor(p["pcb_ratio"] * 768)
    merged = run(sm.pcb(p["pcb_ratio"], clip, inter=inter), layers_of(key))
    check(key, (flatten(merged) * p["lambda_"], output(key, "merged")))


@pytest.mark.parametrize("key", keys("misc/emr"))
def test_official_emr(key: str) -> None:
    recorded: dict[str, dict[str, object]] = {}
    layers = layers_of(key)
    method, pairs = sm.prepare(sm.emr(), layers), []
    for layer in layers:
        notes = recorded.setdefault(layer.name, {})
        unified = method(
            sm.Layer(layer.name, layer.updates, layer.adapters, record=notes.__setitem__)
        )
        pairs.append((unified.dense(), output(key, f"{layer.name}/unified")))
        scalars = torch.tensor([notes["emr_scalar"][adapter] for adapter in layer.adapters])
        pairs.append((scalars, output(key, "rescalers")))
        masks = output(key, f"{layer.name}/masks").double()
        shares = torch.tensor([notes["emr_mask"][adapter] for adapter in layer.adapters])
        torch.testing.assert_close(shares.double(), masks.flatten(1).mean(1), rtol=1e-6, atol=0)
        for k, update in enumerate(layer):
            restored = sm.Unify.restore(unified, update, float(scalars[k]))
            pairs.append(
                (restored.dense(), unified.dense() * masks[k] * output(key, "rescalers")[k])
            )
    check(key, *pairs)


@pytest.mark.parametrize("key", keys("mergekit/model_stock"))
def test_mergekit_model_stock(key: str) -> None:
    check_merged(key, sm.model_stock(scope="row" if parameters(key)["filter_wise"] else "layer"))
