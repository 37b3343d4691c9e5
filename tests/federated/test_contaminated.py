"""CLAIR and `FlagContaminated`: goldens, planted contamination, and what it must not flag."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sapmerge as sm
from sapmerge import federated as fed
from tests.conftest import LinearLoss
from tests.federated.test_personal import adapter, dense

GOLDENS = Path(__file__).parents[1] / "goldens" / "federated"
CONVEX, LOO = load_file(GOLDENS / "clair.safetensors"), load_file(GOLDENS / "clair_loo.safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:left out as contaminated")


def golden_layers(found: dict[str, Tensor], prefix: str, layers: int, count: int) -> list[sm.Layer]:
    return [
        sm.Layer(
            str(number),
            tuple(
                sm.LowRank(found[f"{prefix}{number}.{k}.B"], found[f"{prefix}{number}.{k}.A"])
                for k in range(count)
            ),
        )
        for number in range(layers)
    ]


def prepared(layers: Sequence[sm.Layer], **options: object) -> sm.FlagContaminated:
    return sm.prepare(sm.FlagContaminated(sm.mean(), **options), list(layers))  # type: ignore[arg-type]


def flagged(method: sm.FlagContaminated) -> list[int]:
    return [k for k, factor in enumerate(method.factors or ()) if factor == 0]


@pytest.mark.parametrize(("case", "wanted"), [("collude", [5, 6, 7]), ("dense", [])])
def test_the_calibrated_test(case: str, wanted: list[int]) -> None:
    """'dense' is too small to flag anybody: the median z is 4."""
    method = prepared(golden_layers(LOO, f"{case}.", 2, 8), tests=("shared",))
    z = torch.tensor(
        [method.findings["shared_z"][f"adapter{k}"] for k in range(8)], dtype=torch.float64
    )
    assert torch.allclose(z, LOO[f"{case}.z"], atol=1e-6)
    for name, U in method.bases.items():
        assert torch.allclose(U @ U.T, LOO[f"{case}.{name}.projector"], atol=1e-6)
    assert flagged(method) == wanted


def test_the_convex_program() -> None:
    layers = golden_layers(CONVEX, "", 3, 12)
    method = prepared(layers, tests=("shared",), form="convex", price=float(CONVEX["lam"]))
    share = torch.tensor(
        [method.findings["own_share"][f"adapter{k}"] for k in range(12)], dtype=torch.float64
    )
    assert torch.allclose(share, CONVEX["share"], atol=1e-6)
    assert flagged(method) == [8, 9, 10, 11]
    for layer in layers:
        U = method.bases[layer.name]
        assert torch.allclose(U @ U.T, CONVEX[f"{layer.name}.subspace_projector"], atol=1e-6)
        assert torch.allclose(
            method(layer).dense(), CONVEX[f"{layer.name}.mean_benign"], atol=1e-10
        )
    # it finds a price
    assert flagged(prepared(layers, tests=("shared",), form="convex")) == [
        8,
        9,
        10,
        11,
    ]


def test_the_refinement() -> None:
    clients = [
        adapter(
            {str(n): (CONVEX[f"{n}.{k}.B"], CONVEX[f"{n}.{k}.A"]) for n in range(3)}, f"c{k}", 4
        )
        for k in range(12)
    ]
    made = fed.refine(clients, sm.clair(form="convex", price=float(CONVEX["lam"])))
    assert list(made) == [f"c{k}" for k in range(8)]
    for name, update in dense(made["c0"]).items():
        assert torch.allclose(update, CONVEX[f"{name}.refined0"], atol=1e-5)
    mean = {name: sum(dense(made[label])[name] for label in made) / 8 for name in "012"}
    assert all(
        torch.allclose(mean[name], CONVEX[f"{name}.mean_benign"], atol=1e-5) for name in mean
    )
    with pytest.raises(sm.MethodError, match="does not look for any"):
        fed.refine(clients, sm.FlagContaminated(sm.mean(), tests=("norm",)))


# Planted contamination.


def clients(seed: int, count: int = 12, energy: float = 1.0, layers: int = 3) -> list[sm.Layer]:
    """Updates of rank 4 whose columns lie in a common plane with this share of their energy;
    a common mean in it.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out: list[sm.Layer] = []
    for number in range(layers):
        U = torch.linalg.qr(random(24, 2))[0]
        common = random(2, 20)
        updates = []
        for _ in range(count):
            inside, own = U @ (common + random(2, 20)), random(24, 2) @ random(2, 20)
            matrix = (
                math.sqrt(energy) * inside / inside.norm()
                + math.sqrt(1 - energy) * own / own.norm()
            )
            left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
            updates.append(sm.LowRank(left[:, :4] * sigma[:4], right[:4]))
        out.append(sm.Layer(f"layer{number}", tuple(updates)))
    return out


