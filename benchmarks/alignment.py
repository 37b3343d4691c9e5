"""Are planted permutations of neurons found, and does a merge of what was aligned come out right?

    python benchmarks/alignment.py

Update B is update A with its neurons permuted, its inputs rotated, and noise of a share of its norm
added. Recovered: neurons that the plan of Gromov-Wasserstein, or a matching by Procrustes, puts
where they belong. Error of the merge: the distance of the mean of A and aligned B from the mean
without permutation, over its norm. The extra `gromov` is needed.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from tables import provenance, table, write
from torch import Tensor

from sapmerge.contrib import gromov
from sapmerge.evaluation import over_seeds

NEURONS, INPUTS, RANK, SEEDS = 20, 16, 6, 20
NOISE = (0.0, 0.01, 0.1, 0.3)


def planted(noise: float, seed: int, rotated: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A; B in its own coordinates; the neurons of A that it has; and B in the coordinates of A."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, RANK, dtype=torch.float64)
    left, right = (
        torch.linalg.qr(torch.randn(size, RANK, generator=generator, dtype=torch.float64))[0]
        for size in (NEURONS, INPUTS)
    )
    A = (left * scale) @ right.T
    error = torch.randn(A.shape, generator=generator, dtype=torch.float64)
    near = A + noise * A.norm() / error.norm() * error
    order = torch.randperm(NEURONS, generator=generator)
    turn = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64))[0]
    inputs = turn if rotated else torch.eye(INPUTS, dtype=torch.float64)
    return A, near[order] @ inputs, order, near


def by_gromov(A: Tensor, B: Tensor) -> Tensor:
    """Transport of neurons (m_A, m_B)."""
    return gromov.gromov_plan(
        gromov.neuron_distances(A, RANK), gromov.neuron_distances(B, RANK)
    ).transport


def by_procrustes(A: Tensor, B: Tensor, rounds: int = 50) -> Tensor:
    """A matching and a rotation of the inputs in turn, from the identity: what one does without
    distances.
    """
    turn = torch.eye(INPUTS, dtype=torch.float64)
    for _ in range(rounds):
        rows, columns = linear_sum_assignment(-(A @ (B @ turn).T).numpy())
        match = torch.zeros(NEURONS, NEURONS, dtype=torch.float64)
        match[rows, columns] = 1
        U, _, Vh = torch.linalg.svd(B.T @ match.T @ A)
        turn = U @ Vh
    return match


def nothing(A: Tensor, B: Tensor) -> Tensor:
    return torch.eye(NEURONS, dtype=torch.float64)


def main() -> None:
    ways = {"plain mean": nothing, "Procrustes": by_procrustes, "Gromov-Wasserstein": by_gromov}
    blocks = []
    for rotated in (True, False):
        lines = []
        for name, way in ways.items():
            for noise in NOISE:
                found, error, whole = [], [], 0
                for seed in range(SEEDS):
                    A, B, order, near = planted(noise, seed, rotated)
                    transport = way(A, B)
                    share = float((transport.argmax(0) == order).double().mean())
                    found.append(100 * share)
                    whole += share == 1
                    wanted = (A + near) / 2
                    moved = transport @ B
                    if (
                        rotated
                    ):  # the inputs' rotation is no matter of neurons: the nearest one is undone
                        U, _, Vh = torch.linalg.svd(moved.T @ A)
                        moved = moved @ (U @ Vh)
                    error.append(float(((A + moved) / 2 - wanted).norm() / wanted.norm()))
                cells = (str(over_seeds(found)), f"{whole} of {SEEDS}", str(over_seeds(error)))
                lines.append((name, f"{noise:.0%}", *cells))
        title = "Permuted neurons, rotated inputs" if rotated else "Permuted neurons alone"
        header = ("aligned by", "noise", "neurons found, %", "all found", "error of the mean")
        blocks += [f"## {title}", table(header, lines)]
    reading = (
        f"{NEURONS} neurons, {INPUTS} inputs, rank {RANK}, {SEEDS} seeds; 95 % intervals over "
        "seeds (Student). Noise: its norm over that of the update. With rotated inputs the nearest "
        "rotation is undone in every row after the neurons were matched, in the plain mean, too."
    )
    write("alignment", "Alignment of planted permutations", provenance("POT"), reading, *blocks)


if __name__ == "__main__":
    main()
