"""SAP through `merge`: scores, masks, weights and losses against PEFT itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.errors import AnchorError, MethodError, SapmergeWarning
from sapmerge.losses import (
    alignment,
    centered_alignment,
    contrastive,
    language_modeling,
    loss_for,
)
from tests.anchors import models
from tests.conftest import error

LLAVA_VISION = r".*vision_tower.*layers\.0\..*(q_proj|fc1)"
LLAVA_LANGUAGE = r".*language_model.*(v_proj|up_proj)"
CASES = {
    "clip, vision": (models.clip, models.pairs, alignment, [models.VISION_TARGETS] * 2),
    "clip, text": (models.clip, models.pairs, contrastive, [models.TEXT_TARGETS] * 2),
    "clip, one each": (
        models.clip,
        models.pairs,
        alignment,
        [models.VISION_TARGETS, models.TEXT_TARGETS],
    ),
    "clip, both": (models.clip, models.pairs, alignment, [models.BOTH_TARGETS] * 2),
    "llava, vision": (models.llava, models.prompts, language_modeling, [LLAVA_VISION] * 2),
    "llava, language": (models.llava, models.prompts, language_modeling, [LLAVA_LANGUAGE] * 2),
    "llava, both": (
        models.llava,
        models.prompts,
        language_modeling,
        [f"{LLAVA_VISION}|{LLAVA_LANGUAGE}"] * 2,
    ),
}


def peft_gradients(
    peft: Any, adapter: sm.Adapter, batches: list[Any], loss: Any
) -> dict[tuple[str, str], Tensor]:
    """w dL/dw of the LoRA parameters in balanced form, by plain autograd through PEFT."""
    peft = copy.deepcopy(peft)
    parameters: dict[tuple[str, str], nn.Parameter] = {}
    for name, module in adapter.modules.items():
        even = adapter.update(name).balanced
        layer = peft.get_base_model().get_submodule(module.spelled)
        layer.lora_A["default"].weight.data = even.A.clone()
        layer.lora_B["default"].weight.data = even.B / module.scaling
        parameters[name, "A"], parameters[name, "B"] = (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
        )
    for parameter in peft.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    size = [len(batch["input_ids"]) for batch in batches]
    total = sum(n * loss(peft.get_base_model(), batch) for n, batch in zip(size, batches)) / sum(
        size
    )
    grads = torch.autograd.grad(total, list(parameters.values()))
    return {key: (p * g).detach() for (key, p), g in zip(parameters.items(), grads)}


@pytest.mark.parametrize(("build", "batches", "loss", "targets"), CASES.values(), ids=CASES)
def test_scores_equal_autograd_through_peft(
    build: Any, batches: Any, loss: Any, targets: list[Any]
) -> None:
    model, loader = build(), batches()
    adapters, pefts = models.adapters(model, targets)
    spy = models.Spy()
    models.merge(
        adapters,
        loader,
        model,
        loss=loss,
        method=sm.Chain(sm.Prune(spy, sm.TopFraction(0.5), units=sm.Factors()), sm.Mean()),
    )
    seen = 0
    for adapter, peft in zip(adapters, pefts):
        for (name, part), wanted in peft_gradients(peft, adapter, loader, loss).items():
            key = (adapter.label, name, part)
            assert float(wanted.norm()) > 1e-7
            assert error((spy.values[key] * spy.gradient[key]).abs(), wanted.abs()) < 2e-5, key
            seen += 1
    assert seen == len(spy.values)


def halves(loader: list[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    """Every other sample, and the rest."""
    singles = models.singles(loader)
    return [singles[::2], singles[1::2]]


def top(scores: Tensor, density: float) -> Tensor:
    keep = max(1, math.floor(density * scores.numel() + 1e-9))
    out = torch.zeros_like(scores, dtype=torch.bool).flatten()
    out[torch.sort(scores.flatten(), descending=True, stable=True).indices[:keep]] = True
    return out.view(scores.shape)


@pytest.mark.parametrize("density", [0.5, 0.23])
def test_sap_original_step_by_step(density: float) -> None:
    """Scores through PEFT, masks, the norm given back, the mean;
    and what the report says about them.
    """
    model, loader = models.clip(), models.pairs()
    adapters, pefts = models.adapters(
        model, [models.VISION_TARGETS, models.BOTH_TARGETS, models.VISION_TARGETS]
    )
    merged = models.merge(adapters, loader, model, method=sm.sap_original(density=density))
    updates, rows = dict(merged.updates()), {row.name: row for row in merged.report.layers}
    total: dict[str, Any] = dict.fromkeys(updates, 0.0)
    for adapter, peft in zip(adapters, pefts):
        scores = {k: v.abs() for k, v in peft_gradients(peft, adapter, loader, alignment).items()}
        one, other = (
            {k: v.abs() for k, v in peft_gradients(peft, adapter, half, alignment).items()}
            for half in halves(loader)
        )
        for name in adapter.modules:
            even, original = adapter.update(name).balanced, adapter.update(name).dense()
            keep = {part: top(scores[name, part], density) for part in "AB"}
            product = (even.B * keep["B"]) @ (even.A * keep["A"])
            total[name] = total[name] + product * original.norm() / product.norm() / 3
            notes = {key: value[adapter.label] for key, value in rows[name].notes.items()}
            kept = sum(int(mask.sum()) for mask in keep.values())
            assert notes["density"] == kept / sum(mask.numel() for mask in keep.values())
            share = sum(float(scores[name, p][keep[p]].sum()) for p in "AB") / sum(
                float(scores[name, p].sum()) for p in "AB"
            )
            assert notes["score_kept"] == pytest.approx(share, rel=1e-5)
            whole = sum(float(scores[name, part].sum()) for part in "AB")
            assert notes["saliency"] == pytest.approx(whole, rel=1e-4)
            first, second = (
                {p: top(half[name, p], density) for p in "AB"} for half in (one, other)
            )
            both = sum(int((first[p] & second[p]).sum()) for p in "AB")
            assert notes["anchor_stability"] == pytest.approx(both / kept, rel=1e-12)
    assert updates.keys() == total.keys()
    for name, update in updates.items():
        assert error(update.dense(), total[name]) < 1e-5


def test_sap_original_without_pruning_is_the_mean() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(
        model, [models.BOTH_TARGETS, models.VISION_TARGETS, models.TEXT_TARGETS]
    )
    mean = dict(models.merge(adapters, model=model, method=sm.mean()).updates())
    for name, update in models.merge(
        adapters, loader, model, method=sm.sap_original(density=1.0)
    ).updates():
        assert error(update.dense(), mean[name].dense()) < 1e-6


def test_sap_that_prunes_is_the_original_with_its_energy_matched() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(
        model, [models.BOTH_TARGETS, models.VISION_TARGETS, models.TEXT_TARGETS]
    )
    plain = sm.MatchEnergy(sm.sap_original(density=0.6))
    wanted = dict(models.merge(adapters, loader, model, method=plain).updates())
    method = sm.sap(density=0.6)
    for name, update in models.merge(adapters, loader, model, method=method).updates():
        assert error(update.dense(), wanted[name].dense()) < 1e-6


@pytest.mark.parametrize("units", [sm.Factors(), sm.Directions(), sm.Entries()])
def test_sap_keeps_the_count_and_gives_the_norm_back(units: Any) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    method = sm.sap(density=0.7, units=units)
    merged = models.merge(adapters, loader, model, method=method, rank="exact")
    for row in merged.report.layers:
        m, n = row.shape
        for label, rank in zip(("a0", "a1", "a2"), (3, 2, 4)):
            sizes = {"Factors": (rank * m, rank * n), "Directions": (rank,), "Entries": (m * n,)}[
                type(units).__name__
            ]
            kept = sum(max(1, math.floor(0.7 * size + 1e-9)) for size in sizes)
            assert row.notes["density"][label] == pytest.approx(kept / sum(sizes), rel=1e-12)
    norms = [math.sqrt(sum(a.update(name).norm() ** 2 for name in a.modules)) for a in adapters]
    norm = math.sqrt(sum(update.norm() ** 2 for _, update in merged.updates()))
    assert norm == pytest.approx(sum(norms) / len(norms), rel=1e-5)


@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_losses_in_the_report_are_those_of_peft(kind: str, tmp_path: Any) -> None:
    if kind == "clip":
        model, loader, loss, targets = (
            models.clip(),
            models.pairs(),
            alignment,
            [models.BOTH_TARGETS] * 2,
        )
    else:
        model, loader, loss, targets = (
            models.llava(),
            models.prompts(),
            language_modeling,
            [LLAVA_LANGUAGE, LLAVA_VISION],
        )
    adapters, pefts = models.adapters(model, targets)
    merged = models.merge(adapters, loader, model)
    merged.save_pretrained(tmp_path / "out")
    notes = merged.report.notes
    assert notes["anchors"] == sum(len(batch["input_ids"]) for batch in loader)
    assert notes["loss"] == loss.__name__
    wanted = {
        "base model": models.mean_loss(model, loader, loss),
        "a0": models.mean_loss(pefts[0].get_base_model(), loader, loss),
        "a1": models.mean_loss(pefts[1].get_base_model(), loader, loss),
        "merged adapter": models.mean_loss(
            models.load(model, tmp_path / "out").get_base_model(), loader, loss
        ),
    }
    assert dict(notes["anchor loss"]) == pytest.approx(wanted, rel=2e-5)
    assert len({round(value, 5) for value in wanted.values()}) == 4
    loaded = models.load(model, tmp_path / "out")
    for name, update in merged.updates():
        layer = loaded.get_base_model().get_submodule(merged.run.stream.modules[name].spelled)
        assert error(layer.get_delta_weight("default"), update.dense()) < 1e-5


@pytest.mark.parametrize("margin", [0.0, 0.01, math.inf])
@pytest.mark.parametrize("loss", [contrastive, alignment, None])  # None: centered_alignment
def test_weights_by_anchors(loss: Any, margin: float) -> None:
    model, loader = models.clip(), models.pairs((7, 4))
    adapters, pefts = models.adapters(model, [models.BOTH_TARGETS] * 3)
    method = sm.WeighByAnchors(sm.mean(), loss=loss, temperature=0.3, margin=margin)
    merged = models.merge(adapters, loader, model, method=method, weights=[1.0, 2.0, 1.0])
    losses = torch.tensor(
        [models.mean_loss(p.get_base_model(), loader, loss or centered_alignment) for p in pefts]
    )
    shares = torch.softmax(-torch.relu(losses - min(losses) - margin) / 0.3, 0)
    assert (max(shares) - min(shares) < 1e-6) == (margin == math.inf)
    weights = shares * torch.tensor([1.0, 2.0, 1.0])
    assert merged.report.notes["anchor_weights"] == pytest.approx(
        {f"a{k}": float(s) for k, s in enumerate(shares)}, rel=1e-4
    )
    # those of one sign keep their sum
    assert merged.report.weights == pytest.approx(
        {f"a{k}": float(w) for k, w in enumerate(weights * 4 / weights.sum())}, rel=1e-4
    )
    assert not any("anchor_weights" in row.notes for row in merged.report.layers)
    for name, update in merged.updates():
        wanted = sum(w * a.update(name).dense() for w, a in zip(weights, adapters)) / weights.sum()
        assert error(update.dense(), wanted) < 1e-4


def test_weights_by_anchors_around_sap() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    plain = models.merge(adapters, loader, model, method=sm.WeighByAnchors(sm.mean())).report
    method = sm.WeighByAnchors(sm.ScaleByAnchors(sm.sap_original(0.9)))
    around = models.merge(adapters, loader, model, method=method).report
    assert around.notes["anchor_weights"] == plain.notes["anchor_weights"]
    assert {"score_kept", "energy_factor", "length", "losses_by_length"} <= around.notes.keys()
    for row in around.layers:
        assert set(row.notes) == {"score_kept", "anchor_stability", "density", "saliency"}
    for label, kept in around.notes["score_kept"].items():
        rows = [row.notes for row in around.layers if label in row.notes["saliency"]]
        whole = sum(row["saliency"][label] for row in rows)
        parts = sum(row["saliency"][label] * row["score_kept"][label] for row in rows)
        assert kept == pytest.approx(parts / whole)
    for temperature in (0, -1.0, math.nan):
        with pytest.raises(MethodError, match="temperature must be positive"):
            sm.WeighByAnchors(sm.mean(), temperature=temperature)
    for margin in (-0.1, math.nan):
        with pytest.raises(MethodError, match="margin is a difference of losses"):
            sm.WeighByAnchors(sm.mean(), margin=margin)
    with pytest.raises(MethodError, match="WeighByAnchors needs anchors"):
        models.merge(adapters, method=sm.WeighByAnchors(sm.mean()))


def test_who_has_no_weight_is_not_weighed_by_anchors() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    method = sm.WeighByAnchors(sm.mean(), temperature=0.1)
    one = models.merge(adapters, loader, model, method=method, weights=[1.0, 0.0, 2.0])
    two = models.merge([adapters[0], adapters[2]], loader, model, method=method, weights=[1.0, 2.0])
    wanted = {"a1": 0.0} | two.report.notes["anchor_weights"]
    assert one.report.notes["anchor_weights"] == pytest.approx(wanted, rel=1e-9)
    for (name, update), (_, other) in zip(one.updates(), two.updates(), strict=True):
        assert error(update.dense(), other.dense()) < 1e-5, name


def test_one_threshold_for_a_whole_adapter() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, pefts = models.adapters(model, [models.VISION_TARGETS] * 2)
    method = sm.Chain(
        sm.Prune(sm.Taylor(), sm.TopFraction(0.3, scope="adapter"), units=sm.Factors()), sm.Mean()
    )
    rows = models.merge(adapters, loader, model, method=method).report.layers
    for adapter, peft in zip(adapters, pefts):
        scores = {k: v.abs() for k, v in peft_gradients(peft, adapter, loader, alignment).items()}
        every = (
            torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
        )
        cut = every[math.floor(0.3 * len(every) + 1e-9) - 1] * (1 - 1e-5)
        for row in rows:
            parts = [scores[row.name, part] for part in "AB"]
            wanted = sum(int((part >= cut).sum()) for part in parts) / sum(
                part.numel() for part in parts
            )
            assert row.notes["density"][adapter.label] == pytest.approx(wanted, abs=2e-2)


def test_a_criterion_of_ones_own() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)

    def mine(values: Tensor, stats: Any) -> Tensor:
        return (values * stats.gradient).abs().sqrt()

    def masks(scorer: Any) -> dict[str, Tensor]:
        method = sm.Chain(sm.Prune(scorer, sm.TopFraction(0.4), units=sm.Factors()), sm.Mean())
        return {
            n: u.dense() for n, u in models.merge(adapters, loader, model, method=method).updates()
        }

    theirs = masks(sm.Taylor())
    for name, update in masks(mine).items():
        assert torch.equal(update, theirs[name])


def test_a_signed_score_share_stays_a_share() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    method = sm.Chain(
        sm.Prune(sm.SignedTaylor(), sm.TopFraction(0.5), units=sm.Factors()), sm.Mean()
    )
    for row in models.merge(adapters, loader, model, method=method).report.layers:
        assert all(0 < share < 1 for share in row.notes["score_kept"].values())


def test_what_is_missing_is_said_before_any_work() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(MethodError, match="needs anchors and a model"):
        models.merge(adapters, method=sm.sap())
    with pytest.raises(MethodError, match="needs anchors and a model"):
        models.merge(adapters, None, model, method=sm.sap())
    with pytest.raises(MethodError, match="anchors need a model"):
        models.merge(adapters, loader)
    twice = sm.Chain(
        *[sm.Prune(sm.Taylor(), sm.TopFraction(0.5), units=sm.Factors())] * 2, sm.Mean()
    )
    with pytest.raises(MethodError, match="first Prune of a chain"):
        models.merge(adapters, loader, model, method=twice)
    assert not calls


def test_anchors_that_nobody_reads() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    with pytest.warns(SapmergeWarning, match="the anchors were not used"):
        merged = models.merge(adapters, loader, model, method=sm.mean())
    assert {"base model", "a0", "a1"} <= merged.report.notes["anchor loss"].keys()


def test_labels_that_look_like_the_base() -> None:
    model, loader = models.clip(), models.pairs()
    made, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    labelled = {"base": made[0], "model": made[1]}
    losses = models.merge(labelled, loader, model).report.notes["anchor loss"]
    assert set(losses) == {"base model", "base", "model", "merged adapter"}
    assert losses["base"] != losses["base model"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_order_of_adapters_changes_no_bit(order: tuple[int, ...]) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    first = dict(models.merge(adapters, loader, model, method=sm.sap(0.9)).updates())
    for name, update in models.merge(
        [adapters[k] for k in order], loader, model, method=sm.sap(0.9)
    ).updates():
        assert torch.equal(update.dense(), first[name].dense())


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ("alignment", r"'alignment'; pass the function, loss=sm\.alignment"),
        ("nothing", r"a function \(model, batch\).*'nothing'$"),
        (nn.MSELoss, "MSELoss"),
        (lambda model: 0, r"called with \(model, batch\); it takes \(model\)"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, text: str) -> None:
    with pytest.raises(sm.AnchorError, match=text):
        loss_for(nn.Linear(2, 2), loss)


def test_default_losses() -> None:
    models_and_losses = [
        (models.clip(), "alignment", models.pairs(), models.VISION_TARGETS),
        (models.siglip(), "alignment", models.pairs(masked=False), models.VISION_TARGETS),
        (models.dual_encoder(), "alignment", models.pairs(), r".*(query|fc1)"),
        (models.llava(), "language_modeling", models.prompts(), LLAVA_LANGUAGE),
        (models.llama(), "language_modeling", models.sentences(), r".*(q_proj|down_proj)"),
    ]
    for model, loss, loader, targets in models_and_losses:
        adapters, _ = models.adapters(model, [targets] * 2)
        report = models.merge(adapters, loader, model, method=sm.sap(0.9)).report
        assert report.notes["loss"] == loss
        assert all(0 < s <= 1 for row in report.layers for s in row.notes["score_kept"].values())


def test_a_plain_module_needs_a_loss(tmp_path: Any) -> None:
    model, loader = models.Plain(), models.plain_batches()
    adapters, _ = models.adapters(model, [["twice", "head", "conv", "words"]] * 2)
    with pytest.raises(AnchorError, match="Plain is neither"):
        models.merge(adapters, loader, model)
    merged = models.merge(adapters, loader, model, loss=models.plain_loss)
    assert merged.report.notes["loss"] == "plain_loss"
    merged.save_pretrained(tmp_path / "out")
    sizes = [len(batch["ids"]) for batch in loader]
    loaded = models.load(model, tmp_path / "out")
    with torch.no_grad():
        losses = [float(models.plain_loss(loaded.get_base_model(), batch)) for batch in loader]
    wanted = sum(n * value for n, value in zip(sizes, losses)) / sum(sizes)
    assert merged.report.notes["anchor loss"]["merged adapter"] == pytest.approx(wanted, rel=1e-5)


def test_inside_inference_mode() -> None:
    model = models.clip()
    made, _ = models.adapters(model, [models.BOTH_TARGETS] * 2)
    wanted = {
        name: update.dense() for name, update in models.merge(made, models.pairs(), model).updates()
    }
    with torch.inference_mode():
        loader = [{key: value.clone() for key, value in batch.items()} for batch in models.pairs()]
        for name, update in models.merge(made, loader, model).updates():
            assert torch.equal(update.dense(), wanted[name])
        born_in_it = models.clip()
    with pytest.raises(sm.AnchorError, match=r"was made inside torch.inference_mode\(\)"):
        models.merge(made, models.pairs(), born_in_it)


def test_one_pair_left_over_is_said() -> None:
    model = models.clip()
    made, _ = models.adapters(model, [models.BOTH_TARGETS] * 2)
    with pytest.warns(sm.SapmergeWarning, match="batch 1 of the anchors holds one pair"):
        models.merge(made, models.pairs((3, 1)), model)


@pytest.mark.parametrize("loss", [None, contrastive])  # None: alignment
def test_losses_of_pairs_share_a_pass(loss: Any) -> None:
    """`sap` asks for centered_alignment at every adapter, the report for the anchors' own."""
    model, loader = models.clip(), models.pairs((7, 4))
    adapters, pefts = models.adapters(model, [models.BOTH_TARGETS] * 3)
    images: list[int] = []
    model.vision_model.register_forward_hook(lambda *_: images.append(1))
    merged = models.merge(adapters, loader, model, method=sm.sap(), loss=loss)
    notes = merged.report.notes["anchor loss"]
    passes = 3 + 2 if loss is None else 3 + 5  # base and merged, or those of the adapters too
    assert len(notes) == 5
    assert len(images) == 2 * passes
    assert notes["merged adapter"] < math.inf
    wanted = [models.mean_loss(p.get_base_model(), loader, loss or alignment) for p in pefts]
    assert [notes[f"a{k}"] for k in range(3)] == pytest.approx(wanted, rel=2e-5)
    alone = merged.stream.with_anchors(loader, model, loss).anchors
    assert alone is not None
    labels = [label for label, _ in alone.adapters]
    assert [notes[label] for label in labels] == alone.losses()  # to the bit