def spoilt(
    layers: list[sm.Layer], bad: Sequence[int], how: Callable[[sm.LowRank, int], sm.LowRank]
) -> list[sm.Layer]:
    return [
        replace(layer, updates=tuple(how(u, n) if k in bad else u for k, u in enumerate(layer)))  # type: ignore[arg-type]
        for n, layer in enumerate(layers)
    ]


def noise(update: sm.LowRank, seed: int) -> sm.LowRank:
    torch.manual_seed(int(1e6 * float(update.B[0, 0].abs())) % 2**31 + seed)
    made = sm.LowRank(torch.randn_like(update.B), torch.randn_like(update.A))
    return made.scaled(update.norm() / made.norm())


def common_lie(update: sm.LowRank, layer: int) -> sm.LowRank:
    generator = torch.Generator().manual_seed(100 + layer)
    B = torch.randn(update.shape[0], 2, generator=generator, dtype=torch.float64)
    A = torch.randn(
        2,
        update.shape[1],
        generator=torch.Generator().manual_seed(hash(float(update.norm())) % 2**31),
    )
    made = sm.LowRank(B, A.double())
    return made.scaled(update.norm() / made.norm())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("how", "energy"),
    [
        (noise, 1.0),
        (noise, 0.7),
        (noise, 0.5),
        (lambda u, n: noise(u, n).scaled(10), 1.0),
        (common_lie, 1.0),
    ],
    ids=["noise", "noise .7", "noise .5", "ten times too long", "colluding"],
)
def test_planted_contamination_is_found(
    how: Callable[[sm.LowRank, int], sm.LowRank], energy: float, seed: int
) -> None:
    layers = spoilt(clients(seed, energy=energy), [1, 4, 7, 10], how)
    assert flagged(prepared(layers, tests=("shared",))) == [1, 4, 7, 10]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("energy", [1.0, 0.5, 0.3, 0.0])
def test_no_good_client_is_flagged(energy: float, seed: int) -> None:
    layers = clients(seed, energy=energy)
    assert flagged(prepared(layers)) == []
    plain = sm.mean()
    for layer in layers:
        assert torch.equal(
            prepared(layers, tests=("shared", "norm"))(layer).dense(), plain(layer).dense()
        )


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_to_tell_apart(count: int) -> None:
    assert flagged(prepared(clients(0, count))) == []


def test_one_of_three_can_be_told() -> None:
    assert flagged(prepared(spoilt(clients(0, 3), [2], noise), tests=("shared",))) == [2]


def test_a_majority_is_never_flagged() -> None:
    layers = spoilt(clients(0), range(11), noise)
    assert flagged(prepared(layers)) == []


def test_flipped_signs_are_invisible_to_it_and_not_to_agreement() -> None:
    layers = spoilt(clients(0), [3], lambda u, _: u.scaled(-1.0))
    assert flagged(prepared(layers)) == []
    with pytest.warns(sm.SapmergeWarning, match="'adapter3'"):
        agreement = sm.prepare(sm.WeighByAgreement(sm.mean()), layers)
    assert agreement.shares[3] < 0.1  # type: ignore[index]


