"""Entropic transport between small clouds of points, in float64, with squared distances for costs.

OT_eps(a, b) = min_P <P, C> + eps KL(P | a b^T),    P 1 = a,  P^T 1 = b
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "assign",
    "divergence",
    "nearest_plan",
    "sinkhorn",
    "squared_distances",
    "transport_cost",
]


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m), at least 0."""
    products = x @ y.T
    found = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * products
    return found.clamp_min_(0)


def nearest_plan(costs: Tensor, epsilon: float) -> Tensor:
    """The plan from n points of equal mass to atoms whose masses are free, which has a closed form.

        P_ij = softmax_j(-C_ij / eps) / n

    Args:
        costs: (n, m).
        epsilon: in the unit of the costs; at 0 all goes to the nearest atom.
    """
    if epsilon <= 0:
        plan = torch.zeros_like(costs)
        return plan.scatter_(1, costs.argmin(1, keepdim=True), 1 / len(costs))
    return torch.softmax(-costs / epsilon, 1) / len(costs)


def sinkhorn(a: Tensor, b: Tensor, costs: Tensor, epsilon: float, steps: int = 10_000) -> Tensor:
    """The plan of OT_eps, by iterations on logarithms, until its rows are right to 1e-12.

    Args:
        a: (n,) masses of the rows, above 0, of sum 1.
        b: (m,) masses of the columns.
        costs: (n, m).
        epsilon: above 0.
    """
    rows, columns, kernel = a.log(), b.log(), -costs / epsilon
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for step in range(steps):
        f = rows - torch.logsumexp(kernel + g, 1)
        g = columns - torch.logsumexp(kernel + f[:, None], 0)
        if step % 10 == 0:
            plan = torch.exp(kernel + f[:, None] + g)
            if float((plan.sum(1) - a).abs().max()) < 1e-12:
                return plan
    return torch.exp(kernel + f[:, None] + g)


def transport_cost(x: Tensor, a: Tensor, y: Tensor, b: Tensor, epsilon: float) -> float:
    """OT_eps between points x with masses a and points y with masses b."""
    costs = squared_distances(x, y)
    plan = sinkhorn(a, b, costs, epsilon)
    entropy = torch.xlogy(plan, plan / (a[:, None] * b)).sum()
    return float((plan * costs).sum() + epsilon * entropy)


def divergence(x: Tensor, a: Tensor, y: Tensor, b: Tensor, epsilon: float) -> float:
    """Sinkhorn's divergence: OT_eps(x, y) - (OT_eps(x, x) + OT_eps(y, y)) / 2; 0 for equal clouds.

    Source: Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn
    divergences", https://arxiv.org/abs/1810.08278
    """
    own = transport_cost(x, a, x, a, epsilon) + transport_cost(y, b, y, b, epsilon)
    return transport_cost(x, a, y, b, epsilon) - own / 2


def assign(costs: Tensor) -> list[int]:
    """The distinct column of each row at the least total cost: shortest augmenting paths.

    Args:
        costs: (m, n), m <= n.

    Source: Jonker and Volgenant, Computing 1987.
    """
    m, n = costs.shape
    rows, columns = costs.new_zeros(m), costs.new_zeros(n)  # dual prices
    owner = torch.full((n,), -1)
    for row in range(m):
        least = costs.new_full((n,), math.inf)
        before = torch.full((n,), -1)
        done, path, at, last = torch.zeros(n, dtype=torch.bool), list[int](), row, -1
        while True:
            slack = costs[at] - rows[at] - columns
            better = ~done & (slack < least)
            least[better], before[better] = slack[better], last
            column = int(least.masked_fill(done, math.inf).argmin())
            step = least[column].clone()
            for taken in path:
                rows[owner[taken]] += step
                columns[taken] -= step
            rows[row] += step
            least[~done] -= step
            done[column] = True
            if owner[column] < 0:
                break
            path.append(column)
            at, last = int(owner[column]), column
        while column >= 0:
            previous = int(before[column])
            owner[column] = row if previous < 0 else owner[previous]
            column = previous
    return [int((owner == row).nonzero()) for row in range(m)]
