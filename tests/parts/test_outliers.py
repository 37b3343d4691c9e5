"""Adapters held against each other: agreement against cosines of dense matrices,
clipping against medians.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.errors import AnchorError
from sapmerge.losses import alignment, centered_alignment
from tests.anchors import models
from tests.conftest import changed, dense, error, low_rank, make_layers, run


def common(count: int, noise: float = 1.0) -> list[list[Tensor]]:
    """Updates of two layers, as so many adapters have them that share a part."""
    made = []
    for number in range(2):
        shared = low_rank((9, 8), 3, 50 + number).dense()
        made.append(
            [shared + noise * low_rank((9, 8), 3, 10 * number + k).dense() for k in range(count)]
        )
    return made


def layers_of(
    matrices: Sequence[Sequence[Tensor]], weights: Sequence[float] = ()
) -> list[sm.Layer]:
    return [
        sm.Layer(f"l{number}", tuple(sm.Dense(matrix) for matrix in found), weights=tuple(weights))
        for number, found in enumerate(matrices)
    ]


def shares(layers: Sequence[sm.Layer], **options: float) -> tuple[float, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.SapmergeWarning)
        found = sm.prepare(sm.WeighByAgreement(sm.mean(), **options), layers).shares
    assert found is not None
    return found


def cosines(layers: Sequence[sm.Layer]) -> Tensor:
    count = len(layers[0])
    whole = torch.stack(
        [torch.cat([layer.updates[k].dense().flatten() for layer in layers]) for k in range(count)]
    )
    return torch.nn.functional.cosine_similarity(whole[:, None], whole[None], dim=-1)


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5, 3.0)])
def test_agreement_is_the_mean_cosine_with_the_others(weights: Sequence[float]) -> None:
    layers = layers_of(common(4), weights)
    votes = (cosines(layers) + 0.02).clamp_min(0).fill_diagonal_(0).sum(1)
    wanted = votes / votes.mean()
    assert shares(layers) == pytest.approx(wanted.tolist(), rel=1e-9)
    given = torch.tensor(weights or [1.0] * 4, dtype=torch.float64) * wanted
    merged = dense(run(sm.WeighByAgreement(sm.mean()), layers))
    for layer in layers:
        mean = sum(w * update.dense() for w, update in zip(given, layer, strict=True)) / given.sum()
        assert error(merged[layer.name], mean) < 1e-9


def test_low_rank_adapters_that_lack_layers() -> None:
    """a1 has no layer at all; a2 lacks the first, in which its part of the inner products is 0."""
    layers = make_layers([2, 0, 3, 2])
    first = layers[0]
    lacking = sm.absent(first.shape, first.updates[0].dense())
    layers[0] = changed(first, updates=(*first.updates[:2], lacking, first.updates[3]))
    votes = (cosines(layers) + 0.3).clamp_min(0).fill_diagonal_(0)
    votes[1], votes[:, 1] = 0, 0
    assert shares(layers, prior=0.3) == pytest.approx(
        (votes.sum(1) * 3 / votes.sum()).tolist(), rel=1e-9
    )


def test_a_flipped_adapter_has_no_say() -> None:
    matrices = common(3)
    flipped = [[*found, -found[0]] for found in matrices]
    with pytest.warns(sm.SapmergeWarning, match="'adapter3': agree with hardly any other"):
        got = dense(run(sm.WeighByAgreement(sm.mean()), layers_of(flipped)))
    without = dense(run(sm.WeighByAgreement(sm.mean()), layers_of(matrices)))
    assert all(error(got[name], without[name]) < 1e-9 for name in got)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_copies_are_asked_once_and_share_one_say(count: int) -> None:
    matrices = common(3)
    copies = [[*((k + 1.0) * found[0] for k in range(count)), *found[1:]] for found in matrices]
    one, others = shares(layers_of(matrices)), shares(layers_of(copies))
    assert others[:count] == pytest.approx((one[0] / count * (count + 2) / 3,) * count, rel=1e-9)
    assert others[count:] == pytest.approx([share * (count + 2) / 3 for share in one[1:]], rel=1e-9)
    assert shares(layers_of([[found[0]] * 3 for found in matrices])) == (1.0, 1.0, 1.0)


def test_those_who_have_nothing_in_common_weigh_the_same() -> None:
    rows = torch.eye(4, dtype=torch.float64)
    assert shares(layers_of([[row[None] for row in rows]])) == pytest.approx((1.0,) * 4)
    triangle = [
        torch.tensor([[math.cos(a), math.sin(a)]], dtype=torch.float64) for a in (0.0, 2.1, 4.2)
    ]
    assert shares(layers_of([triangle])) == (1.0, 1.0, 1.0)
    assert shares(layers_of([[rows[:1], -rows[:1]]])) == (1.0, 1.0)


def test_who_has_no_weight_is_not_asked_and_a_negative_one_is_meant() -> None:
    matrices = common(4)
    three = [[found[0], found[1], found[3]] for found in matrices]
    wanted = shares(layers_of(three))
    got = shares(layers_of(matrices, [1.0, 1.0, 0.0, -1.0]))
    assert (got[0], got[1], got[3]) == pytest.approx(wanted, rel=1e-12)
    assert got[2] == 0
    nobody = layers_of([[found[0], -found[0], found[1]] for found in matrices], [1.0, 1.0, 0.0])
    assert shares(nobody) == (1.0, 1.0, 0.0)


def test_weights_of_one_sign_keep_their_sum() -> None:
    """A say never turns the merge around: 1 + 1 + 0.3 - 2.2 stays 0.1, whoever agrees with whom."""
    matrices = common(4)
    weights = (1.0, 1.0, 0.3, -2.2)
    layers = layers_of(matrices, weights)
    found = shares(layers)
    positive = sum(w * s for w, s in zip(weights[:3], found[:3], strict=True)) / 2.3
    merged = dense(run(sm.WeighByAgreement(sm.mean()), layers))
    for number, (name, got) in enumerate(merged.items()):
        terms = [
            w * s / positive * m
            for w, s, m in zip(weights[:3], found[:3], matrices[number][:3], strict=True)
        ]
        assert error(got, (sum(terms) - 2.2 * matrices[number][3]) / 0.1) < 1e-9, name


def test_who_has_no_weight_is_not_clipped() -> None:
    loud = [[found[0], found[1], found[2], 100 * found[3]] for found in common(4)]
    assert (
        sm.prepare(sm.ClipNorms(sm.mean()), layers_of(loud, [1.0, 1.0, 1.0, 0.0])).scales
        == (1.0,) * 4
    )
    assert sm.prepare(sm.ClipNorms(sm.mean()), layers_of(loud, [1.0, 1.0, 1.0, -1.0])).scales[3] < 1


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_norms_are_clipped_at_a_multiple_of_the_median(count: int) -> None:
    matrices = [
        [matrix * (10.0 if k == 0 else 1.0) for k, matrix in enumerate(found)]
        for found in common(count)
    ]
    layers = layers_of(matrices)
    norms = [
        math.sqrt(sum(float(found[k].square().sum()) for found in matrices)) for k in range(count)
    ]
    bound = 2 * (norms[0] if count == 2 else statistics.median_high(norms))
    prepared = sm.prepare(sm.ClipNorms(sm.mean()), layers)
    assert prepared.scales == pytest.approx([min(1.0, bound / norm) for norm in norms], rel=1e-9)
    assert [k for k, scale in enumerate(prepared.scales) if scale < 1] == ([0] if count > 2 else [])
    for layer, found in zip(layers, matrices, strict=True):
        mean = (
            sum(matrix * min(1.0, bound / norm) for matrix, norm in zip(found, norms, strict=True))
            / count
        )
        assert error(prepared(layer).dense(), mean) < 1e-9


def times(adapter: sm.Adapter, factor: float) -> sm.Adapter:
    """The same adapter with another scaling."""
    state = {}
    for name, module in adapter.modules.items():
        update = adapter.update(name)
        assert isinstance(update, sm.LowRank)
        state[f"base_model.model.{module.spelled}.lora_A.weight"] = update.A * factor**0.5
        state[f"base_model.model.{module.spelled}.lora_B.weight"] = update.B * factor**0.5
    rank = next(iter(adapter.modules.values())).rank
    targets = sorted(module.spelled for module in adapter.modules.values())
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    return sm.Adapter.from_state_dict(config, state, label=adapter.label)


@pytest.mark.filterwarnings("ignore:.*of the energy of the merge")
def test_anchors_see_the_clipped_adapter(tmp_path: Any) -> None:
    """As if the adapter had been that short in its file:
    losses, gradients and masks, with and without a cache.
    """
    model, loader = models.clip(), models.pairs()
    made, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    loud = [*made[:2], times(made[2], 30.0)]
    norms = sorted(math.sqrt(sum(a.update(name).norm() ** 2 for name in a.modules)) for a in loud)
    short = [*made[:2], times(made[2], 30.0 * 2 * norms[1] / norms[2])]
    inner = sm.WeighByAnchors(sm.ScaleByAnchors(sm.sap_original(0.6)))
    wanted = dict(models.merge(short, loader, model, method=inner).updates())
    plain = dict(models.merge(loud, loader, model, method=inner).updates())
    for cache in (None, tmp_path, tmp_path):
        models.merge(loud, loader, model, method=inner, cache=cache)
        merged = models.merge(loud, loader, model, method=sm.ClipNorms(inner), cache=cache)
        assert merged.report.notes["clipped"] == {
            "a2": pytest.approx(2 * norms[1] / norms[2], rel=1e-5)
        }
        for name, update in merged.updates():
            assert error(update.dense(), wanted[name].dense()) < 1e-4
            assert error(update.dense(), plain[name].dense()) > 0.1


def test_a_cache_knows_how_long_the_adapter_was(tmp_path: Any) -> None:
    """CapShare hides from the scored update how much ClipNorms took;
    the gradients are those of the clipped adapter.
    """
    model, loader = models.clip(), models.pairs()
    made, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    loud = [*made[:2], times(made[2], 2.0**10)]
    for ratio in (2.0, 8.0):
        method = sm.ClipNorms(sm.CapShare(sm.sap_original(0.6), 0.4), ratio)
        cached = dict(models.merge(loud, loader, model, method=method, cache=tmp_path).updates())
        for name, update in models.merge(loud, loader, model, method=method).updates():
            assert torch.equal(cached[name].dense(), update.dense())


def test_an_adapter_that_overflows_the_model_is_merged_and_reported(tmp_path: Any) -> None:
    model, loader = models.clip(), models.pairs()
    made, _ = models.adapters(model, [models.VISION_TARGETS] * 3)
    merged = models.merge([*made[:2], times(made[2], 1e20)], loader, model)
    merged.save_pretrained(tmp_path / "out")
    losses = merged.report.notes["anchor loss"]
    assert losses["a2"] is None
    assert all(
        math.isfinite(losses[label]) for label in ("base model", "a0", "a1", "merged adapter")
    )


def test_in_a_group_only_its_layers_are_clipped() -> None:
    """Anchors see what is merged: the other group's layers as they are."""
    model, loader = models.clip(), models.pairs()
    made, pefts = models.adapters(model, [models.BOTH_TARGETS] * 3)
    loud = [*made[:2], times(made[2], 30.0)]
    weighed = sm.WeighByAnchors(sm.mean(), centered_alignment)
    method = sm.ByModule({"vision_model.*": sm.ClipNorms(weighed)}, default=sm.mean())
    rows = {
        row.name: row.notes
        for row in models.merge(loud, loader, model, method=method).report.layers
    }
    [scale] = {
        notes["clipped"]["a2"] for name, notes in rows.items() if name.startswith("vision_model")
    }
    assert not any(
        "clipped" in notes for name, notes in rows.items() if name.startswith("text_model")
    )
    for name, module in pefts[2].get_base_model().named_modules():
        if name.endswith("lora_B.default"):
            module.weight.data *= 30.0 * (scale if name.startswith("vision_model") else 1.0)
    losses = [models.mean_loss(peft.get_base_model(), loader, centered_alignment) for peft in pefts]
    wanted = torch.softmax(-torch.tensor(losses) / 0.2, 0)
    notes = next(notes for name, notes in rows.items() if name.startswith("vision_model"))
    assert notes["anchor_weights"] == pytest.approx(
        {f"a{k}": float(w) for k, w in enumerate(wanted)}, rel=1e-3
    )


