"""Plans between the neurons of two models, by Gromov-Wasserstein transport."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sapmerge.core.linalg import svd
from sapmerge.errors import MethodError, SapmergeError

__all__ = ["Plan", "gromov_plan", "neuron_distances"]

_QUANTILES = 64


def neuron_distances(matrix: Tensor, rank: int | None = None) -> Tensor:
    """Squared distances between rows, divided by their mean; float64.

        C_ij = |R_i - R_j|^2 / mean,    R = U S, the r leading columns

    Between neurons, and not between components: orthonormal columns are all equally far from each
    other, and weighted by singular values their distances s_i^2 + s_j^2 know the spectrum alone.

    Args:
        matrix: (m, n) weights or an update.
        rank: of R; None: all of the matrix, which needs no decomposition.

    Raises:
        MethodError: rows that are all equal, or NaN.
    """
    rows = matrix.detach().double().cpu()
    if rank is not None:
        U, sigma, _ = svd(rows)
        rows = U[:, :rank] * sigma[:rank]
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    mean = float(squares.mean())
    if not (mean > 0 and math.isfinite(mean)):
        raise MethodError("neurons that are all equal (or NaN) cannot be told apart, nor matched")
    return squares / mean


@dataclass(frozen=True, eq=False)
class Plan:
    """A matching of the neurons of one model with those of another.

    Args:
        coupling: (m_A, m_B), of sum 1 and uniform marginals.
        distance: the Gromov-Wasserstein loss, in units of the mean squared distance; 0 if the two
            are alike.
    """

    coupling: Tensor
    distance: float

    @property
    def transport(self) -> Tensor:
        """(m_A, m_B), rows of sum 1: T x brings x from B into the coordinates of A."""
        return self.coupling * len(self.coupling)


def gromov_plan(one: Tensor, other: Tensor, epsilon: float = 0.05) -> Plan:
    """The plan between two spaces of neurons, with uniform marginals.

        min_P sum_ijkl (C_ik - C'_jl)^2 P_ij P_kl

    The problem is not convex. It starts at the optimal matching of rows of distances by their
    quantiles, at what proximal steps make of it, and at the product of the marginals, and keeps the
    lowest. Deterministic. O(m^3): about a second for 768 neurons.

    Args:
        one: (m_A, m_A) distances, as `neuron_distances` gives them.
        other: (m_B, m_B).
        epsilon: of the proximal steps.

    Raises:
        SapmergeError: POT is not installed; no start gave a plan with the right marginals.

    Source: Peyré, Cuturi and Solomon, "Gromov-Wasserstein averaging of kernel and distance
    matrices", ICML 2016; the solvers are POT's.
    """
    ot: Any = _pot()
    C, D = (matrix.detach().double().cpu().numpy() for matrix in (one, other))
    p, q = ot.unif(len(C)), ot.unif(len(D))
    profiles = [_profiles(matrix) for matrix in (one, other)]
    costs = torch.cdist(profiles[0], profiles[1]).square().numpy()
    start = ot.emd(p, q, costs)
    best: Plan | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that underflow; what they give is checked
        starts = [start, None]
        starts.append(
            ot.gromov.entropic_gromov_wasserstein(
                C, D, p, q, epsilon=epsilon, solver="PPA", G0=start, max_iter=100
            )
        )
        for G0 in starts:
            if G0 is not None and not _is_plan(torch.as_tensor(G0)):
                continue
            found = ot.gromov.gromov_wasserstein(C, D, p, q, G0=G0)
            coupling = torch.as_tensor(found)
            if _is_plan(coupling):
                loss = _loss(one, other, coupling)
                if best is None or loss < best.distance - 1e-12:
                    best = Plan(coupling, loss)
    if best is None:
        raise SapmergeError(
            "no solver gave a plan with the right marginals; are all distances finite?"
        )
    return best


def _pot() -> Any:
    try:
        import ot  # pyright: ignore
    except ImportError as error:
        raise SapmergeError(
            f'POT is not installed ({error}): pip install "sapmerge[gromov]"'
        ) from error
    return ot


def _profiles(distances: Tensor) -> Tensor:
    """Quantiles of every neuron's distances to the others."""
    levels = torch.linspace(0, 1, min(_QUANTILES, len(distances)), dtype=torch.float64)
    return torch.quantile(distances.detach().double().cpu(), levels, dim=1).T.contiguous()


def _is_plan(coupling: Tensor) -> bool:
    """Whether it is finite with uniform marginals: POT's solvers underflow without a word."""
    if not bool(torch.isfinite(coupling).all()):
        return False
    m, n = coupling.shape
    wrong = max(
        float((coupling.sum(1) - 1 / m).abs().max()), float((coupling.sum(0) - 1 / n).abs().max())
    )
    return wrong < 1e-6 / max(m, n)


def _loss(one: Tensor, other: Tensor, coupling: Tensor) -> float:
    C, D = (matrix.detach().double().cpu() for matrix in (one, other))
    p, q = coupling.sum(1), coupling.sum(0)
    own = p @ C.square() @ p + q @ D.square() @ q
    return max(0.0, float(own - 2 * ((C @ coupling @ D) * coupling).sum()))
