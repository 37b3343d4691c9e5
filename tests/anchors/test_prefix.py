"""What runs before the first adapted layer runs once, and whatever else a model or a loss does,
nothing changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sapmerge as sm
from sapmerge.anchors import prefix
from sapmerge.core.updates import Update
from sapmerge.errors import AnchorError
from sapmerge.losses import outputs_only
from tests.anchors import models
from tests.anchors.models import anchored, assert_same_state, random_updates, state_of

FACTORS = sm.Chain(sm.Prune(sm.Taylor(), sm.TopFraction(0.5), units=sm.Factors()), sm.Mean())
LATE = r".*vision_model.*layers\.1\..*(q_proj|fc1)"
Found = dict[tuple[str, str], Tensor]


class Part(nn.Module):
    """A block that counts how often it really runs. What else it does is up to the test."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.calls = [0]

    def __deepcopy__(self, memo: Any) -> Part:
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x: Tensor, **more: Any) -> Any:
        calls[0] += 1
        return self.work(x, **more)

    def work(self, x: Tensor) -> Any:
        return torch.tanh(self.inner(x))


calls = [0]
"""How often a `Part` ran since `counted` began;
kept outside of the modules, where it would be a trace of theirs.
"""


class Net(nn.Module):
    """first, then an adapted layer, then the rest; the order is up to the test."""

    def __init__(
        self, part: type[Part] = Part, order: Callable[[Net, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = part(), part()
        self.adapted, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        if self.order is not None:
            return self.order(self, x)
        return self.last(torch.tanh(self.adapted(self.second(self.first(x)))))


def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).square().mean()


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(4, 6, generator=generator)} for _ in range(count)]


def scored(
    model: nn.Module,
    loader: Any,
    loss: Any,
    budget: int = 1 << 30,
    names: Sequence[str] = ("adapted",),
) -> Any:
    """Gradients at base + each of three adapters, losses, slopes;
    and how often a `Part` ran for them.
    """
    updates: list[Mapping[str, Update]] = [
        random_updates(model, names, 2, k, torch.float32) for k in range(3)
    ]
    anchors, layers = anchored(model, loader, updates, outputs_only(loss), budget)
    calls[0] = 0
    spy = models.spied(layers, sm.Entries())
    value, slopes = anchors.slopes(updates[1], {name: [updates[2][name]] for name in names})
    losses = [
        *anchors.losses(),
        anchors.loss_of({}),
        *(half.loss_of(updates[0]) for half in anchors.halves()),
        value,
    ]
    return (
        spy.gradient,
        torch.tensor([*losses, *(float(slope) for slope in slopes.values())]),
        calls[0],
    )


