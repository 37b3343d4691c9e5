"""Planted bad clients among synthetic ones: who finds exactly those.

    python benchmarks/planted.py                          # ten seeds; minutes
    python benchmarks/planted.py --seeds 0-1

Updates of rank 4 have a share of their energy in a plane per layer that all good clients have in
common, with a common mean in it; the rest is a client's own. The table, of CLAIR's two forms, the
lowest agreement and Krum, goes to benchmarks/results/planted.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tables
import torch
from torch import Tensor

import sapmerge as sm
from sapmerge.core.lowrank import whole_gram

Spoil = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(update, a direction (m, 2) common to all bad clients, chance) -> update."""


def _random(like: Tensor, chance: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=chance, dtype=torch.float64)


def noise(D: Tensor, _: Tensor, chance: torch.Generator) -> Tensor:
    return _random(D, chance)


def one_direction(D: Tensor, _: Tensor, chance: torch.Generator) -> Tensor:
    return _random(D[:, :1], chance) @ _random(D[:1], chance)


def colluding(D: Tensor, common: Tensor, chance: torch.Generator) -> Tensor:
    return common @ _random(D[:2], chance)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        spoil: what a bad client sends, brought to the norm of a good update, times `length`; None:
            its own update, flipped.
        shared: the share of energy in the common plane.
        convex: whether the convex program is run, too: it costs a decomposition per layer and step.
    """

    name: str
    spoil: Spoil | None = noise
    clients: int = 12
    bad: int = 4
    shared: float = 1.0
    length: float = 1.0
    layers: int = 3
    shape: tuple[int, int] = (24, 20)
    convex: bool = True


CASES = (
    Case("dense noise"),
    Case("a direction of rank 1 of its own", one_direction),
    Case("ten times too long", length=10.0),
    Case("colluding: one common wrong plane", colluding),
    Case("signs flipped", None),
    Case("shared energy .7", shared=0.7),
    Case("shared energy .5", shared=0.5),
    Case("shared energy .3", shared=0.3),
    Case("shared energy .2", shared=0.2),
    Case(".3, 12 layers of 64 x 48", shared=0.3, layers=12, shape=(64, 48), convex=False),
    Case(".2, 24 layers of 128 x 96", shared=0.2, layers=24, shape=(128, 96), convex=False),
    Case(".1, 24 layers of 128 x 96", shared=0.1, layers=24, shape=(128, 96), convex=False),
    Case("3 clients, 1 bad", clients=3, bad=1),
    Case("4 clients, 1 bad, shared .5", clients=4, bad=1, shared=0.5),
    Case("11 of 12 bad", bad=11),
    Case("nobody bad", bad=0),
    Case("nobody bad, shared .5", bad=0, shared=0.5),
    Case("nobody bad, shared .3", bad=0, shared=0.3),
)


def planted(case: Case, seed: int) -> tuple[list[sm.Layer], dict[str, Tensor], set[int]]:
    """The layers, the true plane of each, and who is bad."""
    chance = torch.Generator().manual_seed(seed)
    bad = set(torch.randperm(case.clients, generator=chance)[: case.bad].tolist())
    layers, planes = list[sm.Layer](), dict[str, Tensor]()
    (m, n), dtype = case.shape, torch.float64
    for number in range(case.layers):
        U = torch.linalg.qr(torch.randn(m, 2, generator=chance, dtype=dtype))[0]
        lie = torch.linalg.qr(torch.randn(m, 2, generator=chance, dtype=dtype))[0]
        common, updates = torch.randn(2, n, generator=chance, dtype=dtype), list[sm.Update]()
        for k in range(case.clients):
            inside = U @ (common + torch.randn(2, n, generator=chance, dtype=dtype))
            own = torch.randn(m, 2, generator=chance, dtype=dtype) @ torch.randn(
                2, n, generator=chance, dtype=dtype
            )
            D = math.sqrt(case.shared) * inside / inside.norm()
            D = D + math.sqrt(1 - case.shared) * own / own.norm()
            if k in bad:
                wrong = -D if case.spoil is None else case.spoil(D, lie, chance)
                D = wrong * (case.length * D.norm() / wrong.norm())
            left, sigma, right = torch.linalg.svd(D, full_matrices=False)
            updates.append(sm.LowRank(left[:, :4] * sigma[:4], right[:4]))
        name = f"layer{number}"
        layers.append(sm.Layer(name, updates))
        planes[name] = U
    return layers, planes, bad


def flagged(layers: Sequence[sm.Layer], form: str) -> tuple[set[int], dict[str, Tensor]]:
    """Whom `FlagContaminated` leaves out, and its subspaces."""
    method = sm.FlagContaminated(sm.mean(), tests=("shared",), form=form)  # type: ignore[arg-type]
    done = sm.prepare(method, list(layers))
    return {k for k, factor in enumerate(done.factors or ()) if factor == 0}, dict(done.bases)


def lowest_agreement(gram: Tensor, count: int) -> set[int]:
    """Told how many are bad."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    cosines = gram / norms / norms[:, None]
    return set((cosines.sum(1) - 1).argsort()[:count].tolist())