def test_the_longest_is_flagged_by_its_norm() -> None:
    layers = spoilt(clients(0), [5], lambda u, _: u.scaled(30.0))
    method = prepared(layers)
    assert flagged(method) == [5]
    assert method.findings["contaminated"]["adapter5"]["tests"] == ["norm"]
    # short ones do no harm
    assert flagged(prepared(spoilt(clients(0), [5], lambda u, _: u.scaled(0.01)))) == []


def test_worse_than_the_base_on_anchors() -> None:
    layers = clients(1)
    losses = LinearLoss(layers).losses()
    worst = max(range(12), key=lambda k: losses[k])
    others = [k for k in range(12) if k != worst and losses[k] > 0]
    layers = spoilt(layers, others, lambda u, _: u.scaled(-1.0))
    stream = sm.Stream(layers, LinearLoss(layers))
    method = sm.prepare(sm.FlagContaminated(sm.mean(), tests=("anchors",)), stream)
    assert flagged(method) == ([worst] if losses[worst] > 0 else [])


def test_absent_zero_and_weightless_adapters_take_no_part() -> None:
    layers = spoilt(clients(0), [11], noise)
    layers = [replace(x, weights=(1.0,) * 10 + (0.0, 1.0)) for x in layers]
    layers[0] = replace(
        layers[0],
        updates=(*layers[0].updates[:1], layers[0].updates[1].scaled(0.0), *layers[0].updates[2:]),
    )
    method = prepared(layers, tests=("shared",))
    assert flagged(method) == [11]
    assert "adapter10" not in method.findings["shared_z"]
    assert "adapter1" in method.findings["shared_z"]  # it has other layers


def test_it_does_not_depend_on_norms_order_or_factors() -> None:
    layers = spoilt(clients(3), [2, 5], noise)
    z = prepared(layers, tests=("shared",)).findings["shared_z"]
    order = [7, 3, 0, 11, 2, 5, 1, 10, 4, 9, 8, 6]
    moved = [
        replace(
            x,
            updates=tuple(x.updates[k].scaled(2.0 + k) for k in order),
            adapters=tuple(x.adapters[k] for k in order),
            digests=tuple(x.digests[k] for k in order),
        )
        for x in layers
    ]
    again = prepared(moved, tests=("shared",)).findings["shared_z"]
    assert all(abs(again[label] - z[label]) < 1e-6 for label in z)


def test_the_report_names_them() -> None:
    bad = spoilt(clients(2), [4], noise)
    adapters = [
        adapter({x.name: (x.updates[k].B, x.updates[k].A) for x in bad}, f"c{k}", 4)  # type: ignore[union-attr]
        for k in range(12)
    ]
    with pytest.warns(sm.SapmergeWarning, match=r"'c4' \(shared\)"):
        merged = sm.merge(adapters, method=sm.clair())
    assert merged.report.notes["contaminated"]["c4"]["tests"] == ["shared"]
    assert len(merged.report.notes["shared_z"]) == 12
    assert merged.report.notes["subspace"]["layer0"]["rank"] == 2
    good = sm.merge([a for a in adapters if a.label != "c4"], method=sm.mean())
    assert all(
        torch.allclose(dense(merged)[name], dense(good)[name], atol=1e-6) for name in dense(good)
    )
    assert repr(sm.parse(repr(sm.clair()))) == repr(sm.clair())


@pytest.mark.parametrize(
    "options", [{"tests": ()}, {"tests": ("luck",)}, {"rank": 0}, {"side": "top"}, {"form": "x"}]
)
def test_wrong_arguments(options: dict[str, object]) -> None:
    with pytest.raises(sm.MethodError):
        sm.FlagContaminated(sm.mean(), **options)  # type: ignore[arg-type]
    with pytest.raises(sm.MethodError, match="looks at whole adapters"):
        sm.clair()(clients(0)[0])
