"""The low-rank algebra against dense float64, over random shapes and ranks,
degenerate ones included.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sapmerge as sm
from sapmerge.core import updates
from sapmerge.core.geometry import geometry, off_diagonal_mean
from sapmerge.core.linalg import qr, top_svd
from sapmerge.core.lowrank import concatenate, gram, inner, truncate
from tests import oracles
from tests.conftest import error, low_rank

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
sizes = st.integers(1, 7)
ranks = st.integers(0, 9)  # beyond min(m, n)
seeds = st.integers(0, 10_000)


def deficient(m: int, n: int, rank: int, seed: int, fall: float = 0.3) -> sm.LowRank:
    """An update whose singular values fall off geometrically, so that energies differ."""
    update = low_rank((m, n), rank, seed)
    return sm.LowRank(update.B * fall ** torch.arange(rank, dtype=torch.float64), update.A)


@quick
@given(sizes, sizes, ranks, seeds, st.booleans())
def test_svd(m: int, n: int, rank: int, seed: int, zero: bool) -> None:
    update = low_rank((m, n), rank, seed)
    update = sm.LowRank(update.B * 0, update.A) if zero else update
    U, sigma, Vh = update.svd()
    k = min(m, n, rank)
    assert U.shape == (m, k)
    assert sigma.shape == (k,)
    assert Vh.shape == (k, n)
    assert {x.dtype for x in (U, sigma, Vh)} == {torch.float64}
    wanted = np.linalg.svd(update.dense().numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma.numpy(), wanted[:k], atol=1e-12 * (1 + wanted.max()))
    torch.testing.assert_close((U * sigma) @ Vh, update.dense(), atol=1e-11, rtol=0)
    for frame in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(frame, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)
    for left, right in zip(sm.Dense(update.dense()).svd()[1], wanted, strict=True):
        assert float(left) == pytest.approx(right, abs=1e-12 * (1 + wanted.max()))


@quick
@given(sizes, sizes, st.lists(ranks, min_size=1, max_size=4), seeds, st.booleans())
def test_inner_and_gram(m: int, n: int, several: list[int], seed: int, mixed: bool) -> None:
    updates: list[sm.Update] = [low_rank((m, n), rank, seed + k) for k, rank in enumerate(several)]
    if mixed:
        updates[0] = sm.Dense(updates[0].dense())
    dense = np.stack([update.dense().numpy().ravel() for update in updates])
    wanted = dense @ dense.T
    np.testing.assert_allclose(gram(updates).numpy(), wanted, atol=1e-10)
    for i, x in enumerate(updates):
        assert x.norm() == pytest.approx(np.sqrt(wanted[i, i]), abs=1e-6)
        for j, y in enumerate(updates):
            assert inner(x, y) == pytest.approx(wanted[i, j], abs=1e-10)


def mean_cosine(updates: list[sm.Update]) -> float | None:
    return off_diagonal_mean(geometry(updates).cosine)


@quick
@given(sizes, sizes, st.lists(ranks, min_size=1, max_size=4), seeds, st.booleans())
def test_mean_cosine_is_that_of_all_pairs(
    m: int, n: int, several: list[int], seed: int, mixed: bool
) -> None:
    updates: list[sm.Update] = [low_rank((m, n), rank, seed + k) for k, rank in enumerate(several)]
    if mixed:
        updates[-1] = sm.Dense(updates[-1].dense())
    if len(updates) == 1:
        assert mean_cosine(updates) is None
        return
    dense = [update.dense().numpy().ravel() for update in updates]
    cosines = [
        float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y))) if x.any() and y.any() else 0.0
        for i, x in enumerate(dense)
        for y in dense[:i]
    ]
    assert mean_cosine(updates) == pytest.approx(np.mean(cosines), abs=1e-9)


def test_mean_cosine_of_updates_that_are_zero_but_for_rounding() -> None:
    a, b = low_rank((40, 30), 3, 1, torch.float32), low_rank((40, 30), 3, 2, torch.float32)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(132))
    nothing = sm.LowRank(torch.cat([b.B, -b.B], 1)[:, order], torch.cat([b.A, b.A])[order])
    assert mean_cosine([nothing, a]) == 0.0
    assert mean_cosine([nothing, nothing]) == 0.0
    assert mean_cosine([a, a, nothing]) == pytest.approx(1 / 3, abs=1e-12)
    assert mean_cosine([a, a]) == pytest.approx(1, abs=1e-12)


def test_a_rank_above_the_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is made of some columns at a time."""
    monkeypatch.setattr(updates, "_COLUMNS", 4)
    update = low_rank((6, 5), 11, 0)
    assert update.norm() == pytest.approx(float(np.linalg.norm(update.dense().numpy())), rel=1e-12)
    np.testing.assert_allclose(
        update.svd()[1], np.linalg.svd(update.dense().numpy(), compute_uv=False), rtol=1e-12
    )