def test_losses_of_scaled_adapters() -> None:
    model, loader = models.clip(), models.pairs()
    names = ["visual_projection"]
    updates = [models.random_updates(model, names, 2, k, torch.float32) for k in range(2)]
    anchors, _ = models.anchored(model, loader, updates, alignment)
    assert not anchors.used
    twice = anchors.scaled(dict.fromkeys(names, (1.0, 2.0)))
    assert not anchors.used
    plain = twice.losses()[0], anchors.losses()[1]
    assert anchors.used
    halved = twice.scaled(dict.fromkeys(names, (3.0, 0.5)))

    def at(k: int, factor: float, loss: Any = None) -> float:
        fresh, _ = models.anchored(model, loader, updates, alignment)
        return fresh.loss_of(
            {name: update.scaled(factor) for name, update in updates[k].items()}, loss
        )

    assert anchors.losses() == pytest.approx([at(0, 1.0), at(1, 1.0)], rel=1e-6)
    assert twice.losses() == pytest.approx([plain[0], at(1, 2.0)], rel=1e-6)
    assert twice.losses(centered_alignment)[1] == pytest.approx(
        at(1, 2.0, centered_alignment), rel=1e-6
    )
    assert halved.losses() == pytest.approx([at(0, 3.0), plain[1]], rel=1e-6)
    assert anchors.scaled({}).losses() == pytest.approx(list(plain), rel=1e-6)
    moved = {name: update.scaled(0.5) for name, update in updates[0].items()}
    assert twice.loss_of(moved) == pytest.approx(at(0, 0.5), rel=1e-6)
    with torch.no_grad():
        model.text_projection.weight *= 1.3
    for one in (anchors, twice):
        with pytest.raises(AnchorError, match="were changed since the merge began"):
            one.loss_of(moved)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sm.WeighByAgreement(sm.mean(), prior=-0.1),
        lambda: sm.WeighByAgreement(sm.mean(), prior=1.0),
        lambda: sm.WeighByAgreement(sm.mean(), copies=0.0),
        lambda: sm.WeighByAgreement(sm.mean(), copies=1.0),
        lambda: sm.ClipNorms(sm.mean(), 0.9),
        lambda: sm.ClipNorms(sm.mean(), math.nan),
    ],
)
def test_numbers_out_of_range(make: Any) -> None:
    with pytest.raises(sm.MethodError, match=r"(WeighByAgreement's prior|ClipNorms' ratio) is"):
        make()


