"""Parts that look at whole adapters: they never guess from one layer,
and anchors see the updates that they score.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.errors import MethodError
from tests.anchors import models
from tests.anchors.models import anchored, random_updates
from tests.conftest import error, make_layers, run

WHOLE = {
    "knots": sm.knots(),
    "ties of scope adapter": sm.ties(0.3, scope="adapter"),
    "agreement": sm.WeighByAgreement(sm.mean()),
    "clipping": sm.ClipNorms(sm.mean()),
    "geometric median": sm.geometric_median(),
    "krum": sm.krum(),
    "energy": sm.MatchEnergy(sm.mean()),
    "depth": sm.lines(),
    "competition": sm.pcb(),
    "anchor weights": sm.WeighByAnchors(sm.mean()),
    "anchor length": sm.ScaleByAnchors(sm.mean()),
    "sap": sm.sap(),
    "fisher": sm.fisher(),
    "regmean": sm.regmean(),
    "tune": sm.tune([sm.mean()]),
    "coefficients": sm.adamerging(steps=1),
    "layers": sm.gradpruner(),
    "rows": sm.loraprune(),
    "runs": sm.movement(),
}


@pytest.mark.parametrize("method", WHOLE.values(), ids=WHOLE.keys())
def test_inside_a_plain_function_they_raise(method: sm.Method) -> None:
    """They were silently something else: 24 % off for knots, 39 % for ties,
    8 % for the geometric median.
    """
    layers = make_layers([2, 3, 2])
    with pytest.raises(MethodError, match="looks at whole adapters"):
        run(lambda layer: method(layer), layers)
    assert run(method, layers).keys() == {layer.name for layer in layers}


def test_on_one_layer_they_are_what_they_are_on_an_adapter_of_one_layer() -> None:
    [layer] = make_layers([2, 3, 2], {"l": (7, 8)})
    for method in (sm.knots(), sm.geometric_median(), sm.MatchEnergy(sm.mean()), sm.pcb()):
        assert torch.equal(
            sm.on_one_layer(method, layer).dense(), run(method, [layer])["l"].dense()
        )


def regression() -> tuple[nn.Module, list[dict[str, Tensor]], list[Mapping[str, sm.Update]]]:
    """A linear layer with a quadratic loss, an adapter that helps and one that is forty
    times too long.
    """
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    model.add_module("l", nn.Linear(6, 5, bias=False).double())
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    good, bad = (random_updates(model, ["l"], 2, k) for k in (1, 2))
    y = x @ (model.l.weight.detach() + good["l"].dense()).T
    return model, [{"x": x, "y": y}], [good, {"l": bad["l"].scaled(40.0)}]


def squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


@pytest.mark.parametrize(
    "bound",
    [lambda inner: sm.CapShare(inner, 0.6), lambda inner: sm.ClipNorms(inner, 1.5)],
    ids=["cap", "clip"],
)
def test_anchors_see_updates_that_a_wrapper_has_bounded(bound: object) -> None:
    """They saw those of the file: losses of 8234.8 where the capped adapters have 487.4."""
    model, batches, updates = regression()
    third = random_updates(model, ["l"], 2, 3)
    _, layers = anchored(model, batches, [*updates, third], squares)
    seen: list[sm.Layer] = []

    def look(layer: sm.Layer) -> sm.Update:
        seen.append(layer)
        return sm.mean()(layer)

    notes: dict[str, Mapping[str, float]] = {}
    method = bound(sm.WeighByAnchors(look, squares, temperature=5.0))  # type: ignore[operator]
    sm.prepare(method, layers)(layers[0].noting(notes.__setitem__))  # type: ignore[arg-type]
    bounded = [update.dense() for update in seen[-1]]
    assert bounded[1].norm() < 0.5 * layers[0].updates[1].norm()
    batch, W0 = batches[0], model.l.weight.detach()
    losses = torch.stack([(batch["x"] @ (W0 + D).T - batch["y"]).square().mean() for D in bounded])
    wanted = torch.softmax(-(losses - losses.min()) / 5.0, 0)
    assert list(notes["anchor_weights"].values()) == pytest.approx(wanted.tolist(), rel=1e-9)


def test_after_a_step_that_changes_updates_there_are_no_anchors() -> None:
    _, layers = anchored(*(regression()[:2]), regression()[2], squares)
    first = sm.Prune(sm.Magnitude(), sm.TopFraction(0.5))
    for later in (sm.FisherMean(), sm.RegMean(), sm.WeighByAnchors(sm.mean())):
        with pytest.raises(MethodError, match="only the first step"):
            sm.prepare(sm.Chain(first, later), layers)


def test_a_basis_keeps_the_anchors_and_their_gradients() -> None:
    """In the frame of all columns nothing changes."""
    model, batches, updates = regression()
    _, layers = anchored(model, batches, updates, squares)
    plain = sm.Chain(sm.Prune(sm.Taylor(), sm.TopFraction(0.4)), sm.Mean())
    whole = sm.In(lambda layer: sm.Frames(U=torch.eye(5).double(), V=torch.eye(6).double()), plain)
    wanted = sm.prepare(plain, layers)(layers[0]).dense()
    assert error(sm.prepare(whole, layers)(layers[0]).dense(), wanted) < 1e-12


def test_a_layer_is_pure_data() -> None:
    layer = make_layers([2, 3])[0]
    assert not hasattr(layer, "anchors")
    assert [member.label for member in layer.members] == ["a0", "a1"]
    other = layer.with_weights((2.0, -1.0))
    assert other.weights == (2.0, -1.0)
    assert layer.weights == (1.0, 1.0)
    assert all(one is two for one, two in zip(other.updates, layer.updates, strict=True))


def test_a_merge_on_a_clip_is_not_disturbed(tmp_path: object) -> None:
    """A wrapper that changes nothing gives the same bits as none."""
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    plain = dict(models.merge(adapters, loader, model, method=sm.sap_original(0.5)).updates())
    capped = models.merge(adapters, loader, model, method=sm.CapShare(sm.sap_original(0.5), 0.99))
    for name, update in capped.updates():
        assert torch.equal(update.dense(), plain[name].dense())
