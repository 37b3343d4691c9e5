"""What a client of Pilot trains: two connector adapters, then a mixture of them over the tasks.
Plain torch modules.

Stage 1 trains `TwoAdapters`, kept apart by `difference_loss`; stage 2 trains `MixtureOfAdapters`
with `balance_loss` and `z_loss`, and the LoRA of the language model. The server's side is `pilot`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sapmerge.errors import MethodError
from sapmerge.routing.losses import balance_loss, z_loss

__all__ = [
    "Mixed",
    "MixtureOfAdapters",
    "TwoAdapters",
    "balance_loss",
    "difference_loss",
    "z_loss",
]


class TwoAdapters(nn.Module):
    """A connector of two parts, x = psi_t(h) + psi_s(h): one for the task, one for the client.

    Each is Linear-GELU-Linear. A drop-in for LLaVA's projector.

    Args:
        inputs: features of the vision tower.
        outputs: the width of the language model; also that of the layer between.

    Source: Xiong et al., "Pilot: building the federated multimodal instruction tuning framework"
    (AAAI 2025), https://arxiv.org/abs/2501.13985. The paper's text; its public code differs (see
    `docs/pilot.md`).

    Example:
        >>> TwoAdapters(6, 4)(torch.zeros(2, 5, 6)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.psi_t, self.psi_s = _mlp(inputs, outputs), _mlp(inputs, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """x = x_t + x_s, (..., outputs), from features h (..., inputs)."""
        x_t, x_s = self.both(h)
        return x_t + x_s

    def both(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and x_s, for the difference loss."""
        return self.psi_t(h), self.psi_s(h)


class Mixed(NamedTuple):
    """What a mixture makes of features, for the losses.

    Args:
        x: (..., N, outputs).
        weights: (..., N, tasks), after the cut to `top_k`.
        probabilities: (..., N, tasks), before it.
        logits: (..., N, tasks).
    """

    x: Tensor
    weights: Tensor
    probabilities: Tensor
    logits: Tensor


class MixtureOfAdapters(nn.Module):
    """CT-MoA: the client's own adapters, and those of the other tasks beside new ones that fit them
    to this one.

        P = softmax(h W_r),   x = psi_s(h) + P_1 psi_t1(h) + sum_{i > 1} P_i (psi_ti(h) + psi_ci(h))

    psi_t1, every psi_c and the router W_r are trained; psi_s and the other tasks' psi_t are not.
    The router begins at 0 (all tasks alike), psi_c at a copy of its psi_t with nothing in the last
    layer.

    Args:
        own: of stage 1; copied.
        others: psi_t of every other task (`TwoAdapters.psi_t`), from the server; copied.
        top_k: tasks per token, their weights made to sum to 1; None: all.

    Raises:
        MethodError: `top_k` is out of range.

    Source: as `TwoAdapters`
    """

    def __init__(
        self, own: TwoAdapters, others: Sequence[nn.Sequential], top_k: int | None = None
    ) -> None:
        super().__init__()
        if top_k is not None and not 1 <= top_k <= len(others) + 1:
            raise MethodError(f"top_k is from 1 to {len(others) + 1}, the tasks; got {top_k!r}")
        self.top_k = top_k
        self.psi_s, self.psi_t = copy.deepcopy(own.psi_s), copy.deepcopy(own.psi_t)
        self.others = nn.ModuleList(copy.deepcopy(other) for other in others)
        self.psi_c = nn.ModuleList(_fitting(other) for other in others)
        first = own.psi_t[0]
        assert isinstance(first, nn.Linear)
        self.router = nn.Linear(first.in_features, len(others) + 1, bias=False)
        nn.init.zeros_(self.router.weight)
        for module in self.modules():
            module.requires_grad_(True)
        for frozen in (self.psi_s, self.others):
            frozen.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        """x, (..., N, outputs), from features h (..., N, inputs)."""
        return self.mixed(h).x

    def mixed(self, h: Tensor) -> Mixed:
        """x, and what the losses need."""
        logits: Tensor = self.router(h)
        P = torch.softmax(logits, -1)
        weights = P
        if self.top_k is not None:
            values, index = P.topk(self.top_k, -1)
            kept = torch.zeros_like(P).scatter(-1, index, values)
            weights = kept / kept.sum(-1, keepdim=True)
        x: Tensor = self.psi_s(h) + weights[..., :1] * self.psi_t(h)
        for i, (psi_t, psi_c) in enumerate(zip(self.others, self.psi_c, strict=True), start=1):
            x = x + weights[..., i : i + 1] * (psi_t(h) + psi_c(h))
        return Mixed(x, weights, P, logits)


def difference_loss(
    x_t: Tensor, x_s: Tensor, form: Literal["paper", "official"] = "paper"
) -> Tensor:
    """How much the two adapters say the same.

    "paper": ||x_t^T x_s||_F^2 of a sample's N tokens, and the mean over the samples. It equals
    <x_t x_t^T, x_s x_s^T>, so the smaller of the two pairs of Gram matrices is formed, (N, N) or
    (C, C). "official": the loss of the public code (that of domain separation networks): samples as
    rows of N C entries, each over its norm + 1e-6, without a gradient of that, and the mean of
    (x_t^T x_s)^2 over all (N C)^2 entries. It compares samples, not tokens; formed from two Gram
    matrices (samples, samples).

    Args:
        x_t: (samples, N, C) or (N, C).
        x_s: of the same shape.
        form: which of them.

    Returns:
        A scalar.

    Raises:
        MethodError: shapes that differ or have another number of dimensions.

    Source: as `TwoAdapters`; Bousmalis et al., "Domain separation networks" (2016),
    https://arxiv.org/abs/1608.06019
    """
    if x_t.shape != x_s.shape or x_t.ndim not in (2, 3):
        raise MethodError(
            f"x_t and x_s are (samples, N, C) or (N, C), both alike; got {tuple(x_t.shape)} and "
            f"{tuple(x_s.shape)}"
        )
    if form not in ("paper", "official"):
        raise MethodError(f"form is 'paper' or 'official'; got {form!r}")
    if x_t.ndim == 2:
        x_t, x_s = x_t[None], x_s[None]
    if form == "paper":
        if x_t.shape[1] > x_t.shape[2]:
            return (x_t.mT @ x_s).square().sum((-1, -2)).mean()
        return ((x_t @ x_t.mT) * (x_s @ x_s.mT)).sum((-1, -2)).mean()
    rows = [x.flatten(1) for x in (x_t, x_s)]
    a, b = (x / (x.detach().square().sum(1, keepdim=True).sqrt() + 1e-6) for x in rows)
    return ((a @ a.T) * (b @ b.T)).sum() / a.shape[1] ** 2


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def _fitting(other: nn.Sequential) -> nn.Sequential:
    """psi_c of a task: begins with what its psi_t looks at, and adds nothing."""
    made = copy.deepcopy(other)
    for parameter in made[-1].parameters():
        nn.init.zeros_(parameter)
    return made