@pytest.mark.parametrize(
    "method", [sm.WeighByAgreement(sm.mean(), 0.1, 0.8), sm.ClipNorms(sm.ties(), 1.5)]
)
def test_they_read_back_and_do_nothing_to_one_adapter(method: Any) -> None:
    assert repr(sm.parse(repr(method))) == repr(method)
    layers = make_layers([3])
    got, wanted = dense(run(method, layers)), dense(run(method.method, layers))
    assert all(error(got[name], wanted[name]) < 1e-12 for name in got)


def opinions(cosines: list[list[float]], layers: int = 6, jitter: float = 0.0) -> list[sm.Layer]:
    """Layers of unit updates with these cosines, by a Cholesky factor;
    `jitter` lets them differ between layers.
    """
    found = []
    for number in range(layers):
        wanted = torch.tensor(cosines, dtype=torch.float64)
        off = 1 + jitter * (-1) ** number
        wanted = wanted * off + torch.eye(len(cosines)) * (1 - off)
        rows = torch.linalg.cholesky(wanted)
        updates = tuple(
            sm.LowRank(torch.ones(1, 1, dtype=torch.float64), row[None]) for row in rows
        )
        found.append(sm.Layer(f"l{number}", updates))
    return found


def excluded(layers: list[sm.Layer], losses: list[float], **given: Any) -> list[int]:
    """Who is left out, asked of the part itself with the losses given."""
    part = sm.ExcludeOutliers(sm.mean(), **given)
    products = torch.stack(
        [torch.stack([u.A[0] for u in x]) @ torch.stack([u.A[0] for u in x]).T for x in layers]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = part._shares(products, losses, layers[0])  # pyright: ignore[reportPrivateUsage]
    return [k for k, share in enumerate(shares) if share == 0]


HONEST = [
    [1.0, 0.2, 0.2, 0.02],
    [0.2, 1.0, 0.2, 0.02],
    [0.2, 0.2, 1.0, 0.02],
    [0.02, 0.02, 0.02, 1.0],
]


WORSE = [0.5, 0.5, 0.5, 0.6]


def test_an_outlier_in_direction_and_loss_is_left_out() -> None:
    """Its median cosine, 0.02, is a tenth of the others' 0.2."""
    layers = opinions(HONEST, jitter=0.1)
    assert excluded(layers, WORSE) == [3]
    assert excluded(layers, [0.5, 0.5, 0.5, 0.51]) == []  # within the margin
    assert excluded(layers, [0.5, 0.6, 0.5, 0.4]) == []  # the loss says nothing against it
    assert excluded(layers, WORSE, ratio=0.11) == [3]
    assert excluded(layers, WORSE, ratio=0.09) == []
    # one layer has no standard error
    assert excluded(opinions(HONEST, layers=1), WORSE) == []
    assert excluded(layers, WORSE, significance=1e9) == []


def test_who_is_opposed_is_left_out_whatever_the_anchors_say() -> None:
    opposed = [[1.0, 0.2, 0.2, -0.1], [0.2, 1.0, 0.2, -0.1], [0.2, 0.2, 1.0, -0.1]]
    opposed.append([-0.1, -0.1, -0.1, 1.0])
    assert excluded(opinions(opposed, jitter=0.1), [0.5, 0.5, 0.5, 0.1]) == [3]
    assert excluded(opinions(opposed, jitter=2.0), [0.5, 0.5, 0.5, 0.1]) == []  # now so, now so
    three = [[1.0, 0.4, -0.1], [0.4, 1.0, -0.1], [-0.1, -0.1, 1.0]]
    assert excluded(opinions(three, jitter=0.1), [0.5, 0.5, 0.1]) == [2]


def test_a_camp_of_outliers_is_no_majority() -> None:
    """Three bad ones that resemble each other more than the four good ones do."""
    cosines = torch.full((7, 7), 0.02, dtype=torch.float64)
    cosines[:4, :4], cosines[4:, 4:] = 0.2, 0.7
    cosines.fill_diagonal_(1.0)
    losses = [0.5, 0.5, 0.5, 0.5, 0.6, 0.6, 0.6]
    assert excluded(opinions(cosines.tolist(), jitter=0.1), losses) == [4, 5, 6]


def test_of_two_halves_neither_is_left_out() -> None:
    """Two pairs, and three that agree beside three that agree with nobody."""
    pairs, three = torch.zeros(4, 4), torch.zeros(6, 6)
    pairs[:2, :2], pairs[2:, 2:], three[:3, :3] = 0.3, 0.3, 0.3
    for cosines in (pairs, three):
        cosines.fill_diagonal_(1.0)
        losses = [float(k) for k in range(len(cosines))]
        assert excluded(opinions(cosines.tolist(), jitter=0.1), losses) == []


def test_adapters_that_share_nothing_are_all_kept() -> None:
    assert excluded(opinions(torch.eye(5).tolist(), jitter=0.1), [0.1, 0.2, 0.3, 0.4, 9.0]) == []


def test_copies_are_one_adapter_for_the_outlier_test() -> None:
    """Two copies and another are two adapters, of whom nobody can be told apart."""
    copies = [[1.0, 0.99, 0.1], [0.99, 1.0, 0.1], [0.1, 0.1, 1.0]]
    assert excluded(opinions(copies, jitter=0.01), [0.5, 0.5, 0.9]) == []
    both = torch.eye(5, dtype=torch.float64)
    both[:3, :3] = 0.2
    both[3, 4] = both[4, 3] = 0.99
    both.fill_diagonal_(1.0)
    assert excluded(opinions(both.tolist(), jitter=0.005), [0.5, 0.5, 0.5, 0.6, 0.6]) == [3, 4]


def test_excluded_adapters_have_no_weight_and_a_name() -> None:
    """The whole way through a merge: an update, one like it,
    and the negative of whichever the anchors like less.
    """
    model, loader = models.clip(), models.pairs()
    _, live = models.adapters(model, [models.VISION_TARGETS] * 2, (3, 3))

    def made(label: str, sign: float, noise: int | None) -> sm.Adapter:
        changed, draw = copy.deepcopy(live[0]), torch.Generator().manual_seed(noise or 0)
        with torch.no_grad():
            for name, value in changed.named_parameters():
                if "lora_" in name and noise is not None:
                    value.add_(0.5 * value.abs().mean() * torch.randn(value.shape, generator=draw))
                if "lora_B" in name:
                    value.mul_(sign)
        return models.adapter(changed, label)

    def loss(adapter: sm.Adapter) -> float:
        method = sm.WeighByAnchors(sm.mean())
        return models.merge([adapter], loader, model, method=method).report.notes["anchor loss"][
            adapter.label
        ]

    sign = 1.0 if loss(made("plus", 1.0, None)) < loss(made("minus", -1.0, None)) else -1.0
    good, like, bad = made("good", sign, None), made("like", sign, 1), made("bad", -sign, 2)
    method = sm.ExcludeOutliers(sm.mean(), loss=sm.alignment, margin=0.0, copies=0.999)
    with pytest.warns(sm.SapmergeWarning, match="'bad': left out"):
        merged = models.merge([good, like, bad], loader, model, method=method)
    for name, update in merged.updates():
        wanted = (good.update(name).dense() + like.update(name).dense()) / 2
        torch.testing.assert_close(update.dense(), wanted, atol=1e-6, rtol=1e-5)
    assert merged.report.notes["excluded"] == ["bad"]
    with pytest.raises(sm.MethodError, match="ExcludeOutliers needs anchors"):
        models.merge([good, like, bad], method=sm.ExcludeOutliers(sm.mean()))


@pytest.mark.parametrize(
    "given", [{"ratio": 1.0}, {"margin": -0.1}, {"copies": 1.0}, {"significance": math.nan}]
)
def test_arguments_of_the_outlier_test(given: dict[str, float]) -> None:
    with pytest.raises(sm.MethodError, match="ExcludeOutliers' ratio is"):
        sm.ExcludeOutliers(sm.mean(), **given)