def krum(gram: Tensor, count: int) -> set[int]:
    """Those of the highest scores, told how many are bad."""
    squares = gram.diagonal()
    distances = (squares + squares[:, None] - 2 * gram).fill_diagonal_(math.inf)
    near = max(1, len(gram) - count - 2)
    return set(distances.sort(1).values[:, :near].sum(1).argsort(descending=True)[:count].tolist())


def error(planes: dict[str, Tensor], bases: dict[str, Tensor]) -> float:
    """||P - P'||_F / 2, the mean over layers: 0 the same planes, 1 orthogonal ones."""
    gaps = [float((U @ U.T - bases[name] @ bases[name].T).norm()) / 2 for name, U in planes.items()]
    return statistics.mean(gaps)


def plain(layers: Sequence[sm.Layer]) -> dict[str, Tensor]:
    """The two largest directions of all updates side by side."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        stacked = torch.cat([update.dense() for update in layer], 1)
        found[layer.name] = torch.linalg.svd(stacked, full_matrices=False)[0][:, :2]
    return found


def row(case: Case, seeds: Sequence[int]) -> list[object]:
    hits: dict[str, int] = dict.fromkeys(("convex", "out", "agreement", "krum", "alarms"), 0)
    errors: dict[str, list[float]] = {"convex": [], "out": [], "plain": []}
    for seed in seeds:
        layers, planes, bad = planted(case, seed)
        found, bases = flagged(layers, "leave-one-out")
        hits["out"] += found == bad
        hits["alarms"] += bool(found - bad)
        errors["out"].append(error(planes, bases))
        errors["plain"].append(error(planes, plain(layers)))
        gram = whole_gram(layers)[0]
        hits["agreement"] += lowest_agreement(gram, len(bad)) == bad
        hits["krum"] += krum(gram, len(bad)) == bad
        if case.convex:
            found, bases = flagged(layers, "convex")
            hits["convex"] += found == bad
            hits["alarms"] += bool(found - bad)
            errors["convex"].append(error(planes, bases))
    told = "-" if not case.bad else hits["agreement"], "-" if not case.bad else hits["krum"]
    far = ["-" if not values else f"{statistics.mean(values):.2g}" for values in errors.values()]
    convex = hits["convex"] if case.convex else "-"
    return [case.name, convex, hits["out"], *told, hits["alarms"], *far]


READING = """\
Of {seeds} seeds, in how many exactly the bad clients were flagged ({clients} clients, 4 of them
bad, 3 layers of 24 x 20, where the row says nothing else). The lowest agreement and Krum are told
how many are bad, and so always accuse somebody; CLAIR is told nothing but the rank of the plane, 2.
"Alarms": in how many seeds one of CLAIR's forms flagged a good client. Error of the plane: 0 is
the true one, 1 an orthogonal one, above 1 one of too many directions; of the convex form, of the
leave-one-out form, and of the plain SVD of all updates."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0-9", help="first-last, or one")
    first, _, last = parser.parse_args().seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[list[object]] = []
    for case in CASES:
        rows.append(row(case, seeds))
        print(rows[-1], flush=True)
    header = ["case", "convex", "leave one out", "lowest agreement", "Krum", "alarms"]
    header += ["error: convex", "leave one out", "plain SVD"]
    tables.write(
        "planted",
        "Planted bad clients",
        tables.provenance(),
        READING.format(seeds=len(seeds), clients=12),
        tables.table(header, rows),
    )


if __name__ == "__main__":
    main()
