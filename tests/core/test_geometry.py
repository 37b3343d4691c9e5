"""How very many updates lie to each other, and the largest singular values of their sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapmerge.core.geometry import Crowd, geometry, off_diagonal_mean
from sapmerge.core.lowrank import concatenate, truncate
from sapmerge.core.updates import Dense, LowRank, Update


@pytest.mark.parametrize("kind", ["factors", "mixed", "with zeros"])
def test_means_over_pairs_without_pairs(kind: str) -> None:
    """Those of the matrices of all pairs, where every entry is non-zero or none is."""
    generator = torch.Generator().manual_seed(3)
    updates: list[Update] = [
        LowRank(torch.randn(9, 2, generator=generator), torch.randn(2, 7, generator=generator))
        for _ in range(6)
    ]
    if kind == "mixed":
        updates[2] = Dense(updates[2].dense())
    if kind == "with zeros":
        updates[4] = LowRank(torch.zeros(9, 1), torch.ones(1, 7))
    crowd = Crowd((9, 7))
    crowd.add(updates[:2])
    crowd.add(updates[2:])
    cosine, conflict = crowd.cosine(), crowd.sign_conflict()
    pairs = geometry(updates)
    assert cosine == pytest.approx(off_diagonal_mean(pairs.cosine), abs=1e-9)
    opposed, both = pairs.opposed, pairs.both
    off = ~torch.eye(6, dtype=torch.bool)
    assert conflict == pytest.approx(float(opposed[off].sum() / both[off].sum()), abs=1e-12)


def test_a_sum_of_more_factors_than_rows_is_cut_as_its_matrix_is() -> None:
    generator = torch.Generator().manual_seed(5)
    some = [
        LowRank(
            torch.randn(150, 4, generator=generator) * 0.9**k,
            torch.randn(4, 160, generator=generator),
        )
        for k in range(50)
    ]
    total = concatenate(some, [1 / 50] * 50)
    assert total.rank > 150
    kept, energy = truncate(total, 16, 4)
    dense = sum(u.B.double().numpy() @ u.A.double().numpy() for u in some) / 50
    U, sigma, Vh = np.linalg.svd(dense, full_matrices=False)
    best = U[:, :16] * sigma[:16] @ Vh[:16]
    assert kept.rank == 16
    assert np.linalg.norm(kept.dense().numpy() - best) < 2e-4 * np.linalg.norm(best)
    assert energy == pytest.approx((sigma[:16] ** 2).sum() / (sigma**2).sum(), rel=1e-6)
