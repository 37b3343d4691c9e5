"""RobustMerge and LoRA-LEGO: the official numbers, the formulas written out,
and what the laws do not say.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sapmerge as sm
from sapmerge.errors import MethodError
from sapmerge.parts.mergers.factors import signed_kmeans
from tests.conftest import changed, error, low_rank, make_layers, run
from tests.methods.test_goldens import HERE, INDEX

NUMBERS = load_file(HERE / "lora_native.safetensors")
INPUTS = load_file(HERE / "inputs.safetensors")
ENTRIES = {
    entry["key"]: entry for entry in json.loads((HERE / "lora_native.json").read_text())["entries"]
}
NAMES = list(INDEX["input_sets"]["s3"]["layers"])


def s3(name: str, dtype: torch.dtype = torch.float64) -> sm.Layer:
    pairs = [[INPUTS[f"s3/t{k}/{name}/{part}"].to(dtype) for part in "BA"] for k in range(3)]
    return sm.Layer(name, tuple(sm.LowRank(B, A) for B, A in pairs))


def kept(matrix: Tensor, density: float) -> Tensor:
    """The largest entries; no ties in random numbers."""
    count = int(density * matrix.numel() + 1e-9)
    cut = matrix.abs().flatten().sort(descending=True).values[count - 1]
    return torch.where(matrix.abs() >= cut, matrix, 0.0)


def official(
    pairs: list[tuple[Tensor, Tensor]], density: float, top: float, factor: float
) -> Tensor:
    """The authors' code, written out for adapters of one rank."""
    A, B, c = [], [], []
    for b, a in pairs:
        A.append(kept(a, density))
        B.append(kept(b, density))
        S = a.abs().sum(1) / A[-1].abs().sum(1)
        c.append(S.clamp(min=float(S.sort().values[int((1 - top) * len(S))])))
    merged_B = factor * sum(b * s for b, s in zip(B, c)) / sum(c)
    return merged_B @ (factor * sum(A))


def paper(pairs: list[tuple[Tensor, Tensor]], density: float) -> Tensor:
    """sum_t B~ diag(S^) A~, written out for adapters of one rank."""
    trimmed = [(kept(b, density), kept(a, density)) for b, a in pairs]
    S = torch.stack([a.abs().sum(1) / t.abs().sum(1) for (_, a), (_, t) in zip(pairs, trimmed)])
    share = S / S.sum(0)
    return sum(b @ torch.diag(s) @ a for (b, a), s in zip(trimmed, share))


