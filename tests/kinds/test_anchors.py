"""Gradients and losses at base + adapter, for kinds that no forward hook shows,
against autograd on the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.anchors import Anchors
from sapmerge.merging.inputs import with_base

from . import helpers as h
from .helpers import QV, merged, train


def _tokens(batches: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 64, (3, 8), generator=generator) for _ in range(batches)]
    return [{"input_ids": some, "labels": some} for some in ids]


def _images(width: int = 32) -> list[Tensor]:
    return [torch.randn(3, 5, width, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]


def _square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def _own(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
CASES: dict[str, Any] = {
    "attention": (h.tower, {"target_modules": ["attn", "mlp.0"]}, _images, _square),
    "experts": (h.qwen_moe, {"target_modules": QV, "target_parameters": [UP, DOWN]}, _tokens, _own),
    "transposed experts": (
        h.gpt_oss,
        {"target_modules": QV, "target_parameters": [UP]},
        _tokens,
        _own,
    ),
    "dora": (h.llama, {"target_modules": QV, "use_dora": True}, _tokens, _own),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_at_base_and_adapter(case: str, tmp_path: Path) -> None:
    make, settings, batches, loss = CASES[case]
    path, model = train(tmp_path, make, 1, r=2, **settings), make()
    [adapter] = with_base([sm.Adapter.load(path)], model)
    loader = batches()
    anchors = Anchors(
        model,
        loader,
        adapter.modules,
        [("a", lambda: {n: adapter.update(n) for n in adapter.modules})],
        loss,
    )
    found = {
        name: torch.zeros(module.shape, dtype=torch.float64)
        for name, module in adapter.modules.items()
    }
    before = h.state(model)

    def sink(name: str) -> Any:
        def add(gradient: Any, size: int) -> None:
            found[name] += gradient.together().dense()[0].double() * size

        return add

    count = anchors.backward(0, {name: sink(name) for name in adapter.modules})
    # The same by autograd, on a model into which PEFT has merged the adapter.
    other: Any = make()
    other.load_state_dict(
        {key: value.float() for key, value in h.unloaded(make, path).items()}, strict=False
    )
    other.eval()
    total = sum(loss(other, batch) * 3 for batch in loader)
    total.backward()
    from sapmerge.models import find_sites

    for name, site in find_sites(other, adapter.modules).items():
        assert site.parameter.grad is not None
        part = site.parameter.grad[site.part] if site.part else site.parameter.grad
        wanted = part.T if site.transposed else part.reshape(part.shape[0], -1)
        error = (found[name] - wanted.double()).norm() / wanted.norm().clamp_min(1e-12)
        assert error < 2e-4 or wanted.norm() < 1e-9, (name, float(error))
    assert anchors.loss_at(0) == pytest.approx(float(total) / count, rel=1e-4)
    after = h.state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not any(
        isinstance(value, Tensor) for module in model.modules() for value in vars(module).values()
    )


@pytest.mark.parametrize(
    "method",
    [sm.sap(), sm.Chain(sm.Prune(sm.Taylor(), sm.TopFraction(0.5), units=sm.Entries()), sm.Mean())],
)
@pytest.mark.parametrize("case", ["attention", "experts"])
def test_methods_that_read_gradients(case: str, method: Any, tmp_path: Path) -> None:
    make, settings, batches, loss = CASES[case]
    paths = [train(tmp_path, make, k, r=2, **settings) for k in (1, 2)]
    done = merged(paths, method, anchor_loader=batches(), model=make(), loss=loss)
    done.save_pretrained(tmp_path / "out")
    model = make()
    done.apply_to(model)
    h.compare(make, h.unloaded(make, tmp_path / "out"), h.state(model), 1e-4)


def test_inputs_of_experts_cannot_be_seen(tmp_path: Path) -> None:
    make, settings, batches, loss = CASES["experts"]
    paths = [train(tmp_path, make, k, r=2, **settings) for k in (1, 2)]
    with pytest.raises(sm.AnchorError, match="cannot be seen"):
        merged(
            paths, sm.regmean(), anchor_loader=batches(), model=make(), loss=loss
        ).save_pretrained(tmp_path / "out")


def test_biases_follow_the_method_of_their_module(tmp_path: Path) -> None:
    """`ByModule` has a sum for values, a mean for queries; `Tune` has chosen half of a sum."""
    paths = [train(tmp_path, h.biased_llama, k, target_modules=QV, lora_bias=True) for k in (1, 2)]
    mean, total = (h.target(h.biased_llama, paths, total=total) for total in (False, True))
    apart = sm.ByModule({"*v_proj": sm.task_arithmetic()}, default=sm.mean())
    model = h.biased_llama()
    merged(paths, apart).apply_to(model)
    wanted = {key: (total if "v_proj" in key else mean)[key] for key in mean}
    h.compare(h.biased_llama, h.state(model), wanted)
    # For two adapters half of a sum is the mean.
    tuned, half = sm.Tune({"sum": sm.task_arithmetic()}, scales=(0.5,)), h.biased_llama()
    merged(paths, tuned, anchor_loader=_tokens(), model=h.biased_llama()).apply_to(half)
    h.compare(h.biased_llama, h.state(half), mean)
