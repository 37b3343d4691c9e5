"""The laws that every method of `sapmerge.methods.__all__` obeys.
A new name there is a new case here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

import sapmerge as sm
from sapmerge import contrib, methods
from sapmerge.core.part import parts
from sapmerge.core.torch_state import pinned_state
from tests import conftest, oracles
from tests.conftest import SHAPES, changed, dense, error, low_rank, make_layers

# (method, law) -> why the law does not hold. Everything else holds for every method.
EXCEPTIONS = {
    ("mean", "zero is neutral"): "an adapter of zero counts as a member of the mean",
    ("sap", "homogeneous"): "weights and length are those of a loss that is not homogeneous",
    ("sap_original", "zero is neutral"): "as mean",
    (
        "iso_c",
        "one adapter",
    ): "every direction gets the mean singular value, so one adapter gets it too",
    ("iso_cts", "one adapter"): "as iso_c",
    ("dc_merge", "one adapter"): "smooths the singular values of every adapter, so of one too",
    ("cart", "zero is neutral"): "as mean, whose distance to each adapter it adds",
    ("tsv", "copies"): "directions are shared out among those who have them: K copies make one",
    ("iso_cts", "copies"): "the sum of three copies is three times one, so are its singular values",
    (
        "dc_merge",
        "copies",
    ): "as tsv, and only the part of the result in one adapter's own share is kept",
    (
        "core_space",
        "copies",
    ): "the density counts coordinates of an (R, R) core, R the sum of ranks: copies raise it",
    (
        "robustmerge",
        "gauge rotate",
    ): "the paper prunes factors as they were trained; balance=True is invariant",
    ("robustmerge", "gauge general"): "as rotate; only a common scale (B / c, c A) changes nothing",
    ("factor_average", "zero is neutral"): "as mean",
    ("factor_average", "gauge scale"): "it averages the factors themselves, and says so",
    ("factor_average", "gauge rotate"): "as scale",
    ("factor_average", "gauge general"): "as scale",
    ("hetlora", "gauge scale"): "as factor_average",
    ("hetlora", "gauge rotate"): "as factor_average",
    ("hetlora", "gauge general"): "as factor_average",
    ("yoco", "zero is neutral"): "as mean",
    ("yoco", "gauge scale"): "as factor_average",
    ("yoco", "gauge rotate"): "as factor_average",
    ("yoco", "gauge general"): "as factor_average",
    ("ffa", "zero is neutral"): "as mean",
    ("clair", "zero is neutral"): "as mean",
    ("fedrpca", "zero is neutral"): "as mean",
    (
        "fedrpca",
        "copies",
    ): "copies are of low rank to the tolerance of the iteration, 1e-7; one adapter is exactly",
    ("model_stock", "zero is neutral"): "as mean",
    ("geometric_median", "zero is neutral"): "zero is a point like any other, and pulls",
    ("trimmed_mean", "zero is neutral"): "as mean",
    ("krum", "zero is neutral"): "as geometric_median",
    (
        "fisher",
        "zero is neutral",
    ): "as mean: the model that it leaves alone has a Fisher information too",
    ("regmean", "zero is neutral"): "as mean, with the inputs that the base sees",
    ("lorm", "zero is neutral"): "as regmean",
    ("tune", "zero is neutral"): "a candidate may be a mean",
    (
        "tune",
        "homogeneous",
    ): "another candidate may have the lowest loss: the anchor loss is not homogeneous",
    ("adamerging", "homogeneous"): "the coefficients lower a loss that is not homogeneous",
    ("tara", "homogeneous"): "as adamerging",
    ("nsc", "homogeneous"): "as adamerging",
    ("lorahub", "homogeneous"): "as adamerging",
    ("lorahub", "copies"): "the search has a direction for every adapter",
    ("ram", "homogeneous"): "entries count from a threshold on",
    ("star", "zero is neutral"): "as mean",
    ("spectral_surgery", "zero is neutral"): "as mean",
    ("loraprune", "zero is neutral"): "as mean",
    (
        "loraprune",
        "homogeneous",
    ): "gB gA changes its sign with the update and gB A + B gA does not; see test_loraprune",
    ("gradpruner", "zero is neutral"): "as mean",
    ("movement", "zero is neutral"): "as mean",
    ("pico", "zero is neutral"): "the result has the mean norm of its inputs, a zero included",
    ("pico", "copies"): "copies share every direction, and the strongest are damped most",
    ("score", "copies"): "as tsv",
    ("sce", "zero is neutral"): "entries are selected by their variance over all adapters",
}

AND_YET = {
    ("fedrpca", "copies"),
    ("robustmerge-1", "gauge rotate"),
    ("robustmerge-1", "gauge general"),
    ("tune", "zero is neutral"),
    ("star-1", "zero is neutral"),
    ("lorahub", "copies"),
    ("core_space-1", "copies"),
    ("core_space-2", "copies"),
    ("core_space-4", "copies"),
}
"""Variants of a method in EXCEPTIONS that obey the law: (method-number of the variant, law)."""

# Arguments under which a method drops nothing; `density=1` where there is a density.
KEEPS_ALL = {
    "core_space": {"inner": methods.ties(density=1.0)},
    "ctm": {"inner": methods.ties(density=1.0)},
    "lines": {"alpha": 1.0, "beta": 0.0},
    "adamerging": {"init": 1.0, "steps": 0},
    "tara": {"init": 1.0, "steps": 0},
    "nsc": {"init": 1.0, "steps": 0},
    "lorahub": {"init": 1.0, "steps": 0},
    "star": {"share": 1.0},
    "spectral_surgery": {"up": 1.0, "down": 1.0},
    "ram": {"threshold": 0.0},
    "tune": {"candidates": (methods.mean(),)},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    "subspace_boosting": {"beta": 1.0},
    "pcb": {"density": 1.0, "clip": 0.0},
}

# More settings of a method, tested like its defaults.
VARIANTS = {
    "ties": [{"majority_sign_method": "frequency"}, {"density": 0.35, "scope": "adapter"}],
    "dare_ties": [{"majority_sign_method": "frequency", "density": 0.7}],
    "knots": [{"scaled": False}],
    "sap": [
        {"units": sm.Directions()},
        {"units": sm.Entries(), "density": 0.4},
        {"scorer": sm.SecondOrder()},
    ],
    "core_space": [
        {"inner": methods.ties(0.5, scope="adapter")},
        {"inner": methods.task_arithmetic(), "balance": False},
        {"inner": methods.tsv()},
        {"inner": methods.iso_c()},
    ],
    "iso_cts": [{"common_fraction": 0.4}],
    "cart": [{"rank_fraction": 0.3, "scale": 1.0}],
    "dc_merge": [{"smoothing": "linear"}, {"smoothing": "none", "density": 0.3}],
    "lines": [{"method": methods.ties(0.5), "alpha": 0.3}],
    "lora_lego": [{"rank": 2}],
    "robustmerge": [{"density": 0.6, "balance": True}],
    "breadcrumbs": [
        {"scope": "row", "density": 0.4, "gamma": 0.1},
        {"first": "keep", "density": 0.4, "gamma": 0.1},
    ],
    "consensus_ta": [{"ratio": 0.3, "count": 1}],
    "della": [{"scope": "layer", "density": 0.3, "window": 0.2}],
    "geometric_median": [{"scope": "layer"}],
    "krum": [{"scope": "layer"}],
    "model_stock": [{"scope": "row"}],
    "pcb": [{"density": 0.3, "clip": 0.0}],
    "sce": [{"density": 0.6}],
    "trimmed_mean": [{"trim": 0.4}],
    "score": [{"width": 0.7, "rank": 2}],
    "pico": [{"method": methods.ties(0.5)}],
    "wudi": [{"steps": 2.0, "start": "mean"}, {"share": 0.6, "start": "mean"}],
    "fedrpca": [{"beta": 0.5}],
    "yoco": [{"components": 1}],
    "fisher": [{"square": "batch", "normalize": True, "floor": 0.0}],
    "regmean": [{"reduction": 0.0}, {"reduction": 1.0, "unseen": 1.0}],
    "lorm": [{"merge": "B"}, {"reduction": 1.0}],
    "tune": [{"candidates": (methods.ties(0.3), methods.regmean()), "scales": (0.5, 1.0)}],
    "adamerging": [{"scope": "adapter", "steps": 3}],
    "lorahub": [{"scope": "layer", "steps": 10, "penalty": 0.0}],
    "star": [{"share": 0.8, "merger": sm.Sum()}],
    "spectral_surgery": [{"share": 0.3, "up": 2.0, "down": 0.0}],
    "loraprune": [{"axis": "column", "power": 1, "density": 0.3}],
    "gradpruner": [{"by": "module", "score": contrib.Summed(sm.Taylor())}],
}

METHODS = {
    name: getattr(module, name)
    for module in (methods, contrib)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}


def run(method: sm.Method, layers: Sequence[sm.Layer]) -> dict[str, sm.Update]:
    """`conftest.run` on inputs that the method takes:
    two adapters for slerp, factors of one rank for FactorMean.
    """
    kinds = {type(part) for part in parts(method)}
    if sm.Slerp in kinds:
        layers = [_two(layer) for layer in layers]
    if kinds & {sm.LoRMA, sm.LoRMB, sm.SharedFactorMean}:
        layers = [_sharing(layer, "B" if sm.LoRMA in kinds else "A") for layer in layers]
    if not kinds & {sm.FactorMean, sm.FactorPCA}:
        return conftest.run(method, layers)
    rank = max(update.rank for layer in layers for update in layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sm.SapmergeWarning)
        return conftest.run(method, change(list(layers), lambda update, k: _padded(update, rank)))


def _two(layer: sm.Layer) -> sm.Layer:
    """The first two adapters with a weight, by label."""
    labels = sorted(a for a, weight in zip(layer.adapters, layer.weights) if weight != 0)[:2]
    index = [k for k, label in enumerate(layer.adapters) if label in labels]
    fields = {
        name: tuple(getattr(layer, name)[k] for k in index)
        for name in ("updates", "adapters", "weights")
    }
    return changed(layer, **fields, digests=tuple(layer.digests[k] for k in index))


def _sharing(layer: sm.Layer, factor: str) -> sm.Layer:
    """The same updates, with a factor that is the same in all of them."""
    present = [
        update for update, weight in zip(layer, layer.weights) if update.rank and weight != 0
    ]
    if not present:
        return layer
    stacked = torch.cat([update.B if factor == "B" else update.A.T for update in present], 1)
    Q = torch.linalg.qr(stacked.double())[0].to(stacked.dtype)

    def written(update: sm.LowRank) -> sm.LowRank:
        if not update.rank:
            return update
        return (
            sm.LowRank(Q, (Q.T @ update.B) @ update.A)
            if factor == "B"
            else sm.LowRank(update.B @ (update.A @ Q), Q.T)
        )

    return changed(layer, updates=tuple(written(update) for update in layer))


def _padded(update: sm.LowRank, rank: int) -> sm.LowRank:
    """The same update with factors of a larger rank; an absent one stays absent."""
    extra = rank - update.rank if update.rank else 0
    return sm.LowRank(
        torch.cat([update.B, update.B.new_zeros(update.shape[0], extra)], 1),
        torch.cat([update.A, update.A.new_zeros(extra, update.shape[1])]),
    )


def cases() -> Iterator[object]:
    for name, make in METHODS.items():
        yield pytest.param(name, make(), id=name)
        for number, arguments in enumerate(VARIANTS.get(name, [])):
            yield pytest.param(name, make(**arguments), id=f"{name}-{number + 1}")


every_method = pytest.mark.parametrize(("name", "method"), list(cases()))


def hold(name: str, law: str) -> None:
    """What is an exception has to fail: a law that holds after all is taken off the list."""
    [case] = conftest.CASE
    # "dtype0-scale-sap-3": the third variant of sap
    variant = case.name.partition("[")[2].rstrip("]").split("-")
    variant = f"{name}-{variant[-1]}" if len(variant) > 1 and variant[-2] == name else name
    if (name, law) in EXCEPTIONS and (variant, law) not in AND_YET:
        strict = law != "homogeneous"  # a small factor may choose no other candidate, row or step
        case.add_marker(pytest.mark.xfail(strict=strict, reason=EXCEPTIONS[name, law]))
    case.add_report_section(
        "call",
        "law",
        f"{name} does not obey {law!r}. If that is a property of the method, say why in "
        f"EXCEPTIONS[{name!r}, {law!r}]; "
        "if it holds under some arguments, put them into KEEPS_ALL; else the method is wrong.",
    )


def keeping_all(name: str) -> sm.Method:
    make = METHODS[name]
    if name in KEEPS_ALL:
        return make(**KEEPS_ALL[name])
    return make(density=1.0) if "density" in inspect.signature(make).parameters else make()


def takes_dense(method: sm.Method) -> bool:
    """Pruning the factors of an update that has none is refused, by name (see test_primitives)."""
    factors = (sm.Factors, sm.FactorMean, sm.LoRMA, sm.LoRMB, sm.PruneGroups)
    factors += (sm.SharedFactorMean, sm.PaddedFactorMean, sm.FactorPCA)
    return not any(isinstance(part, factors) for part in parts(method))


def close(
    got: dict[str, sm.Update], wanted: dict[str, sm.Update], tolerance: float, factor: float = 1.0
) -> None:
    for name in wanted:
        assert error(got[name].dense(), wanted[name].dense() * factor) < tolerance, name


def change(layers: list[sm.Layer], function) -> list[sm.Layer]:
    """Every update of every layer replaced by function(update, k)."""
    return [changed(x, updates=tuple(function(u, k) for k, u in enumerate(x))) for x in layers]


@every_method
def test_one_adapter_comes_back(name: str, method: sm.Method) -> None:
    hold(name, "one adapter")
    layers = make_layers(ranks=[3])
    for name_, update in run(keeping_all(name), layers).items():
        assert (
            error(update.dense(), next(x for x in layers if x.name == name_).updates[0].dense())
            < 1e-12
        )
    halved = [changed(layer, weights=(0.5,)) for layer in layers]
    factor = 0.5 if any(isinstance(part, sm.Sum) for part in parts(keeping_all(name))) else 1.0
    close(run(keeping_all(name), halved), run(keeping_all(name), layers), 1e-12, factor)


@every_method
def test_order_of_adapters_is_irrelevant(name: str, method: sm.Method) -> None:
    hold(name, "order")
    layers = make_layers(weights=[1.0, 0.5, 0.7])
    order = [2, 0, 1]
    permuted = [
        replace(
            x,
            updates=tuple(x.updates[k] for k in order),
            adapters=tuple(x.adapters[k] for k in order),
            weights=tuple(x.weights[k] for k in order),
            digests=tuple(x.digests[k] for k in order),
        )
        for x in layers
    ]
    close(run(method, permuted), run(method, layers), 1e-10)


@every_method
@pytest.mark.parametrize("factor", [-1.0, 3.0, 1e6, 1e-6, -1e-3])
def test_homogeneous(name: str, method: sm.Method, factor: float) -> None:
    hold(name, "homogeneous")
    layers = make_layers(weights=[1.0, 0.5, 0.7])
    scaled = change(layers, lambda update, k: update.scaled(factor))
    close(run(method, scaled), run(method, layers), 1e-9, factor)


@every_method
def test_zero_adapter_is_neutral(name: str, method: sm.Method) -> None:
    hold(name, "zero is neutral")
    layers = make_layers()
    for zero in (lambda u: sm.LowRank(u.B * 0, u.A), lambda u: sm.absent(u.shape, u.A)):
        more = [
            replace(
                x,
                updates=(*x.updates, zero(x.updates[0])),
                adapters=(*x.adapters, "zero"),
                weights=(*x.weights, 0.6),
                digests=(*x.digests, "zero"),
            )
            for x in layers
        ]
        close(run(method, more), run(method, layers), 1e-10)


@every_method
def test_zero_weight_is_no_adapter(name: str, method: sm.Method) -> None:
    """A weight of zero leaves the adapter out of votes and sums. (It may still shape a basis.)"""
    if any(isinstance(part, sm.In) for part in parts(method)):
        pytest.skip("a basis is made from all adapters")
    layers = make_layers(weights=[1.0, 0.0, 0.7])
    without = [
        changed(
            x,
            updates=x.updates[::2],
            adapters=x.adapters[::2],
            weights=x.weights[::2],
            digests=x.digests[::2],
        )
        for x in layers
    ]
    close(run(method, layers), run(method, without), 1e-12)


def _gauges() -> dict[str, object]:
    def scale(update: sm.LowRank, k: int) -> sm.LowRank:
        return sm.LowRank(update.B / 10.0 ** (k + 1), update.A * 10.0 ** (k + 1))

    def rotate(update: sm.LowRank, k: int) -> sm.LowRank:
        Q = torch.linalg.qr(
            low_rank((update.rank, update.rank), update.rank, 77 + k, update.dtype).dense()
        )[0]
        return sm.LowRank(update.B @ Q.T, Q @ update.A)

    def general(update: sm.LowRank, k: int) -> sm.LowRank:
        R = low_rank((update.rank, update.rank), update.rank, 99 + k, update.dtype).dense()
        R = R + 2 * torch.eye(update.rank, dtype=update.dtype)
        return sm.LowRank(torch.linalg.solve(R.T, update.B.T).T, R @ update.A)

    return {"scale": scale, "rotate": rotate, "general": general}


@every_method
@pytest.mark.parametrize("gauge", list(_gauges()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gauge_invariant(name: str, method: sm.Method, gauge: str, dtype: torch.dtype) -> None:
    """The result depends on the products B_k A_k, not on how they are split into factors."""
    hold(name, f"gauge {gauge}")
    layers = make_layers(dtype=dtype)
    other = change(layers, _gauges()[gauge])
    close(run(method, other), run(method, layers), 1e-4 if dtype == torch.float32 else 1e-9)


def test_core_space_without_balance_is_not_gauge_invariant() -> None:
    """Why `balance=True` is the default: one adapter written as (A / 10, 10 B) changes
    Core-TIES a lot.
    """
    layers = make_layers([4, 4, 4], {"l": (24, 16)})
    other = change(layers, lambda u, k: sm.LowRank(u.B * 10, u.A / 10) if k == 0 else u)
    rotated = change(layers, _gauges()["rotate"])
    for balance, low, high in ((False, 0.3, 2.0), (True, 0.0, 1e-9)):
        method = sm.core_space(sm.ties(0.2), balance=balance)
        moved = error(run(method, other)["l"].dense(), run(method, layers)["l"].dense())
        assert low <= moved <= high
        assert error(run(method, rotated)["l"].dense(), run(method, layers)["l"].dense()) < 1e-9


TINY = {"one": (1, 1), "row": (1, 6), "column": (5, 1), "square": (4, 4)}


def _degenerate(dtype: torch.dtype) -> dict[str, list[sm.Layer]]:
    zero = change(
        make_layers(shapes=TINY, dtype=dtype),
        lambda u, k: sm.LowRank(u.B * 0, u.A) if k == 1 else u,
    )
    return {
        "ranks above the shape": make_layers(shapes=TINY, dtype=dtype),
        "rank one": make_layers([1, 1, 1], TINY, dtype),
        "one adapter": make_layers([2], TINY, dtype),
        "identical": [
            changed(x, updates=(x.updates[0],) * 3) for x in make_layers([2, 2, 2], TINY, dtype)
        ],
        "identical digests": [
            changed(x, updates=(x.updates[0],) * 3, digests=("same",) * 3)
            for x in make_layers([2, 2, 2], TINY, dtype)
        ],
        "opposite": [
            changed(x, updates=(x.updates[0], x.updates[0].scaled(-1)))
            for x in make_layers([2, 2], TINY, dtype)
        ],
        "a zero adapter": zero,
        "all zero": change(zero, lambda u, k: sm.LowRank(u.B * 0, u.A)),
        "one absent": make_layers([2, 0, 3], TINY, dtype),
        "all absent": make_layers([0, 0], TINY, dtype),
        "dense": change(make_layers(shapes=TINY, dtype=dtype), lambda u, k: sm.Dense(u.dense())),
        "dense and low rank": change(
            make_layers([2, 0, 3], TINY, dtype), lambda u, k: sm.Dense(u.dense()) if k == 0 else u
        ),
        "huge": change(
            make_layers(shapes=TINY, dtype=dtype), lambda u, k: sm.LowRank(u.B * 1e6, u.A)
        ),
        "tiny": change(
            make_layers(shapes=TINY, dtype=dtype), lambda u, k: sm.LowRank(u.B * 1e-6, u.A)
        ),
        "huge and tiny": change(
            make_layers(shapes=TINY, dtype=dtype),
            lambda u, k: sm.LowRank(u.B * (1e6, 1.0, 1e-6)[k], u.A),
        ),
        "negative weights": make_layers(shapes=TINY, dtype=dtype, weights=[1.0, -0.5, 0.7]),
    }


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", list(_degenerate(torch.float64)))
def test_degenerate_inputs_are_ordinary(
    name: str, method: sm.Method, case: str, dtype: torch.dtype
) -> None:
    if case.startswith("dense") and not takes_dense(method):
        pytest.skip("a dense update has no factors")
    layers = _degenerate(dtype)[case]
    merged = run(method, layers)
    for layer in layers:
        update = merged[layer.name]
        assert update.shape == layer.shape
        assert update.dtype == dtype
        assert bool(torch.isfinite(update.dense()).all())
        if case.startswith("all "):
            assert not update.dense().any()


@every_method
def test_identical_adapters_vote_alike(name: str, method: sm.Method) -> None:
    """Three copies with weights 1: the mean of three is one of them, the sum three times one,
    same digest or not.
    """
    hold(name, "copies")
    single = make_layers([3])
    factor = 3.0 if any(isinstance(part, sm.Sum) for part in parts(method)) else 1.0
    thrice = [
        changed(
            x,
            updates=x.updates * 3,
            adapters=("a", "b", "c"),
            weights=(1.0,) * 3,
            digests=(x.digests[0],) * 3,
        )
        for x in single
    ]
    close(run(method, thrice), run(method, single), 1e-9, factor)


def unit_sizes(update: sm.Update, units: sm.Units) -> list[int]:
    return [values.numel() if update.rank else 0 for values in units(update).values.values()]


def nonzero(update: sm.Update, units: sm.Units) -> list[int]:
    """How many units of each part are left, read off the pruned update."""
    if isinstance(units, sm.Factors):
        return [int((update.A != 0).sum()), int((update.B != 0).sum())]
    if isinstance(units, sm.Directions):
        return [int(torch.linalg.matrix_rank(update.dense()))]
    return [int((update.dense() != 0).sum())]


@every_method
@pytest.mark.parametrize("absent", [False, True])
def test_kept_count(name: str, method: sm.Method, absent: bool) -> None:
    """floor(density n + 1e-9) of every tensor, or of the whole adapter;
    random masks within six standard deviations.
    """
    layers = make_layers([2, 4, 3])
    if absent:
        layers[0] = replace(
            layers[0],
            updates=(sm.absent(layers[0].shape, layers[0].updates[0].A), *layers[0].updates[1:]),
        )
    prunes = [part for part in parts(method) if isinstance(part, sm.Prune)]
    if not prunes:
        pytest.skip("prunes nothing")

    inside: list[sm.Layer] = []

    def collect(layer: sm.Layer) -> sm.Update:
        inside.append(layer)
        return layer.updates[0]

    bases = [part.basis for part in parts(method) if isinstance(part, sm.In)]
    run(sm.In(bases[0], collect) if bases else collect, layers)
    prune = sm.prepare(prunes[0], conftest.Anchored(inside, conftest.LinearLoss(layers)))
    pruned = [prune(layer) for layer in inside]
    for k in range(3):
        sizes = [size for layer in inside for size in unit_sizes(layer.updates[k], prune.units)]
        kept = [count for layer in pruned for count in nonzero(layer.updates[k], prune.units)]
        mask = prunes[0].mask
        if isinstance(mask, sm.Threshold):
            total, density = sum(sizes), 1 - mask.minimum
            assert abs(sum(kept) - density * total) < 6 * (total * density * (1 - density)) ** 0.5
        elif isinstance(mask, sm.TopFraction) and mask.scope == "layer":
            assert kept == [oracles.count(mask.density, size) if size else 0 for size in sizes]
        elif isinstance(mask, sm.TopFraction):
            assert sum(kept) == oracles.count(mask.density, sum(sizes))


@every_method
def test_same_bits_in_any_layer_order_and_thread_count(name: str, method: sm.Method) -> None:
    """As `merge` runs it, inside `pinned_state`: the kernels of two threads add up in another
    order on some CPUs.
    """
    layers = make_layers(dtype=torch.float32, shapes={**SHAPES, "big": (48, 40)})

    def merged(order: list[sm.Layer]) -> dict[str, torch.Tensor]:
        with pinned_state():
            return dense(run(method, order))

    torch.set_num_threads(1)
    wanted = merged(layers)
    torch.set_num_threads(2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for order in (layers, layers[::-1], layers[2:] + layers[:2]):
        again = merged(order)
        assert all(torch.equal(again[layer], wanted[layer]) for layer in wanted)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"


@every_method
def test_float32_and_float64_agree(name: str, method: sm.Method) -> None:
    double = make_layers(weights=[1.0, 0.5, 0.7])
    single = make_layers(weights=[1.0, 0.5, 0.7], dtype=torch.float32)
    got, wanted = run(method, single), run(method, double)
    for layer_name in wanted:
        assert got[layer_name].dtype == torch.float32
        assert wanted[layer_name].dtype == torch.float64
    close(got, wanted, 1e-4)


@every_method
def test_inputs_are_not_modified(name: str, method: sm.Method) -> None:
    layers = make_layers([2, 0, 3])
    layers = change(
        layers, lambda u, k: sm.Dense(u.dense()) if k == 2 and takes_dense(method) else u
    )
    tensors = [
        tensor
        for layer in layers
        for update in layer
        for tensor in ((update.A, update.B) if isinstance(update, sm.LowRank) else (update.matrix,))
    ]
    before = [tensor.clone() for tensor in tensors]
    shown = repr(method)
    merged = run(method, layers)
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    assert repr(method) == shown
    again = run(method, layers)
    assert all(torch.equal(merged[n].dense(), again[n].dense()) for n in merged)


@every_method
def test_linear_methods_stay_low_rank(name: str, method: sm.Method) -> None:
    """No (m, n) matrix is made unless a rule masks entries of the update itself."""
    layers = make_layers([1, 1, 1], {"l": (30, 40)})
    entrywise = (sm.Entries, sm.ElectSign, sm.DisjointMean, sm.Consensus, sm.Select)
    entrywise += (
        sm.CoordinateMedian,
        sm.TrimmedMean,
        sm.Compete,
        sm.Unify,
        sm.FisherMean,
        sm.PruneRuns,
    )
    entrywise += (sm.RobustPCA,)
    prunes_entries = any(isinstance(part, entrywise) for part in parts(method))
    in_basis = any(isinstance(part, sm.In) for part in parts(method))
    update = run(method, layers)["l"]
    if in_basis or not prunes_entries:
        assert isinstance(update, sm.LowRank)
        assert update.rank <= 3


def test_exceptions_name_real_methods() -> None:
    assert {name for name, _ in EXCEPTIONS} | set(KEEPS_ALL) | set(VARIANTS) <= set(METHODS)
    for name, make in METHODS.items():
        assert (inspect.getdoc(make) or "").strip(), f"{name} has no docstring"


# --- values: our methods against the reference formulas, with weights, ranks 2, 4, 3 and a layer
# missing --------------


def _model(layers: list[sm.Layer]) -> list[list]:
    return [[update.dense().numpy() for update in layer] for layer in layers]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 0.7], [1.0, -0.5, 0.7]])
@pytest.mark.parametrize("method_name", ["total", "frequency"])
@pytest.mark.parametrize("scope", ["layer", "adapter"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_is_the_textbook(
    weights: list[float], method_name: str, scope: str, density: float
) -> None:
    layers = make_layers(weights=weights)
    got = run(sm.ties(density, method_name, scope), layers)
    wanted = oracles.ties(_model(layers), density, weights, scope, method_name)
    for layer, matrix in zip(layers, wanted):
        assert error(got[layer.name].dense(), torch.from_numpy(matrix)) < 1e-12


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_knots_and_core_space_are_the_textbook(density: float) -> None:
    layers = make_layers([2, 3, 2])
    for scaled in (True, False):
        got = run(sm.knots(density, scaled), layers)
        for layer, matrix in zip(layers, oracles.knots(_model(layers), density, scaled)):
            assert error(got[layer.name].dense(), torch.from_numpy(matrix)) < 1e-9
    factors = [[(u.B.numpy(), u.A.numpy()) for u in layer] for layer in layers]
    for balance in (True, False):
        got = run(sm.core_space(sm.ties(density), balance), layers)
        for layer, matrix in zip(layers, oracles.core_ties(factors, density, balance)):
            assert error(got[layer.name].dense(), torch.from_numpy(matrix)) < 1e-9


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 0.5, 0.7], [1.0, -0.5, 0.7]])
def test_sums_and_means_are_exact(weights: list[float]) -> None:
    layers = make_layers([2, 0, 3], weights=weights)
    for layer in layers:
        matrices = [update.dense().numpy() for update in layer]
        total = torch.from_numpy(oracles.weighted_sum(matrices, weights))
        assert error(sm.task_arithmetic()(layer).dense(), total) < 1e-14
        assert error(sm.mean()(layer).dense(), total / sum(weights)) < 1e-14
        pruned = torch.from_numpy(
            oracles.weighted_sum([oracles.trim(m, 0.3) for m in matrices], weights)
        )
        assert error(sm.magnitude_prune(0.3)(layer).dense(), pruned) < 1e-14
        for basis in (
            sm.SharedBasis(),
            sm.SharedBasis(scaled=False),
            sm.CoreSpace(),
            sm.CoreSpace(balance=False),
        ):
            assert error(sm.In(basis, sm.task_arithmetic())(layer).dense(), total) < 1e-9


def test_dare_is_unbiased_and_rescaled() -> None:
    """Every kept entry is divided by the density; over many seeds the mean is the update."""
    layer = make_layers([3], {"l": (6, 5)})[0]
    whole, total = layer.updates[0].dense(), torch.zeros(6, 5).double()
    for seed in range(200):
        got = sm.dare(0.4, seed)(layer).dense()
        kept = got != 0
        torch.testing.assert_close(got[kept], whole[kept] / 0.4)
        total += got
    deviation = whole.abs() * (0.6 / 0.4 / 200) ** 0.5
    assert bool(((total / 200 - whole).abs() < 5 * deviation).all())
    assert not torch.equal(sm.dare(0.4, 1)(layer).dense(), sm.dare(0.4, 2)(layer).dense())


def test_random_masks_depend_on_content_and_layer_only() -> None:
    layers = make_layers([2, 2], {"x": (8, 8), "y": (8, 8)})
    x, y = layers[0], replace(layers[0], name="y")
    masks = [[u.dense() != 0 for u in sm.dare(0.5).steps[0](layer)] for layer in (x, y)]
    assert not torch.equal(masks[0][0], masks[0][1])
    assert not torch.equal(masks[0][0], masks[1][0])
    renamed = changed(x, adapters=("other", "names"))  # digests stay
    for mask, update in zip(masks[0], sm.dare(0.5).steps[0](renamed)):
        assert torch.equal(update.dense() != 0, mask)
