"""NSC's loss by QR of A, its derivative by differences, and what fitting it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from tests.anchors import models
from tests.anchors.models import anchored, random_updates
from tests.conftest import changed

NAMES = ("first", "second", "third")


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def setting() -> tuple[Any, list[sm.Layer], nn.Module, Tensor]:
    torch.manual_seed(3)
    model = Stack().double()
    updates = [random_updates(model, NAMES, 2, 1), random_updates(model, NAMES, 3, 2)]
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    loader = [{"x": x[:4]}, {"x": x[4:]}]
    anchors, layers = anchored(model, loader, updates, lambda model, batch: model(**batch).sum())
    return anchors, layers, model, x


def by_qr(layers: list[sm.Layer], model: nn.Module, x: Tensor, c: Tensor | None = None) -> float:
    """The formula, at base + sum c D."""
    given = {layer.name: layer for layer in layers}
    c = torch.zeros(len(layers), 2) if c is None else c
    rows, ratios = x.numpy(), []
    for number, name in enumerate(NAMES):
        for update in given[name]:
            assert isinstance(update, sm.LowRank)
            Q, _ = np.linalg.qr(update.A.numpy().T)
            inside = (rows @ Q @ Q.T) ** 2
            ratios.append(np.sqrt(1 - inside.sum(-1) / (rows**2).sum(-1)).mean())
        module = getattr(model, name)
        W = module.weight.detach() + sum(a * u.dense() for a, u in zip(c[number], given[name]))
        rows = np.tanh(rows @ W.numpy().T + module.bias.detach().numpy())
    return float(np.mean(ratios))


def test_it_is_the_formula() -> None:
    _, layers, model, x = setting()
    loss = sm.prepare(sm.NullSpaceRatio(), layers)
    model.requires_grad_(False)
    assert float(loss(model, {"x": x})) == pytest.approx(by_qr(layers, model, x), rel=1e-10)
    weights = torch.tensor([2.0, 1, 1, 0, 1, 1])
    weighted = loss(model, {"x": x, "anchor_weight": weights})
    repeated = torch.cat([x[:1], x[:3], x[4:]])
    assert float(weighted) == pytest.approx(by_qr(layers, model, repeated), rel=1e-10)
    with pytest.raises(sm.MethodError, match="has not seen them"):
        sm.NullSpaceRatio()(model, {"x": x})
    with pytest.raises(sm.AnchorError, match="no module 'first'"):
        loss(nn.Linear(8, 8).double(), {"x": x})


def test_its_slopes_are_those_of_the_formula() -> None:
    anchors, layers, model, x = setting()
    layers.sort(key=lambda layer: NAMES.index(layer.name))
    loss, c, h = sm.prepare(sm.NullSpaceRatio(), layers), torch.full((3, 2), 0.4).double(), 1e-5
    updates = {
        layer.name: sm.Dense(sum(a * u.dense() for a, u in zip(row, layer)))
        for row, layer in zip(c, layers)
    }
    value, slopes = anchors.slopes(updates, {x.name: list(x) for x in layers}, loss)
    assert value == pytest.approx(by_qr(layers, model, x, c), rel=1e-10)
    for i, layer in enumerate(layers):
        for k in range(2):
            moved = [c.clone(), c.clone()]
            moved[0][i, k] += h
            moved[1][i, k] -= h
            up, down = (by_qr(layers, model, x, each) for each in moved)
            assert float(slopes[layer.name][k]) == pytest.approx((up - down) / (2 * h), abs=1e-8)
    assert slopes["third"].tolist() == [0.0, 0.0]


def test_fitting_lowers_it() -> None:
    _, layers, *_ = setting()
    found: dict[str, Any] = {}
    prepared = sm.prepare(sm.nsc(lr=0.05, steps=30), layers)
    for layer in layers:
        prepared(changed(layer, record=lambda k, v, n=layer.name: found.update({(n, k): v})))
    losses = found["first", "fit_loss"]
    assert losses[-1] < losses[0] - 1e-3
    assert list(found["third", "coefficients"].values()) == [0.3, 0.3]


def test_on_a_clip() -> None:
    """Attention, embeddings of images and texts: whatever is linear is looked at."""
    model = models.clip()
    made, _ = models.adapters(model, [["q_proj", "fc1"], ["v_proj", "fc2"]])
    merged = sm.merge(made, models.pairs((4,)), model, method=sm.nsc(steps=2))
    losses = merged.report.notes["fit_loss"]
    assert 0 < losses[1] < 1
    assert losses[1] != losses[0]
    (batch,) = models.pairs((4,))
    with torch.no_grad():
        image = model.get_image_features(pixel_values=batch["pixel_values"])
    image = image if isinstance(image, Tensor) else image.pooler_output
    fixed = [{"input_ids": batch["input_ids"], "image_embeds": image}]
    loss = sm.merge(made, fixed, model, method=sm.nsc(steps=1)).report.notes["fit_loss"]
    assert loss[0] != losses[0]  # the text tower's layers alone