def test_qr_of_well_conditioned_columns_needs_no_reflectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.linalg, "qr", refuse)
    monkeypatch.setattr(torch, "geqrf", refuse)
    update = low_rank((40, 30), 6, 0)
    assert qr(update.B)[0].shape == (40, 6)
    assert update.svd()[0].shape == (40, 6)
    with pytest.raises(AssertionError):
        qr(torch.cat([update.B, update.B], 1))
    with pytest.raises(AssertionError):
        concatenate([update, update], [1.0, 1.0]).svd()


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30, 1e-135, 1e200])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e3, 1e5, 1e8, 1e12])
@pytest.mark.parametrize("rows", [4, 9, 300, 20_000])
def test_qr_of_columns_that_are_nearly_dependent(rows: int, condition: float, scale: float) -> None:
    """Orthonormal whatever the condition number; that of columns of very different lengths
    does not count.
    """
    generator = torch.Generator().manual_seed(0)
    size = min(rows, 9)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator).double())[0]
    right = torch.linalg.qr(torch.randn(9, 9, generator=generator).double())[0]
    middle = torch.logspace(0, -float(np.log10(condition)), size, dtype=torch.float64)
    matrix = (left * middle) @ right[:size] * scale * torch.logspace(0, -20, 9, dtype=torch.float64)
    Q, R = qr(matrix)
    torch.testing.assert_close(Q.T @ Q, torch.eye(size, dtype=torch.float64), atol=3e-9, rtol=0)
    assert torch.equal(R, R.triu())
    lengths = (matrix / scale).norm(dim=0) * scale
    assert float(((Q @ R - matrix) / lengths).abs().max()) < 1e-9
    if condition > 1e4:  # Householder's, not Cholesky's
        torch.testing.assert_close(
            Q.T @ Q, torch.eye(size, dtype=torch.float64), atol=1e-13, rtol=0
        )


@pytest.mark.parametrize("condition", [1e2, 1e5, float("inf")])
def test_svd_of_factors_with_nearly_dependent_columns(condition: float) -> None:
    """Copies of columns, and differences of columns that are nearly copies."""
    factors = [low_rank((60, 40), 6, seed) for seed in (1, 2, 3)]
    near = sm.LowRank(
        factors[0].B + factors[1].B / condition, factors[0].A + factors[2].A / condition
    )
    update = concatenate([factors[0], near, factors[1]], [1.0, -1.0, 1e-3])
    U, sigma, Vh = update.svd()
    wanted = np.linalg.svd(update.dense().numpy(), compute_uv=False)[: len(sigma)]
    largest = float(factors[0].norm())
    np.testing.assert_allclose(sigma.numpy(), wanted, atol=1e-8 * largest)
    torch.testing.assert_close((U * sigma) @ Vh, update.dense(), atol=1e-8 * largest, rtol=0)
    for frame in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(
            frame, torch.eye(len(sigma), dtype=torch.float64), atol=1e-8, rtol=0
        )
    assert update.norm() == pytest.approx(float(update.dense().norm()), rel=1e-6)


@quick
@given(sizes, sizes, st.lists(ranks, min_size=1, max_size=4), seeds)
def test_concatenate_is_the_weighted_sum(m: int, n: int, several: list[int], seed: int) -> None:
    updates = [low_rank((m, n), rank, seed + k) for k, rank in enumerate(several)]
    weights = [0.7 * (-1) ** k + k for k in range(len(several))]
    got = concatenate(updates, weights)
    assert got.rank == sum(several)
    wanted = oracles.weighted_sum([update.dense().numpy() for update in updates], weights)
    np.testing.assert_allclose(got.dense().numpy(), wanted, atol=1e-11)


