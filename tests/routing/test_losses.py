"""The losses of a router: formulas."""

from __future__ import annotations

import torch

from sapmerge.routing.losses import balance_loss, z_loss


def test_balance_is_one_when_even_and_the_count_for_one_expert() -> None:
    assert float(balance_loss(torch.full((10, 4), 0.25))) == 1
    assert float(balance_loss(torch.eye(4)[torch.zeros(10, dtype=torch.long)])) == 4


def test_balance_is_its_formula() -> None:
    P = torch.softmax(torch.randn(3, 5, 4, dtype=torch.float64), -1)
    wanted = 0.0
    for one in P.numpy():
        share = [(one.argmax(1) == e).mean() for e in range(4)]
        wanted += 4**2 * sum(one[:, e].mean() * share[e] for e in range(4)) / 4 / 3
    assert abs(float(balance_loss(P)) - wanted) < 1e-12


def test_z_is_its_formula() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64)
    wanted = logits.exp().sum(1).log().square().mean()
    assert torch.allclose(z_loss(logits), wanted)
    P = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(z_loss, (P,))
    assert torch.autograd.gradcheck(balance_loss, (P,))
