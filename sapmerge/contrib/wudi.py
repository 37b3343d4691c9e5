"""WUDI: the update whose rows disturb every adapter least, without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapmerge.core.layer import Layer
from sapmerge.core.linalg import RTOL, norm, numerical_rank, qr, svd
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.part import part
from sapmerge.core.protocols import Method
from sapmerge.core.updates import Dense, LowRank, Update, zero_of
from sapmerge.errors import MethodError
from sapmerge.parts.wrappers import Chain

__all__ = ["WUDI", "WUDISteps", "wudi"]


def wudi() -> Method:
    """WUDI: min_X sum_t |(X - D_t) D_t^T|^2 / |D_t|^2, solved exactly.

        X = (sum_t D_t G_t) (sum_t G_t)^+,    G_t = D_t^T D_t / |D_t|^2

    RegMean with Gram matrices made of the updates instead of data. Exact, of rank at most the sum
    of the ranks; the cost is that of the core space.
    Like a mean it has the size of one update, not of their sum.

    The authors do not solve it: they take 300 steps of Adam with lr 1e-5 from the sum of the
    updates, which moves no entry by more than about 3e-3. `WUDISteps()` does that, and made the
    published numbers; there the sum is what decides for updates with larger entries,
    and the closed form is far away.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.wudi())

    Source: Cheng et al., "Whoever started the interference should end it: Guiding data-free model
    merging via task vectors", https://arxiv.org/abs/2503.08099
    """
    return Chain(WUDI())


@part
class WUDI:
    """X = (sum_t D_t G_t) (sum_t G_t)^+ with G_t = D_t^T D_t / |D_t|^2,
    in the row space of the updates.

    With N_t = D_t / |D_t| stacked to N, sum G_t = N^T N, so X = [|D_t| N_t N_t^T]_t (N^+)^T:
    nothing is squared, and directions of N below `rtol` are dropped.

    Args:
        rtol: singular values of N below this share of the largest are noise.

    A weight multiplies its term of the loss, and its sign the update: X = (sum w D G) (sum |w|
    G)^+. Zero updates have no term.
    """

    rtol: float = RTOL

    def __post_init__(self) -> None:
        if not 0 < self.rtol < 1:
            raise MethodError(
                f"rtol is a share of the largest singular value, in (0, 1); got {self.rtol!r}"
            )

    def __call__(self, layer: Layer) -> Update:
        problem = _Problem.of(layer)
        if problem is None:
            return zero_of(layer.updates[0])
        roots = [abs(term.weight) ** 0.5 for term in problem.terms]
        stacked = torch.cat(
            [root * term.unit for root, term in zip(roots, problem.terms, strict=True)]
        )
        left = [
            term.frame @ (term.unit @ term.unit.T) * (root * term.sign * term.norm)
            for root, term in zip(roots, problem.terms, strict=True)
        ]
        U, sigma, Vh = svd(stacked)
        keep = numerical_rank(sigma, self.rtol)
        B = torch.cat(left, dim=1) @ U[:, :keep] / sigma[:keep]
        dtype = layer.updates[0].dtype
        return LowRank(B.to(dtype), (Vh[:keep] @ problem.rows.T).to(dtype))


@part
class WUDISteps:
    """The authors' solver: steps of Adam on sum_t |(X - D_t) D_t^T|^2 / |D_t|^2 from X
    = sum_t w_t D_t.

    A step moves an entry by at most about `lr`, whatever its size: the result depends on the scale
    of the updates, and on the coordinates, so it is dense, and one (m, n) matrix per state of Adam
    is made. The gradient is written out: 2 (X G - H), G = sum |w_t| G_t and H = sum w_t D_t G_t.
    Float64, no randomness.

    Args:
        lr: the length of a step.
        steps: how many.
    """

    lr: float = 1e-5
    steps: int = 300

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.steps < 1:
            raise MethodError(
                f"WUDISteps takes lr > 0 and steps >= 1; got lr={self.lr!r}, steps={self.steps!r}"
            )

    def __call__(self, layer: Layer) -> Update:
        problem = _Problem.of(layer)
        if problem is None:
            return zero_of(layer.updates[0])
        G = torch.stack([abs(t.weight) * t.unit.T @ t.unit for t in problem.terms]).sum(0)
        H = torch.stack(
            [t.frame @ (t.unit @ t.unit.T @ t.unit) * (t.weight * t.norm) for t in problem.terms]
        ).sum(0)
        X = weighted_sum(layer, layer.weights).dense().double().clone()
        mean, square = torch.zeros_like(X), torch.zeros_like(X)
        for step in range(1, self.steps + 1):
            gradient = 2 * ((X @ problem.rows) @ G - H) @ problem.rows.T
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            size = square.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
            X.addcdiv_(mean, size, value=-self.lr / (1 - 0.9**step))
        return Dense(X.to(layer.updates[0].dtype))


@dataclass(frozen=True)
class _Term:
    """D = norm * frame @ unit @ rows^T: `frame` (m, p) and `rows` (n, q) orthonormal, `unit`
    (p, q) of norm 1.
    """

    frame: Tensor
    unit: Tensor
    norm: float
    weight: float

    @property
    def sign(self) -> float:
        return -1.0 if self.weight < 0 else 1.0


@dataclass(frozen=True)
class _Problem:
    """The updates that are not zero, in an orthonormal basis `rows` (n, q) of all
    their rows; float64.
    """

    rows: Tensor
    terms: tuple[_Term, ...]

    @staticmethod
    def of(layer: Layer) -> _Problem | None:
        factors = [(*_factors(m.update), m.weight) for m in layer.members if m.counts]
        if not factors:
            return None
        rows, R = qr(torch.cat([A for _, A, _ in factors]).T)
        terms: list[_Term] = []
        start = 0
        for B, A, weight in factors:
            frame, triangle = qr(B)
            core = triangle @ R[:, start : start + A.shape[0]].T
            start += A.shape[0]
            if (size := norm(core)) > 0:
                terms.append(_Term(frame, core / size, size, weight))
        return _Problem(rows, tuple(terms)) if terms else None


def _factors(update: Update) -> tuple[Tensor, Tensor]:
    """B and A in float64."""
    if isinstance(update, LowRank):
        return update.B.double(), update.A.double()
    U, sigma, Vh = update.svd()
    keep = numerical_rank(sigma)
    return U[:, :keep] * sigma[:keep], Vh[:keep]