@quick
@given(
    sizes,
    sizes,
    ranks,
    seeds,
    st.floats(1e-4, 1e4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_balanced(m: int, n: int, rank: int, seed: int, gauge: float, dtype: torch.dtype) -> None:
    update = low_rank((m, n), rank, seed, dtype)
    even = sm.LowRank(update.B / gauge, update.A * gauge).balanced
    assert even.dtype == dtype
    assert even.rank <= min(m, n, rank)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert error(even.dense(), update.dense()) < tolerance
    torch.testing.assert_close(
        even.A @ even.A.T, even.B.T @ even.B, atol=tolerance * (1 + update.norm()), rtol=0
    )


@quick
@given(sizes, sizes, st.integers(1, 9), seeds, st.integers(1, 9), st.booleans())
def test_truncate_to_a_rank(m: int, n: int, rank: int, seed: int, cap: int, is_dense: bool) -> None:
    low = deficient(m, n, rank, seed)
    update = sm.Dense(low.dense()) if is_dense else low
    got, kept = truncate(update, cap, 1)
    assert got.rank <= cap
    assert error(got.dense(), torch.from_numpy(oracles.best_rank(low.dense().numpy(), cap))) < 2e-6
    assert kept == pytest.approx(oracles.energy_kept(low.dense().numpy(), cap), abs=1e-9)


@quick
@given(sizes, sizes, st.integers(1, 9), seeds, st.floats(0.05, 0.999), st.booleans())
def test_truncate_to_a_share_of_energy(
    m: int, n: int, rank: int, seed: int, share: float, is_dense: bool
) -> None:
    low = deficient(m, n, rank, seed, fall=0.6)
    got, kept = truncate(sm.Dense(low.dense()) if is_dense else low, share, 1)
    matrix = low.dense().numpy()
    assert kept >= share - 1e-9
    assert kept == pytest.approx(oracles.energy_kept(matrix, got.rank), abs=1e-9)
    # no smaller rank is enough
    assert got.rank == 1 or oracles.energy_kept(matrix, got.rank - 1) < share
    assert got.norm() ** 2 == pytest.approx(kept * low.norm() ** 2, rel=1e-9)


@quick
@given(sizes, sizes, st.integers(0, 9), seeds)
def test_truncate_exactly_and_by_default(m: int, n: int, rank: int, seed: int) -> None:
    update = low_rank((m, n), rank, seed)
    for got, kept in (truncate(update, "exact", 1), truncate(update, None, 1)):
        assert kept == 1.0
        assert got.rank <= min(m, n)
        assert error(got.dense(), update.dense()) < 2e-6
    assert truncate(update, "exact", 1)[0].rank == torch.linalg.matrix_rank(
        update.dense(), rtol=1e-6
    )
    if rank <= min(m, n):
        assert truncate(update, None, 1)[0] is update
    default, kept = truncate(sm.Dense(update.dense()), None, 2)
    assert default.rank <= 2
    if rank:
        assert kept == pytest.approx(oracles.energy_kept(update.dense().numpy(), 2), abs=1e-9)


@pytest.mark.parametrize("rank", [None, 1, 0.5, "exact"])
@pytest.mark.parametrize("is_dense", [True, False])
def test_zero_has_rank_zero_and_keeps_all_energy(
    rank: int | float | str | None, is_dense: bool
) -> None:
    zero = torch.zeros(5, 4)
    update: sm.Update = sm.Dense(zero) if is_dense else sm.LowRank(zero[:, :2], zero[:2].clone())
    got, kept = truncate(update, rank, 1)
    assert kept == 1.0
    assert got.shape == (5, 4)
    assert got.dtype == torch.float32
    assert not got.dense().any()
    assert update.norm() == 0.0
    assert update.balanced.rank == 0


def test_exact_drops_dependent_directions() -> None:
    update = low_rank((6, 8), 2, 0)
    thrice = concatenate([update] * 3, [1.0, 2.0, -0.5])
    got, kept = truncate(thrice, "exact", 1)
    assert (thrice.rank, got.rank, kept) == (6, 2, 1.0)
    assert error(got.dense(), 2.5 * update.dense()) < 1e-12


# --- the streamed threshold of a whole adapter
# ----------------------------------------------------------------------------------------

floats = st.one_of(
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 2e-40, 1e-38, 3e38, -3e38, 1.0 + 2**-23]
    ).map(lambda value: float(np.float32(value))),
    st.floats(-4, 4, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
chunks = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=6), elements=floats),
    min_size=1,
    max_size=5,
)


@settings(quick, max_examples=200)
@given(chunks, st.one_of(st.floats(0.001, 1.0), st.sampled_from([0.2, 0.25, 0.5, 1.0])))
def test_streamed_threshold_is_the_flat_one(arrays: list[np.ndarray], density: float) -> None:
    """Fitted over chunks, scope "adapter" keeps what a sort of everything keeps,
    ties at the cut included.
    """
    flat = np.concatenate([array.ravel() for array in arrays])
    cut = np.sort(flat)[::-1][oracles.count(density, flat.size) - 1]
    top = sm.TopFraction(density, scope="adapter")
    fitted = top.fit(lambda: [("one", torch.from_numpy(array)) for array in arrays])
    mask = top if fitted is None else fitted["one"]
    for array in arrays:
        np.testing.assert_array_equal(mask(torch.from_numpy(array)).numpy(), array >= cut)


