"""Pilot's client modules: golden numbers, formulas by loops, and what has a gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sapmerge as sm
from sapmerge.federated import MixtureOfAdapters, TwoAdapters, balance_loss, difference_loss, z_loss

G = load_file(Path(__file__).parents[1] / "goldens" / "federated" / "pilot.safetensors")


def filled(module: nn.Sequential, number: int) -> None:
    for linear, at in ((module[0], 0), (module[2], 2)):
        linear.weight.data = G[f"moa.mlp{number}.{at}"].T.clone()
        linear.bias.data = G[f"moa.mlp{number}.{at + 1}"].clone()


def mixture(top_k: int | None = None) -> MixtureOfAdapters:
    """The golden's: psi_t1, psi_t of two more tasks, their psi_c, then psi_s."""
    own, others = TwoAdapters(6, 4), [TwoAdapters(6, 4).psi_t for _ in range(2)]
    made = MixtureOfAdapters(own, others, top_k).double()
    filled(made.psi_t, 0)
    for k in range(2):
        filled(made.others[k], 1 + k)
        filled(made.psi_c[k], 3 + k)
    filled(made.psi_s, 5)
    made.router.weight.data = G["moa.router"].T.clone()
    return made


@pytest.mark.parametrize(
    ("top_k", "name"), [(None, "moa.out"), (2, "moa.out.top2"), (3, "moa.out")]
)
def test_the_mixture_is_the_golden(top_k: int | None, name: str) -> None:
    found = mixture(top_k).mixed(G["moa.H"])
    assert torch.allclose(found.x, G[name], atol=1e-12)
    assert torch.allclose(found.probabilities, G["moa.P"], atol=1e-12)
    assert torch.allclose(found.weights.sum(-1), torch.ones(2, 5).double())
    assert torch.equal(mixture(top_k)(G["moa.H"]), found.x)


def test_its_losses_are_the_golden() -> None:
    found = mixture().requires_grad_(False).mixed(G["moa.H"])
    assert float(balance_loss(found.probabilities)) == pytest.approx(
        float(G["moa.balance"]), abs=1e-12
    )
    assert float(z_loss(found.logits)) == pytest.approx(float(G["moa.z"]), abs=1e-12)


def test_the_difference_losses_are_the_golden() -> None:
    xt, xs = G["diff.xt"], G["diff.xs"]
    assert float(difference_loss(xt[0], xs[0])) == pytest.approx(
        float(G["diff.literal"]), rel=1e-12
    )
    found = float(difference_loss(xt, xs, form="official"))
    assert found == pytest.approx(float(G["diff.official"]), rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 7, 4), (3, 4, 7), (5, 6)])
def test_the_difference_loss_is_its_formula(shape: tuple[int, ...]) -> None:
    xt, xs = torch.randn(2, *shape, dtype=torch.float64)
    samples = [(xt, xs)] if len(shape) == 2 else list(zip(xt, xs))
    wanted = sum(float((t.T @ s).square().sum()) for t, s in samples) / len(samples)
    assert float(difference_loss(xt, xs)) == pytest.approx(wanted, rel=1e-12)


def official(xt: Tensor, xs: Tensor) -> Tensor:
    """As the public code writes it, the (N C, N C) matrix and all."""
    t, s = xt.reshape(len(xt), -1), xs.reshape(len(xs), -1)
    t = t / (t.norm(p=2, dim=1, keepdim=True).detach() + 1e-6)
    s = s / (s.norm(p=2, dim=1, keepdim=True).detach() + 1e-6)
    return (t.t() @ s).pow(2).mean()


def test_the_official_form_has_the_gradient_of_the_big_matrix() -> None:
    xt, xs = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    xt.requires_grad_(), xs.requires_grad_()
    ours = torch.autograd.grad(difference_loss(xt, xs, "official"), (xt, xs))
    theirs = torch.autograd.grad(official(xt, xs), (xt, xs))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(ours, theirs))


def test_the_papers_form_has_its_gradient() -> None:
    for shape in ((2, 5, 3), (2, 3, 5)):
        x = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert torch.autograd.gradcheck(difference_loss, x)


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_mixture_has_the_gradient_of_its_formula(top_k: int | None) -> None:
    made = mixture(top_k)
    assert torch.autograd.gradcheck(made, (G["moa.H"].clone().requires_grad_(),))


def test_stage_two_trains_what_it_should() -> None:
    made = MixtureOfAdapters(TwoAdapters(6, 4), [TwoAdapters(6, 4).psi_t])
    made.router.weight.data.normal_()
    loss = made(torch.randn(2, 5, 6)).square().sum()
    loss.backward()
    moved = {name.partition(".")[0] for name, p in made.named_parameters() if p.grad is not None}
    assert moved == {"psi_t", "psi_c", "router"}
    assert {n.partition(".")[0] for n, p in made.named_parameters() if not p.requires_grad} == {
        "psi_s",
        "others",
    }


def test_a_mixture_begins_with_what_is_there() -> None:
    own, other = TwoAdapters(6, 4), TwoAdapters(6, 4)
    h = torch.randn(2, 5, 6)
    wanted = own.psi_s(h) + (own.psi_t(h) + other.psi_t(h)) / 2
    assert torch.allclose(MixtureOfAdapters(own, [other.psi_t])(h), wanted, atol=1e-6)
    assert torch.allclose(MixtureOfAdapters(own, [])(h), own(h), atol=1e-6)


def test_two_adapters_are_their_sum() -> None:
    own, h = TwoAdapters(6, 4), torch.randn(2, 5, 6)
    x_t, x_s = own.both(h)
    gelu = nn.functional.gelu(h @ own.psi_t[0].weight.T + own.psi_t[0].bias)
    assert torch.allclose(x_t, gelu @ own.psi_t[2].weight.T + own.psi_t[2].bias, atol=1e-6)
    assert torch.equal(own(h), x_t + x_s)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(sm.MethodError, match="top_k"):
        MixtureOfAdapters(TwoAdapters(2, 2), [], top_k=2)
    with pytest.raises(sm.MethodError, match="both alike"):
        difference_loss(torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(sm.MethodError, match="form"):
        difference_loss(torch.ones(2, 2), torch.ones(2, 2), form="mine")  # type: ignore[arg-type]