# The codes keep n - int(0.8 n) + 1 or n - (n - int(0.2 n)) + 1 entries; these densities keep as
# many of 64 and of 96.
@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("robustmerge/robustmerge/s3", sm.RobustFactors(density=21 / 96)),
        (
            "ctm/robustmerge_thirdparty/s3/top20",
            sm.RobustFactors(density=20 / 96, top_ranks=1.0, factor=1.0),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_robustmerge(key: str, method: sm.RobustFactors, dtype: torch.dtype) -> None:
    for name in NAMES:
        merged = method(s3(name, dtype))
        assert isinstance(merged, sm.LowRank)
        for part in "AB":
            wanted = NUMBERS[ENTRIES[key]["outputs"][f"{name}/{part}"]]
            assert error(getattr(merged, part), wanted) < 1e-6, (name, part)


def test_a_row_that_is_pruned_whole_is_dropped_where_the_code_returns_nan() -> None:
    key = "robustmerge/robustmerge/s3_row_trimmed"
    assert not ENTRIES[key]["well_posed"]
    for name in NAMES:
        layer = s3(name)
        first = layer.updates[0]
        A = first.A.clone()
        A[0] *= 1e-6
        layer = changed(layer, updates=(sm.LowRank(first.B, A), *layer.updates[1:]))
        assert not torch.isfinite(NUMBERS[ENTRIES[key]["outputs"][f"{name}/B"]]).all()
        for method in (sm.RobustFactors(21 / 96), sm.robustmerge(21 / 96)):
            assert torch.isfinite(method(layer).dense()).all()
        rest = sm.Layer(name, tuple(sm.LowRank(u.B[:, :1], u.A[:1]) for u in layer.updates[1:]))
        alone = sm.RobustFactors(21 / 96, top_ranks=1.0)(layer)
        assert alone.B[:, 0].abs().sum() > 0
        assert rest.shape == alone.shape


@pytest.mark.parametrize(
    ("shape", "rank"), [((24, 16), 4), ((64, 48), 16), ((9, 30), 5), ((40, 7), 1)]
)
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_both_forms_are_what_they_say(shape: tuple[int, int], rank: int, density: float) -> None:
    layer = make_layers([rank] * 3, {"l": shape})[0]
    pairs = [(u.B, u.A) for u in layer.updates]
    assert error(sm.robustmerge(density)(layer).dense(), paper(pairs, density)) < 1e-12
    assert (
        error(sm.RobustFactors(density)(layer).dense(), official(pairs, density, 0.2, 2.0)) < 1e-12
    )
    cross = sm.RobustFactors(density, 1.0, 1.0)(layer).dense()
    assert error(cross, official(pairs, density, 1.0, 1.0)) < 1e-12
    assert error(cross, paper(pairs, density)) > 0.3, "cross terms B_i A_j"


def test_zero_and_identical_adapters_in_both_forms() -> None:
    """The code counts an adapter with B = 0, whose A enters the cross terms;
    in the paper's form ours has no vote.
    """
    layer = make_layers([8, 8, 8], {"l": (24, 16)})[0]
    first, second, third = layer.updates
    zero = changed(layer, updates=(first, second, sm.LowRank(third.B * 0, third.A)))
    pairs = [(u.B, u.A) for u in zero.updates]
    assert error(sm.RobustFactors(0.2)(zero).dense(), official(pairs, 0.2, 0.2, 2.0)) < 1e-12
    assert error(sm.robustmerge(0.2)(zero).dense(), paper(pairs[:2], 0.2)) < 1e-12
    same = changed(layer, updates=(first,) * 3)
    pairs = [(first.B, first.A)] * 3
    assert error(sm.RobustFactors(0.2)(same).dense(), official(pairs, 0.2, 0.2, 2.0)) < 1e-12
    assert error(sm.robustmerge(0.2)(same).dense(), paper(pairs, 0.2)) < 1e-12


def test_clamp_leaves_no_compensation_at_small_ranks() -> None:
    """With r <= 5 floor(0.8 r) = r - 1, so every rank gets the largest score: c_t is constant."""
    layer = make_layers([4], {"l": (24, 16)})[0]
    update = layer.updates[0]
    merged = sm.RobustFactors(0.2)(layer)
    assert error(merged.B, 2 * kept(update.B, 0.2)) < 1e-12


def test_ranks_that_differ_share_what_they_have() -> None:
    layer = make_layers([2, 4, 3], {"l": (24, 16)})[0]
    alone = sm.Layer("l", (layer.updates[1],))
    last = sm.LowRank(layer.updates[1].B[:, 3:], layer.updates[1].A[3:])
    merged = sm.robustmerge(1.0)(layer)
    assert merged.rank == 9
    # With density 1 every S is 1, so rank k is the mean over those that have it.
    wanted = sum(
        u.B[:, k : k + 1] @ u.A[k : k + 1] / sum(v.rank > k for v in layer)
        for u in layer
        for k in range(u.rank)
    )
    assert error(merged.dense(), wanted) < 1e-12
    assert error(sm.robustmerge(1.0)(alone).dense(), alone.updates[0].dense()) < 1e-12
    assert sm.RobustFactors(1.0)(layer).rank == 4
    assert error(sm.RobustFactors(1.0, factor=1.0)(layer).B[:, 3:], last.B) < 1e-12


@pytest.mark.parametrize(
    "method", [sm.robustmerge(0.3), sm.robustmerge(0.3, balance=True), sm.lora_lego()]
)
def test_negative_and_scaled_weights(method: sm.Method) -> None:
    """The weights are those of a mean, with the sign of each on its adapter."""
    layer = make_layers([3, 3], {"l": (9, 8)}, weights=[1.0, -0.5])[0]
    twice = changed(layer, weights=(2.0, -1.0))
    flipped = changed(
        layer, updates=(layer.updates[0], layer.updates[1].scaled(-1)), weights=(1.0, 0.5)
    )
    assert error(method(twice).dense(), method(layer).dense()) < 1e-12
    assert error(method(flipped).dense(), method(layer).dense()) < 1e-12


def test_balanced_robustmerge_depends_on_the_updates_alone() -> None:
    layer = make_layers([4, 4, 4], {"l": (24, 16)})[0]
    R = low_rank((4, 4), 4, 5).dense() + 2 * torch.eye(4).double()
    other = changed(
        layer, updates=tuple(sm.LowRank(u.B @ torch.linalg.inv(R), R @ u.A) for u in layer)
    )
    for method, low, high in (
        (sm.robustmerge(), 0.1, 5.0),
        (sm.robustmerge(balance=True), 0.0, 1e-9),
    ):
        assert low <= error(method(other).dense(), method(layer).dense()) <= high


# --- LoRA-LEGO
# ----------------------------------------------------------------------------------------


def similar(ranks: list[int], noise: float) -> sm.Layer:
    """Adapters whose units are noisy copies of the same five far-apart units,
    shuffled and with random signs.
    """
    generator = torch.Generator().manual_seed(3)
    basis_a = torch.linalg.qr(torch.randn(16, 16, generator=generator).double())[0][:5] * 2
    basis_b = torch.linalg.qr(torch.randn(24, 24, generator=generator).double())[0][:, :5] * 2
    updates = []
    for rank in ranks:
        order = torch.randperm(5, generator=generator)[:rank]
        sign = torch.where(torch.rand(rank, generator=generator) < 0.5, -1.0, 1.0).double()
        a = basis_a[order] + noise * torch.randn(rank, 16, generator=generator).double()
        b = basis_b[:, order] + noise * torch.randn(24, rank, generator=generator).double()
        updates.append(sm.LowRank(b * sign, a * sign[:, None]))
    return sm.Layer("l", tuple(updates))


def test_lego_finds_the_units_that_adapters_share_whatever_their_signs() -> None:
    layer = similar([5, 5, 5], noise=0.0)
    merged = sm.lora_lego(balance=False)(layer)
    assert merged.rank == 5
    assert error(merged.dense(), layer.updates[0].dense()) < 1e-9
    noisy = similar([5, 5, 5], noise=0.02)
    assert error(sm.lora_lego(balance=False)(noisy).dense(), layer.updates[0].dense()) < 0.1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_lego_is_k_means_and_its_two_reweightings(k: int) -> None:
    """Against scikit-learn on the same points; all are positive, so there is no sign to choose."""
    cluster = pytest.importorskip("sklearn.cluster")
    generator = torch.Generator().manual_seed(k)
    centres = torch.rand(k, 40, generator=generator).double() + 0.3
    updates = []
    for rank in (6, 5, 4):
        units = centres[torch.arange(rank) % k] * (
            0.9 + 0.2 * torch.rand(rank, 40, generator=generator).double()
        )
        updates.append(sm.LowRank(units[:, 16:].T, units[:, :16]))
    layer = sm.Layer("l", tuple(updates))
    points = torch.cat([torch.cat([u.A, u.B.T], dim=1) for u in layer])
    labels = torch.from_numpy(
        cluster.KMeans(k, n_init=20, random_state=0).fit(points.numpy()).labels_
    ).long()
    for scale, size in (("adapter", 5), ("all", 15)):
        wanted = torch.zeros(24, 16).double()
        for c in range(k):
            members = points[labels == c]
            centre = members.mean(0) * members.abs().amax(1).mean() / members.mean(0).abs().max()
            wanted += (size / k) ** 0.5 * torch.outer(centre[16:], centre[:16])
        assert (
            error(sm.lora_lego(k, balance=False, output_scale=scale)(layer).dense(), wanted) < 1e-9
        )


def test_kmeans_reaches_the_inertia_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    generator = torch.Generator().manual_seed(0)
    # all inner products positive: no sign to choose
    points = torch.rand(40, 6, generator=generator).double() + 1.0
    weights = torch.rand(40, generator=generator).double() + 0.1
    means = signed_kmeans(points @ points.T, weights, 6, seed=1, starts=30)
    centres = means @ points
    inertia = float((weights * torch.cdist(points, centres).square().amin(1)).sum())
    best = cluster.KMeans(6, n_init=30, random_state=0).fit(
        points.numpy(), sample_weight=weights.numpy()
    )
    assert inertia <= best.inertia_ * (1 + 1e-6)
    torch.testing.assert_close(means.abs().sum(1), torch.ones(6).double())


def test_lego_output_scales_differ_by_the_root_of_the_number_of_adapters() -> None:
    layer = make_layers([3, 3, 3], {"l": (12, 10)})[0]
    one, every = (sm.lora_lego(output_scale=scale)(layer).dense() for scale in ("adapter", "all"))
    assert error(every, one * 3**0.5) < 1e-12


def test_lego_depends_on_no_global_generator_and_on_the_seed_only_through_the_starts() -> None:
    layer = make_layers([4, 4, 4], {"l": (12, 10)})[0]
    state = torch.get_rng_state()
    merged = sm.lora_lego()(layer).dense()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(sm.lora_lego()(layer).dense(), merged)
    one, other = (sm.ClusterUnits(starts=1, seed=seed)(layer).dense() for seed in (0, 1))
    assert error(one, other) > 1e-3


def test_lego_has_at_most_the_rank_that_was_asked() -> None:
    layer = make_layers([2, 4, 3], {"l": (12, 10)})[0]
    assert [sm.lora_lego(k)(layer).rank for k in (None, 1, 5, 100)] == [4, 1, 5, 9]
    copies = sm.Layer("l", (layer.updates[0],) * 3)
    assert sm.lora_lego(5)(copies).rank == 2, "there are only two different units"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sm.robustmerge(20), "for 20 % write 0.2"),
        (lambda: sm.RobustFactors(top_ranks=0.0), "top_ranks"),
        (lambda: sm.lora_lego(0), "rank"),
        (lambda: sm.lora_lego(output_scale="k"), "output_scale"),
        (lambda: sm.ClusterUnits(starts=0), "starts"),
    ],
)
def test_wrong_arguments_are_named(make, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


@pytest.mark.parametrize(
    "method",
    [
        sm.robustmerge(),
        sm.robustmerge(balance=True),
        sm.RobustFactors(),
        sm.lora_lego(),
        sm.lines(),
        sm.wudi(),
    ],
)
def test_no_dense_matrix_is_made(method: sm.Method) -> None:
    layers = make_layers([2, 3, 2], {"model.layers.1.q": (300, 200)}, dtype=torch.float32)
    with Largest() as largest:
        merged = run(method, layers)["model.layers.1.q"]
    assert isinstance(merged, sm.LowRank)
    assert largest.entries <= 10 * 500


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize(
    "method", [sm.RobustFactors(), sm.ClusterUnits(balance=False, output_scale="all")]
)
@pytest.mark.parametrize("ranks", [[1], [1, 1], [3, 3, 3], [2, 0, 5]])
def test_primitives_are_finite_on_degenerate_inputs(
    scale: float, method: sm.Merger, ranks: list[int]
) -> None:
    shapes = {"one": (1, 1), "row": (1, 6), "column": (5, 1), "square": (4, 4)}
    for layer in make_layers(ranks, shapes, dtype=torch.float32):
        first = layer.updates[0]
        zero = sm.LowRank(first.B * 0, first.A)
        for updates in (
            tuple(u.scaled(scale) for u in layer),
            (first,) * len(layer),
            (zero, *layer.updates[1:]),
            (zero,) * len(layer),
            tuple(sm.Dense(u.dense()) for u in layer),
        ):
            merged = method(changed(layer, updates=updates))
            assert merged.shape == layer.shape
            assert merged.dtype == torch.float32
            assert torch.isfinite(merged.dense()).all()