@quick
@given(chunks, chunks, st.floats(0.05, 0.95))
def test_each_adapter_has_its_own_threshold(first: list, second: list, density: float) -> None:
    top = sm.TopFraction(density, scope="adapter")
    pairs = [("a", torch.from_numpy(x)) for x in first] + [
        ("b", torch.from_numpy(x)) for x in second
    ]
    both = top.fit(lambda: reversed(pairs))
    assert both is not None
    for label in "ab":
        alone = top.fit(lambda label=label: [pair for pair in pairs if pair[0] == label])
        assert alone is not None
        assert both[label].minimum == alone[label].minimum


@quick
@given(
    hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=8), elements=st.floats(-3, 3)),
    st.floats(0.001, 1.0),
)
def test_top_fraction_of_a_tensor_keeps_the_exact_count(array: np.ndarray, density: float) -> None:
    """floor(density n + 1e-9), at least one; equal scores at the cut in index order."""
    mask = sm.TopFraction(density)(torch.from_numpy(array))
    wanted = np.argsort(-array.ravel(), kind="stable")[: oracles.count(density, array.size)]
    assert mask.shape == array.shape
    assert mask.dtype == torch.bool
    assert np.flatnonzero(mask.numpy()).tolist() == sorted(wanted.tolist())


# --- coordinates
# ----------------------------------------------------------------------------------------


@quick
@given(
    sizes,
    sizes,
    st.lists(ranks, min_size=1, max_size=3),
    seeds,
    st.sampled_from(["knots", "text", "core", "plain"]),
)
def test_inside_and_outside_is_a_round_trip(
    m: int, n: int, several: list[int], seed: int, which: str
) -> None:
    """Frames that span all adapters lose nothing; in and out again is the identity on each."""
    updates = tuple(low_rank((m, n), rank, seed + k) for k, rank in enumerate(several))
    basis = {
        "knots": sm.SharedBasis(),
        "text": sm.SharedBasis(scaled=False),
        "core": sm.CoreSpace(),
        "plain": sm.CoreSpace(balance=False),
    }[which]
    frames = basis(sm.Layer("l", updates))
    for frame in (frames.U, frames.V):
        if frame is not None:
            torch.testing.assert_close(
                frame.T @ frame, torch.eye(frame.shape[1]).double(), atol=1e-10, rtol=0
            )
    for update in updates:
        coordinates = frames.inside(update)
        assert (coordinates.rank == 0) == (update.rank == 0)
        for form in (coordinates, sm.Dense(coordinates.dense())):
            back = frames.outside(form)
            assert back.shape == (m, n)
            torch.testing.assert_close(back.dense(), update.dense(), atol=2e-5, rtol=0)
        inside = frames.inside(sm.Dense(update.dense())).dense()
        torch.testing.assert_close(inside, coordinates.dense(), atol=1e-7, rtol=1e-6)


def test_frames_of_one_side() -> None:
    torch.manual_seed(1)
    matrix, U, V = (
        torch.randn(5, 6),
        torch.linalg.qr(torch.randn(5, 3))[0],
        torch.linalg.qr(torch.randn(6, 2))[0],
    )
    for left, right in ((U, None), (None, V), (U, V), (None, None)):
        frames = sm.Frames(left, right)
        P = torch.eye(5) if left is None else left @ left.T
        Q = torch.eye(6) if right is None else right @ right.T
        back = frames.outside(frames.inside(sm.Dense(matrix)))
        torch.testing.assert_close(back.dense(), P @ matrix @ Q, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e-19])
@pytest.mark.parametrize(
    "kind", ["masked", "low rank", "few rows", "more rows", "one direction", "zero", "flat"]
)
def test_the_largest_triplets_of_a_large_matrix(kind: str, scale: float) -> None:
    """As numpy's SVD has them; also where the iteration runs out of directions,
    or squares would overflow.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(500, 12, generator=generator) @ torch.randn(12, 400, generator=generator)
    rows = torch.arange(500)[:, None]
    matrix = {
        "masked": matrix * (matrix.abs() > 3),
        "low rank": matrix,
        "few rows": matrix * (rows < 5),
        "more rows": torch.randn(500, 400, generator=generator) * (rows < 30),
        "one direction": matrix + 1e4 * torch.ones(500, 400),
        "zero": matrix * 0,
        "flat": torch.linalg.qr(torch.randn(500, 400, generator=generator))[0],
    }[kind]
    U, sigma, Vh = top_svd(matrix * scale, 16)
    wanted = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:16] * scale
    assert np.abs(sigma.numpy() - wanted).max() <= 1e-6 * wanted.max()
    assert float((U.T @ U - torch.eye(16)).abs().max()) < 1e-6
    assert float((Vh @ Vh.T - torch.eye(16)).abs().max()) < 1e-6
    missed = float((matrix.double() * scale - (U * sigma) @ Vh).norm() ** 2)
    best = float((matrix.double().norm() * scale) ** 2) - float((wanted**2).sum())
    assert missed <= best + 1e-7 * float((matrix.double().norm() * scale) ** 2)
