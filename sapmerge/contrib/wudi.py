"""WUDI: the update whose rows disturb every adapter least, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


def wudi(
    share: float | Literal["auto"] = 1.0,
    start: Literal["sum", "mean"] = "sum",
    steps: float | None = None,
) -> Method:
    """WUDI: min_X sum_t |(X - D_t) D_t^T|^2 / |D_t|^2, solved exactly.

        X = (sum_t D_t G_t) (sum_t G_t)^+,    G_t = D_t^T D_t / |D_t|^2

    RegMean with Gram matrices made of the updates instead of data. Exact, of rank at most the sum
    of the ranks; the cost is that of the core space.
    Like a mean it has the size of one update, not of their sum.

    The authors do not solve it: they take 300 steps of Adam with lr 1e-5 from the sum of the
    updates, which moves no entry by more than about 3e-3. `WUDISteps()` does that, and made the
    published numbers; there the sum is what decides for updates with larger entries,
    and the closed form is far away.

    Args:
        share: SWUDI: solved on that share of the directions, those in which the updates read most;
            what is in the others stays as it was in the start. "auto" is SWUDI-A.
        start: the sum of the updates, or their mean; immaterial at share 1 without `steps`.
        steps: SWUDI: gradient flow from the start for that long, instead of the solution; a
            direction with eigenvalue l of sum_t G_t has gone 1 - exp(-l steps) of the way.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["art", "sketch", "cartoon"], method=sm.wudi())

    Source: Cheng et al., "Whoever started the interference should end it: Guiding data-free model
    merging via task vectors", https://arxiv.org/abs/2503.08099; SWUDI:
    https://arxiv.org/abs/2606.07289
    """
    return Chain(WUDI(share=share, start=start, steps=steps))


@part
class WUDI:
    """X = (sum_t D_t G_t) (sum_t G_t)^+ with G_t = D_t^T D_t / |D_t|^2,
    in the row space of the updates.

    With N_t = D_t / |D_t| stacked to N, sum G_t = N^T N, so X = [|D_t| N_t N_t^T]_t (N^+)^T:
    nothing is squared, and directions of N below `rtol` are dropped.

    Args:
        rtol: singular values of N below this share of the largest are noise.
        share: of the directions of N that are solved for, the largest first: in (0, 1], or "auto"
            for (sum s)^2 / sum s^2 of them, s the singular values of N; at least one, rounded up.
        start: X0, the sum sum w D or the mean sum w D / sum w.
        steps: None solves; a number is the length of a gradient flow from X0.

    With sum G_t = V L V^T and H = sum D_t G_t it is X0 (I - V F V^T) + H V (F / L) V^T, where F is
    1 - exp(-L steps) on the directions that are solved for and 0 on the others.

    A weight multiplies its term of the loss, and its sign the update: X = (sum w D G) (sum |w|
    G)^+. Zero updates have no term.
    """

    rtol: float = RTOL
    share: float | str = 1.0
    start: Literal["sum", "mean"] = "sum"
    steps: float | None = None

    def __post_init__(self) -> None:
        fine = self.share == "auto" or (not isinstance(self.share, str) and 0 < self.share <= 1)
        if not fine or (self.steps is not None and not self.steps >= 0):
            raise MethodError(
                "WUDI's share is in (0, 1] or 'auto', steps a number from 0 on or None; got "
                f"share={self.share!r}, steps={self.steps!r}"
            )
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
        gone = self._gone(sigma[:keep])
        if bool((gone == 1).all()):
            return LowRank(B.to(dtype), (Vh[:keep] @ problem.rows.T).to(dtype))
        first = self._first(problem)
        moved = first + ((B - first @ Vh[:keep].T) * gone) @ Vh[:keep]
        return LowRank(moved.to(dtype), problem.rows.T.to(dtype))

    def _gone(self, sigma: Tensor) -> Tensor:
        """F: how far every direction goes from the start to the solution."""
        effective = float(sigma.sum().square() / sigma.square().sum()) / len(sigma)
        share = effective if isinstance(self.share, str) else self.share
        solved = torch.arange(len(sigma), device=sigma.device) < share * len(sigma) - 1e-9
        if self.steps is None:
            return solved.to(sigma.dtype)
        return torch.where(solved, 1 - torch.exp(-sigma.square() * self.steps), 0.0)

    def _first(self, problem: _Problem) -> Tensor:
        """X0 in the basis of the rows."""
        parts = [term.frame @ term.unit * (term.weight * term.norm) for term in problem.terms]
        total = torch.stack(parts).sum(0)
        if self.start == "sum":
            return total
        weights = sum(term.weight for term in problem.terms)
        if weights == 0:
            raise MethodError("the weights sum to zero: WUDI has no mean to start from")
        return total / weights


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
