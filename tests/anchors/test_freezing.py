"""The model comes back as it was; what is bad is found and named;
what need not be computed is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sapmerge as sm
from sapmerge.errors import AnchorError, ModelMismatchError, NonFiniteError, SapmergeWarning
from sapmerge.losses import alignment
from tests.anchors import models
from tests.anchors.models import (
    anchored,
    assert_same_state,
    dense_gradients,
    random_updates,
    spied,
    state_of,
)
from tests.conftest import error

Q, FC1 = "vision_model.encoder.layers.{}.self_attn.q_proj", "vision_model.encoder.layers.{}.mlp.fc1"
FACTORS = sm.Chain(sm.Prune(sm.Taylor(), sm.TopFraction(0.5), units=sm.Factors()), sm.Mean())


def unusual(model: nn.Module) -> nn.Module:
    """A model with state to lose: some parts in training mode, some frozen,
    some with gradients and hooks.
    """
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        if number % 4 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
    model.get_submodule(Q.format(0)).register_forward_hook(lambda *_: None)
    return model


def fails_in_second_batch() -> Callable[..., Tensor]:
    calls = [0]

    def loss(model: Any, batch: Any) -> Tensor:
        calls[0] += 1
        value = alignment(model, batch)
        if calls[0] == 2:
            raise RuntimeError("in the middle")
        return value

    return loss


def test_the_model_comes_back() -> None:
    model, loader = unusual(models.clip()), models.pairs()
    adapters, _ = models.adapters(model, [models.BOTH_TARGETS, models.VISION_TARGETS])
    before = state_of(model)
    batches = copy.deepcopy(loader)
    models.merge(adapters, loader, model, method=sm.sap(0.9)).report
    assert_same_state(before, state_of(model))
    for batch, was in zip(loader, batches):
        assert all(torch.equal(batch[key], was[key]) for key in was)


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        (fails_in_second_batch, RuntimeError),
        (lambda: lambda model, batch: alignment(model, batch) * float("nan"), NonFiniteError),
        (lambda: lambda model, batch: (1 - alignment(model, batch)).expand(3), AnchorError),
        (lambda: lambda model, batch: 1.0, AnchorError),
        (lambda: lambda model, batch: torch.tensor(1.0), AnchorError),
        (lambda: lambda model, batch: torch.tensor(1.0, requires_grad=True), AnchorError),
    ],
    ids=["raises", "nan", "vector", "float", "constant", "a parameter of its own"],
)
def test_the_model_comes_back_after_an_error(loss: Any, wanted: type[Exception]) -> None:
    model, loader = unusual(models.clip()), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    before = state_of(model)
    with pytest.raises(wanted) as caught:
        models.merge(adapters, loader, model, loss=loss(), method=FACTORS)
    assert_same_state(before, state_of(model))
    if wanted is NonFiniteError:
        assert "is nan in adapter 'a" in str(caught.value)


def test_gradients_of_the_user_are_left_alone() -> None:
    """A loss with parameters of its own, batches that ask for gradients:
    nobody's .grad is touched.
    """
    model, loader = models.clip(), models.pairs()
    head = nn.Linear(12, 1)
    for batch in loader:
        batch["pixel_values"].requires_grad_(True)

    def loss(model: Any, batch: Any) -> Tensor:
        return head(model.get_image_features(batch["pixel_values"]).pooler_output).mean()

    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    models.merge(adapters, loader, model, loss=loss, method=FACTORS)
    assert head.weight.grad is None
    assert all(batch["pixel_values"].grad is None for batch in loader)


@pytest.mark.parametrize("frozen_adapter", [False, True])
def test_adapters_of_a_live_model(frozen_adapter: bool) -> None:
    """Given as model, a PeftModel is only its base; its own adapters are on again afterwards."""
    base, loader = models.clip(), models.pairs()
    live = models.with_peft(
        base, models.VISION_TARGETS, seed=9, name="own", modules_to_save=["visual_projection"]
    )
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
            if frozen_adapter:
                parameter.requires_grad_(False)
    adapters, _ = models.adapters(base, [models.VISION_TARGETS, models.BOTH_TARGETS])
    plain = dict(models.merge(adapters, loader, base).updates())
    before, output = (
        state_of(live),
        live.get_image_features(loader[0]["pixel_values"]).pooler_output,
    )
    merged = models.merge(adapters, loader, live)
    for name, update in merged.updates():
        assert error(update.dense(), plain[name].dense()) < 1e-6
    assert_same_state(before, state_of(live))
    assert torch.equal(live.get_image_features(loader[0]["pixel_values"]).pooler_output, output)


def test_names_of_adapters_in_a_live_model() -> None:
    base, loader = models.clip(), models.pairs()
    live = models.with_peft(base, models.VISION_TARGETS, seed=1, name="one")
    second = models.with_peft(base, models.VISION_TARGETS, seed=2, name="two")
    live.add_adapter("two", second.peft_config["two"])
    live.load_state_dict(
        {k: v for k, v in second.state_dict().items() if ".two." in k}, strict=False
    )
    live.set_adapter("two")
    before = state_of(live)
    merged = models.merge(["one", "two"], loader, live)
    assert_same_state(before, state_of(live))
    apart = models.merge(
        {"one": models.adapter(live, "one", "one"), "two": models.adapter(second, "two", "two")},
        loader,
        base,
    )
    wanted = dict(apart.updates())
    for name, update in merged.updates():
        assert error(update.dense(), wanted[name].dense()) < 1e-6


def _by_transformers(model: Any, config: Any) -> None:
    try:
        model.add_adapter(config, "own")
    except ValueError as error:  # transformers demands a PEFT that may not be out yet
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(
            f"transformers {transformers.__version__} with peft {peft.__version__}: {error}"
        )


@pytest.mark.parametrize(
    "put",
    [_by_transformers, lambda model, config: peft.inject_adapter_in_model(config, model, "own")],
    ids=["add_adapter of transformers", "inject_adapter_in_model of PEFT"],
)
def test_adapters_that_live_in_a_plain_model(put: Callable[[Any, Any], object]) -> None:
    base, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(base, [models.VISION_TARGETS] * 2)
    plain = dict(models.merge(adapters, loader, base).updates())
    live = copy.deepcopy(base)
    put(live, peft.LoraConfig(target_modules=models.VISION_TARGETS, init_lora_weights=False))
    before = state_of(live)
    for name, update in models.merge(adapters, loader, live).updates():
        assert error(update.dense(), plain[name].dense()) < 1e-6
    assert_same_state(before, state_of(live))


def test_a_live_model_whose_adapter_is_merged_in_is_refused() -> None:
    base, loader = models.clip(), models.pairs()
    live = models.with_peft(base, models.VISION_TARGETS, seed=9)
    adapters, _ = models.adapters(base, [models.VISION_TARGETS] * 2)
    live.merge_adapter()
    before = state_of(live)
    with pytest.raises(AnchorError, match="unmerge_adapter"):
        models.merge(adapters, loader, live)
    assert_same_state(before, state_of(live))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
@pytest.mark.parametrize("kind", ["clip", "llava"])
def test_half_precision_models(dtype: torch.dtype, tolerance: float, kind: str) -> None:
    build, loader, targets = {
        "clip": (models.clip, models.pairs(), models.VISION_TARGETS),
        "llava": (
            models.llava,
            models.prompts(),
            r".*(language_model|vision_tower).*layers\.0\..*q_proj",
        ),
    }[kind]
    model = build()
    adapters, _ = models.adapters(model, [targets] * 2)
    found = []
    for base in (model, copy.deepcopy(model).to(dtype)):
        batches = [
            {k: v.to(base.dtype) if v.is_floating_point() else v for k, v in b.items()}
            for b in loader
        ]
        spy = models.Spy()
        models.merge(
            adapters,
            batches,
            base,
            method=sm.Chain(sm.Prune(spy, sm.TopFraction(0.5), units=sm.Factors()), sm.Mean()),
        )
        found.append(spy)
    for key, gradient in found[1].gradient.items():
        assert gradient.dtype == torch.float32
        assert error(gradient, found[0].gradient[key]) < tolerance, key


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_float16_gradients_neither_vanish_nor_overflow(scale: float) -> None:
    """The loss is scaled up as far as its gradients stay finite,
    and the gradients are scaled back in float32.
    """
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator)
    updates = random_updates(model, ["0", "2"], 2, 0, torch.float32)
    loss = lambda model, batch: model(batch["x"]).float().square().mean() * scale  # noqa: E731
    wanted = dense_gradients(model, updates, [{"x": x}], loss)[1]
    _, layers = anchored(copy.deepcopy(model).half(), [{"x": x.half()}], [updates], loss)
    if scale > 1:  # even unscaled it overflows: an error, not a mask made of infinities
        with pytest.raises(
            NonFiniteError, match=r"gradient of layer '[02]' is NaN or infinite in adapter 'a0'"
        ):
            spied(layers, sm.Entries())
        return
    spy = spied(layers, sm.Entries())
    for name, gradient in wanted.items():
        assert 0 < float(gradient.abs().max()) < 6e-8  # nothing of it is a float16
        assert error(spy.gradient["a0", name, "entries"], gradient) < 2e-2


@pytest.mark.parametrize("growth", [1.0, 300.0])
def test_the_float16_scale_backs_off(growth: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(4, 8)
    updates = random_updates(model, ["0", "2"], 2, 0, torch.float32)
    loss = lambda model, batch: model(batch["x"]).float().square().mean() * growth  # noqa: E731
    wanted = dense_gradients(model, updates, [{"x": x}, {"x": -x}], loss)[1]
    _, layers = anchored(
        copy.deepcopy(model).half(), [{"x": x.half()}, {"x": -x.half()}], [updates], loss
    )
    spy = spied(layers, sm.Entries())
    for name, gradient in wanted.items():
        assert error(spy.gradient["a0", name, "entries"], gradient) < 2e-2


def calls_of(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("targets", "idle", "busy"), [
    (models.VISION_TARGETS, "text_model", "vision_model"),
    (models.TEXT_TARGETS, "vision_model", "text_model"),
])  # fmt: skip
def test_a_tower_that_no_adapter_touches_runs_once_per_batch(
    targets: str, idle: str, busy: str
) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [targets] * 3)
    idle_calls, busy_calls = calls_of(getattr(model, idle)), calls_of(getattr(model, busy))
    merged = models.merge(adapters, loader, model, method=sm.sap(0.9))
    assert merged.report.notes["anchor loss"].keys() == {
        "base model",
        "a0",
        "a1",
        "a2",
        "merged adapter",
    }
    assert len(idle_calls) == 2  # one per batch, for all passes together
    assert len(busy_calls) == 2 * (3 + 3 + 1 + 1)  # gradients and losses of three, base, merged


def test_both_towers_run_where_both_are_adapted() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS, models.TEXT_TARGETS])
    text = calls_of(model.text_model)
    models.merge(adapters, loader, model, method=FACTORS)
    assert len(text) == 4


def test_nothing_below_the_first_adapted_layer_is_differentiated() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [r".*vision_model.*layers\.1\..*(v_proj|fc1)"] * 2)
    asked: dict[str, bool] = {}
    for name, module in model.vision_model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, name=name: (
                asked.__setitem__(name, out.requires_grad) if isinstance(out, Tensor) else None
            )
        )
    models.merge(adapters, loader, model, method=FACTORS)
    below = [
        name
        for name in asked
        if "layers.0." in name or "embeddings" in name or name.endswith("layers.1.layer_norm1")
    ]
    assert len(below) > 6
    assert not any(asked[name] for name in below)
    assert not asked["encoder.layers.1.self_attn.q_proj"]  # beside the first one
    assert asked["encoder.layers.1.self_attn.out_proj"]
    assert asked["encoder.layers.1.mlp.fc2"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [Q.format(0), "vision_model.encoder.layers.1.layer_norm1"])
def test_nan_in_the_base_is_named(attention: str, name: str) -> None:
    model, loader = models.clip(attention), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[3] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        models.merge(adapters, loader, model, method=sm.sap(0.9))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nan_that_an_adapter_makes_is_named(attention: str) -> None:
    """float32 factors that overflow the model's float16:
    the layer is named, whatever attention makes of it.
    """
    model, loader = models.clip(attention), models.pairs()
    good, bad = (models.with_peft(model, models.VISION_TARGETS, seed=k) for k in (1, 2))
    with torch.no_grad():
        for key, parameter in bad.named_parameters():
            if f"{Q.format(1)}.lora_" in key:
                parameter.mul_(3e3)
    adapters = [models.adapter(good, "good"), models.adapter(bad, "bad")]
    before = state_of(half := copy.deepcopy(model).half())
    batches = [
        {k: v.half() if v.is_floating_point() else v for k, v in batch.items()} for batch in loader
    ]
    with pytest.raises(NonFiniteError) as caught:
        models.merge(adapters, batches, half)
    assert "adapter 'bad'" in str(caught.value)
    assert Q.format(1) in str(caught.value)
    assert_same_state(before, state_of(half))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gradient_that_is_nan_is_named(attention: str) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * float("nan")

    model, loader = models.clip(attention), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    model.get_submodule("vision_model.encoder.layers.1.layer_norm2").register_forward_hook(
        lambda _, __, out: Bad.apply(out)
    )
    before = state_of(model)
    with pytest.raises(
        NonFiniteError,
        match=r"gradient of layer 'vision_model.encoder.layers.1.self_attn.q_proj'.*adapter",
    ):
        models.merge(adapters, loader, model, method=sm.sap(0.9))
    assert_same_state(before, state_of(model))


def test_layers_that_take_no_part_have_scores_of_zero() -> None:
    """LLaVA looks at the last but one layer of its vision tower;
    an adapter of the last one has no gradient.
    """
    model, loader = models.llava(), models.prompts()
    adapters, _ = models.adapters(model, [r".*vision_tower.*fc1|.*language_model.*q_proj"] * 2)
    spy = models.Spy()
    method = sm.Chain(sm.Prune(spy, sm.TopFraction(0.5), units=sm.Factors()), sm.Mean())
    with pytest.warns(SapmergeWarning, match="1 layers take no part in the anchor loss") as caught:
        merged = models.merge(adapters, loader, model, method=method)
    assert len(caught) == 1
    report = merged.report
    dead = [
        name
        for name in merged.run.stream.modules
        if "vision_tower" in name and ".layers.1." in name
    ]
    assert len(dead) == 1
    assert report.notes["layers without gradient"] == dead
    for (_, name, _), gradient in spy.gradient.items():
        assert gradient.abs().sum() == 0 if name in dead else gradient.abs().sum() > 0
    with pytest.warns(SapmergeWarning, match="1 layers") as caught:
        models.merge(adapters, loader, model, method=sm.sap(0.9, scorer=sm.SecondOrder()))
    assert len(caught) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    plain = dict(models.merge(adapters, loader, model, method=FACTORS).updates())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    for name, update in models.merge(adapters, loader, model, method=FACTORS).updates():
        assert torch.equal(update.dense(), plain[name].dense())
    assert model.training


@pytest.mark.parametrize("statistic", ["mean", "absolute"])
def test_checkpointing_in_eval_mode(statistic: str) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
            self.checkpointing = True

        def block(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return x

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):  # every layer is called twice
                x = (
                    checkpoint(self.block, x, use_reentrant=False)
                    if self.checkpointing
                    else self.block(x)
                )
            return x

    model = Stack().double()
    batches = [{"x": torch.randn(3, 2, 5, dtype=torch.float64)}]
    loss = lambda model, batch: model(**batch).square().mean()  # noqa: E731
    updates = random_updates(model, ["layers.0", "layers.2"], 2, 1)
    found = []
    for checkpointing in (True, False):
        model.checkpointing = checkpointing
        found.append(
            spied(anchored(model, batches, [updates], loss)[1], sm.Entries(), statistic=statistic)
        )
    for key, gradient in found[0].gradient.items():
        assert float(gradient.norm()) > 1e-4
        assert error(gradient, found[1].gradient[key]) < 1e-12


def test_a_model_without_the_module_or_with_another_shape() -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    with pytest.raises(ModelMismatchError, match="has no module"):
        models.merge(adapters, loader, models.llama())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_model_and_merge_on_different_devices(device: str) -> None:
    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.BOTH_TARGETS] * 2)
    for units in (sm.Factors(), sm.Directions(), sm.Layers()):
        plain = dict(
            models.merge(adapters, loader, model, method=sm.sap(0.9, units=units)).updates()
        )
        there = models.merge(
            adapters,
            loader,
            copy.deepcopy(model).cuda(),
            method=sm.sap(0.9, units=units),
            device=device,
        )
        for name, update in there.updates():
            assert update.device.type == device
            assert error(update.dense().cpu(), plain[name].dense()) < 1e-3
        assert "merged" in there.report.notes["anchor loss"]