def assert_same(model: nn.Module, loader: Any, loss: Any = loss, **options: Any) -> tuple[int, int]:
    """Nothing changes, bit for bit, by what is kept. How often a `Part` ran: with and without."""
    before = state_of(model)
    found, losses, ran = scored(model, loader, loss, **options)
    assert_same_state(before, state_of(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_largest", lambda *_: iter(()))
        wanted, same_losses, runs = scored(copy.deepcopy(model), loader, loss, **options)
    assert torch.equal(losses, same_losses)
    for key, gradient in wanted.items():
        assert float(gradient.norm()) > 0
        assert torch.equal(found[key], gradient), key
    return ran, runs


# gradients of three adapters, slopes, the base; the halves have batches of their own
PASSES = 3 + 1 + 1


def test_what_comes_first_runs_once_per_batch() -> None:
    assert assert_same(Net(), batches()) == (2 * (2 + 2), 2 * (2 * PASSES + 2))


@pytest.mark.parametrize(
    "targets", [LATE, r".*vision_model.*layers\.1\.mlp.fc2", r".*text_model.*layers\.1\..*v_proj"]
)
def test_the_blocks_of_a_clip(targets: str) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [targets] * 3)
    side = "vision_model" if "vision" in targets else "text_model"
    counted, before = _calls_inside(model, f"{side}.encoder.layers.0"), state_of(model)
    merged = models.merge(adapters, loader, model, method=FACTORS)
    found, losses = dict(merged.updates()), merged.report.notes["anchor loss"]
    assert counted == [2]
    assert_same_state(before, state_of(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_largest", lambda *_: iter(()))
        plain = models.merge(adapters, loader, model, method=FACTORS)
        for name, update in plain.updates():
            assert torch.equal(update.dense(), found[name].dense())
        assert plain.report.notes["anchor loss"] == losses
    # where the adapted layers are; gradients, base, merged
    assert counted[0] == 2 + 1 + 2 * (3 + 1 + 1)


@pytest.mark.parametrize(
    "targets", [r".*language_model.*(q|v)_proj", r".*language_model.*layers\.1\..*q_proj"]
)
def test_the_vision_tower_of_a_llava(targets: str) -> None:
    """The hooks that transformers leaves in it do no harm."""
    model, loader = models.llava(), models.prompts()
    adapters, _ = models.adapters(model, [targets] * 3)
    block = model.model.vision_tower.get_submodule("vision_model.encoder.layers.0" if hasattr(
        model.model.vision_tower, "vision_model") else "encoder.layers.0")  # fmt: skip
    counted = _calls_of(block)
    found = dict(models.merge(adapters, loader, model, method=FACTORS).updates())
    assert counted[0] <= 3  # once per batch, and once more when those hooks are new
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_largest", lambda *_: iter(()))
        for name, update in models.merge(adapters, loader, model, method=FACTORS).updates():
            assert torch.equal(update.dense(), found[name].dense())


def _calls_inside(model: nn.Module, name: str) -> list[int]:
    return _calls_of(model.get_submodule(name))


def _calls_of(module: nn.Module) -> list[int]:
    """Calls of a module, counted in its class: a hook inside of a block would keep it from
    being left out.
    """
    counted, kind = [0], type(module)

    class Counted(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            return super().forward(*args, **kwargs)

    module.__class__ = Counted
    return counted


def test_a_module_before_and_after_an_adapted_one() -> None:
    def order(net: Net, x: Tensor) -> Tensor:
        return net.last(net.first(torch.tanh(net.adapted(net.first(x)))))

    ran, runs = assert_same(Net(order=order), batches())
    assert (ran, runs) == (2 * (1 + 1) + 2 * (PASSES + 1), 2 * 2 * (PASSES + 1))


def test_a_module_that_is_called_several_times() -> None:
    def order(net: Net, x: Tensor) -> Tensor:
        y = net.first(x) + net.first(2 * x) * net.first(net.first(x))
        return net.last(torch.tanh(net.adapted(y)) + net.first(x))

    ran, runs = assert_same(Net(order=order), batches())
    assert runs == 2 * 5 * (PASSES + 1)
    assert ran == 2 * (4 + 4) + 2 * (PASSES + 1)


def test_adapters_of_different_layers_share_what_precedes_all() -> None:
    model = Net(
        order=lambda net, x: net.last(torch.tanh(net.adapted(net.second(net.last(net.first(x))))))
    )
    assert assert_same(model, batches(), names=("adapted", "last"))[0] < 2 * 2 * (PASSES + 1)


class Tuples(Part):
    def work(self, x: Tensor) -> Any:
        return torch.tanh(self.inner(x)), {"twice": [x, 2 * x], "none": None}


class InPlace(Part):
    """Its input is changed by it."""

    def work(self, x: Tensor) -> Any:
        return x.add_(self.inner(x))


class Noisy(Part):
    """Random, and the draw matters: the state of the generator is put back before every pass."""

    def work(self, x: Tensor) -> Any:
        return self.inner(x) + torch.rand(())


class Remembers(Part):
    """Leaves its output where the loss finds it."""

    def work(self, x: Tensor) -> Any:
        self.seen = torch.tanh(self.inner(x))
        return self.seen


class Appends(Part):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def work(self, x: Tensor) -> Any:
        self.seen.append(torch.tanh(self.inner(x)))
        return self.seen[-1]


class Cached(Part):
    """A cache is handed in, as transformers does."""

    def work(self, x: Tensor, cache: Any = None) -> Any:
        cache.found = torch.tanh(self.inner(x))
        return 2 * cache.found


class Cache:
    found: Tensor


def test_containers_come_back_as_new_ones() -> None:
    def order(net: Net, x: Tensor) -> Tensor:
        y, more = net.first(x)
        more["twice"].append(y)  # would be there twice, were it the same list
        return net.last(torch.tanh(net.adapted(torch.stack(more["twice"]).sum(0))))

    assert assert_same(Net(Tuples, order), batches()) == (2 * 2, 2 * (PASSES + 1))


def test_outputs_that_are_changed_in_place_run_again() -> None:
    def order(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        y += 1
        z = net.second(y)
        z += net.adapted(2 * z)
        return net.last(z)

    ran, runs = assert_same(Net(order=order), batches())
    assert ran == runs


def test_inputs_that_are_changed_in_place_run_again() -> None:
    ran, runs = assert_same(
        Net(InPlace, lambda net, x: net.last(net.adapted(net.first(2 * x)))), batches()
    )
    assert ran == runs


@pytest.mark.parametrize("part", [Remembers, Appends])
def test_what_a_module_leaves_behind_is_there(part: type[Part]) -> None:
    def order(net: Net, x: Tensor) -> Tensor:
        y = net.adapted(net.first(x))
        seen = net.first.seen
        return net.last(y) * (seen[-1] if isinstance(seen, list) else seen)

    ran, runs = assert_same(Net(part, order), batches())
    assert ran == runs


def test_a_cache_that_is_handed_in_is_filled() -> None:
    def order(net: Net, x: Tensor) -> Tensor:
        cache = Cache()
        y = net.adapted(net.first(x, cache=cache))
        return net.last(y) * cache.found

    ran, runs = assert_same(Net(Cached, order), batches())
    assert ran == runs


def test_random_modules_draw_every_time() -> None:
    def seeded(model: Any, batch: Any) -> Tensor:
        torch.manual_seed(7)
        return loss(model, batch) + torch.rand(())

    ran, runs = assert_same(Net(Noisy), batches(), seeded)
    assert ran == runs


def test_a_loss_that_is_different_every_time() -> None:
    class Drawing:
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __call__(self, model: Any, batch: Any) -> Tensor:
            return loss(model, {"x": batch["x"] + torch.randn(4, 6, generator=self.generator)})

    found, wanted = scored(Net(), batches(), Drawing()), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "_largest", lambda *_: iter(()))
        wanted = scored(Net(), batches(), Drawing())
    assert torch.equal(found[1], wanted[1])


def test_a_loss_with_an_order_of_its_own() -> None:
    def halved(model: Any, batch: Any) -> Tensor:
        """Two passes of the model per batch, and parts of it on their own."""
        x = batch["x"]
        return (model(x[::2]) - model(x[1::2])).square().mean() + model.adapted(
            model.first(x)
        ).mean()

    ran, runs = assert_same(Net(), batches(), halved)
    assert ran < runs


def test_a_loss_that_looks_inside() -> None:
    """A hook inside a block fires on every pass."""

    def looking(model: Any, batch: Any) -> Tensor:
        seen: list[Tensor] = []
        handle = model.first.inner.register_forward_hook(lambda _, __, output: seen.append(output))
        value = loss(model, batch) * (1 + seen[0].square().mean() if seen else 1)
        handle.remove()
        return value * (1 + seen[0].square().mean())

    ran, runs = assert_same(Net(), batches(), looking)
    assert runs / 2 < ran < runs  # the other block need not run


def test_a_loss_with_gradients_of_its_own() -> None:
    """What depends on the adapters through derivatives is no product of inputs and output
    gradients: refused.
    """

    def penalty(model: Any, batch: Any) -> Tensor:
        with torch.enable_grad():
            x = batch["x"].clone().requires_grad_(True)
            value = loss(model, {"x": x})
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    with pytest.raises(AnchorError, match="takes gradients itself, through layer 'adapted'"):
        scored(Net(), batches(), penalty)
    model = Net()
    updates = random_updates(model, ["adapted"], 2, 0, torch.float32)
    moved = copy.deepcopy(model)
    moved.adapted.weight.data += updates["adapted"].dense()
    wanted = sum(float(penalty(moved, batch)) for batch in batches()) / 2
    assert anchored(model, batches(), [updates], penalty)[0].loss_of(updates) == pytest.approx(
        wanted, rel=1e-5
    )


class Recorder:
    """A plain object in which a module leaves something."""

    def __init__(self) -> None:
        self.maps: dict[str, list[Tensor]] = {"seen": []}


class Records(Part):
    def __init__(self) -> None:
        super().__init__()
        self.record = Recorder()

    def work(self, x: Tensor) -> Any:
        self.record.maps["seen"] = [torch.tanh(self.inner(x))]
        return self.record.maps["seen"][0]


GLOBAL: list[Tensor] = []


class Global(Part):
    def work(self, x: Tensor) -> Any:
        GLOBAL[:] = [torch.tanh(self.inner(x))]
        return GLOBAL[0]


def test_a_loss_that_finds_what_modules_left_behind() -> None:
    """In an object of the module, or anywhere: the blocks run each time,
    unless a loss is said to be `outputs_only`.
    """

    def order(net: Net, x: Tensor) -> Tensor:
        return net.last(torch.tanh(net.adapted(net.first(x))))

    def recorded(model: Any, batch: Any) -> Tensor:
        return loss(model, batch) * (1 + model.first.record.maps["seen"][0].square().mean())

    def found(model: Any, batch: Any) -> Tensor:
        return loss(model, batch) * (1 + GLOBAL[0].square().mean())

    for kind, looking in ((Records, recorded), (Global, found)):
        model = Net(order=order)
        model.first = kind()
        updates = random_updates(model, ["adapted"], 2, 0, torch.float32)
        once = [
            anchored(model, batches(), [updates], looking)[0].loss_of(updates) for _ in range(2)
        ]
        anchors, _ = anchored(model, batches(), [updates], looking)
        assert [anchors.loss_of(updates), anchors.loss_of(updates)] == once
        said, _ = anchored(model, batches(), [updates], outputs_only(loss))
        assert said.loss_of(updates) == said.loss_of(updates) != once[0]
    model = Net(order=order)
    model.first = Records()
    assert_same(model, batches(), recorded)


def test_autocast_in_one_loss_and_not_in_another() -> None:
    model, updates = Net(), random_updates(Net(), ["adapted"], 2, 0, torch.float32)

    def narrow(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch).float()

    anchors, _ = anchored(model, batches(), [updates], loss)
    alone = [
        anchored(model, batches(), [updates], each)[0].loss_of(updates) for each in (loss, narrow)
    ]
    assert [anchors.loss_of(updates, each) for each in (loss, narrow, loss, narrow)] == alone * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    def blocks(net: Net, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(net.adapted(net.second(net.first(x))))

        return net.last(
            checkpoint(block, checkpoint(block, x, use_reentrant=False), use_reentrant=False)
        )

    def before(net: Net, x: Tensor) -> Tensor:
        return net.last(net.adapted(checkpoint(net.second, net.first(x), use_reentrant=True)))

    # The reentrant kind wants an input that asks for a gradient: no use behind frozen weights.
    ran, runs = assert_same(Net(order=before if reentrant else blocks), batches())
    assert ran < runs


def test_beyond_the_budget_it_is_computed_again() -> None:
    one = 4 * 6 * 4  # the inputs of a part, and its outputs
    all_kept, some, none = (
        assert_same(Net(), batches(), budget=2 * budget)[0] for budget in (1 << 20, 2 * one, 0)
    )
    assert all_kept < some < none


def test_weights_that_change_are_noticed() -> None:
    model, updates = Net(), random_updates(Net(), ["adapted"], 2, 0, torch.float32)
    anchors, _ = anchored(model, batches(), [updates], loss)
    first = anchors.loss_of(updates)
    with torch.no_grad():
        model.first.inner.weight.mul_(2)
    with pytest.raises(AnchorError, match="were changed since the merge began"):
        anchors.loss_of(updates)
    assert anchored(model, batches(), [updates], loss)[0].loss_of(updates) != first


def test_an_error_on_the_way() -> None:
    """The model is as it was, with a `forward` that somebody had replaced."""
    model = Net()
    model.first.forward = model.first.forward  # an attribute of the module now
    before, own = state_of(model), [dict(vars(module)) for module in model.modules()]

    def failing(model: Any, batch: Any) -> Tensor:
        model.first(batch["x"])
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        scored(model, batches(), failing)
    assert_same_state(before, state_of(model))
    for module, was in zip(model.modules(), own):
        assert vars(module).keys() == was.keys()
        assert vars(module).get("forward") is was.get("forward")
