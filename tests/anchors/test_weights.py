"""Weights of anchors: an anchor of weight 2 is the anchor twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.anchors.loading import Batches
from tests.anchors import models

Batch = dict[str, Any]


def repeated(batch: Batch, times: list[int]) -> Batch:
    """The batch with every sample so many times."""
    rows = torch.repeat_interleave(torch.arange(len(times)), torch.tensor(times))
    return {key: value[rows] for key, value in batch.items()}


def weighted(batch: Batch, times: list[float]) -> Batch:
    return {**batch, "anchor_weight": torch.tensor(times)}


def mean_one(batch: Batch) -> Batch:
    return next(iter(Batches([batch], torch.device("cpu"))))


@pytest.mark.parametrize("loss", [sm.alignment, sm.centered_alignment])
def test_a_pair_of_weight_two_is_the_pair_twice(loss: Any) -> None:
    model, (batch,) = models.clip(), models.pairs((4,))
    with torch.no_grad():
        wanted = loss(model, repeated(batch, [1, 3, 2, 0]))
        found = loss(model, mean_one(weighted(batch, [1.0, 3.0, 2.0, 0.0])))
        equal = loss(model, mean_one(weighted(batch, [5.0] * 4)))
        plain = loss(model, batch)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(equal, plain)


@pytest.mark.parametrize("loss", [sm.contrastive, sm.entropy])
def test_losses_within_a_batch_are_weighted_per_image(loss: Any) -> None:
    """Negatives stay as they are: the loss is linear in the weights, and 1 in all of them is no
    weight.
    """
    model, (batch,) = models.clip(), models.pairs((3,))
    with torch.no_grad():
        parts = [loss(model, weighted(batch, [float(k == i) for i in range(3)])) for k in range(3)]
        torch.testing.assert_close(sum(parts), loss(model, batch))
        mixed = loss(model, weighted(batch, [2.0, 0.5, 0.5]))
    torch.testing.assert_close(mixed, 2 * parts[0] + 0.5 * parts[1] + 0.5 * parts[2])


def test_contrastive_of_one_pair_is_its_cross_entropy() -> None:
    model, (batch,) = models.clip(), models.pairs((3,))
    with torch.no_grad():
        found = sm.contrastive(model, weighted(batch, [0.0, 3.0, 0.0]))
        out = model(**batch)
        image, text = out.logits_per_image[1:2], out.logits_per_text[1:2]
        both = [torch.nn.functional.cross_entropy(x, torch.tensor([1])) for x in (image, text)]
    torch.testing.assert_close(found, (both[0] + both[1]) / 2, atol=1e-5, rtol=1e-5)


def test_a_sentence_of_weight_two_is_the_sentence_twice() -> None:
    """Sentences of one length, so that all have as many tokens."""
    model = models.llama()
    ids = torch.randint(3, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids}
    with torch.no_grad():
        wanted = sm.language_modeling(model, repeated(batch, [1, 2, 0]))
        found = sm.language_modeling(model, weighted(batch, [1.0, 2.0, 0.0]))
        plain = sm.language_modeling(model, weighted(batch, [1.0, 1.0, 1.0]))
        own = sm.language_modeling(model, batch)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(plain, own)


def test_a_loss_that_is_no_cross_entropy_takes_no_weights() -> None:
    class Odd(torch.nn.Module):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, 100)
            return type("Out", (), {"loss": torch.tensor(1.0), "logits": logits})()

    ids = torch.ones(3, 4, dtype=torch.long)
    given = weighted({"input_ids": ids, "labels": ids}, [1.0] * 3)
    with pytest.raises(sm.AnchorError, match="mean cross-entropy"):
        sm.language_modeling(Odd(), given)


def test_merging_with_weights_is_merging_with_copies() -> None:
    """Gradients, too: SAP with an anchor of weight 2 prunes what SAP with the anchor twice does."""
    model = models.clip()
    made, _ = models.adapters(model, [["q_proj", "fc1"], ["v_proj", "fc2"]])
    (batch,) = models.pairs((4,))
    method = sm.sap_original(0.3)
    one = sm.merge(made, [weighted(batch, [0.2, 0.4, 0.2, 0.0])], model, method=method)
    other = sm.merge(made, [repeated(batch, [1, 2, 1, 0])], model, method=method)
    for (name, update), (same, wanted) in zip(one.updates(), other.updates(), strict=True):
        assert name == same
        torch.testing.assert_close(update.dense(), wanted.dense(), atol=1e-6, rtol=1e-5)
    losses = [merged.report.notes["anchor loss"] for merged in (one, other)]
    assert str(losses[0])[:6] == str(losses[1])[:6]


def test_weights_have_mean_one_over_all_batches() -> None:
    first, second = models.pairs((2, 4))
    loader = [weighted(first, [3.0, 1.0]), weighted(second, [0.0, 1.0, 1.0, 0.0])]
    found = torch.cat([b["anchor_weight"] for b in Batches(loader, torch.device("cpu"))])
    torch.testing.assert_close(found, torch.tensor([3.0, 1, 0, 1, 1, 0]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), "must be a tensor of 4"),
        (torch.tensor([1.0, -1, 1, 1]), "at least 0"),
        (torch.tensor([1.0, torch.nan, 1, 1]), "finite"),
        ([1.0, 1, 1, 1], "must be a tensor"),
        (torch.zeros(4), "are 0"),
    ],
)
def test_weights_that_are_none(weights: Any, message: str) -> None:
    (batch,) = models.pairs((4,))
    with pytest.raises(sm.AnchorError, match=message):
        Batches([{**batch, "anchor_weight": weights}], torch.device("cpu"))


def test_all_batches_have_weights_or_none() -> None:
    first, second = models.pairs((2, 2))
    with pytest.raises(sm.AnchorError, match="some batches"):
        Batches([weighted(first, [1.0, 1.0]), second], torch.device("cpu"))


def test_weights_of_pairs() -> None:
    def processor(images: Any, text: Any, **_: Any) -> Batch:
        return {"input_ids": torch.tensor([len(t) for t in text])}

    pairs = [object()] * 5, ["a", "bb", "ccc", "dddd", "eeeee"]
    loader = sm.from_pairs(*pairs, processor, 3, weights=[0.1, 0.2, 0.3, 0.2, 0.2])
    assert [b["anchor_weight"].tolist() for b in loader] == [
        pytest.approx([0.1, 0.2]),
        pytest.approx([0.3, 0.2, 0.2]),
    ]
    with pytest.raises(sm.AnchorError, match="2 weights for 5 pairs"):
        sm.from_pairs(*pairs, processor, weights=[0.5, 0.5])
