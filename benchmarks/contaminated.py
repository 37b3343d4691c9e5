"""Who is flagged, and what that is worth: bad clients among good ones, with and without
`FlagContaminated`.

    python benchmarks/contaminated.py --data BUNDLE                       # families for choosing
    python benchmarks/contaminated.py --data BUNDLE --families digits --seeds 0-1

Clients are those of `families.py` (bed/clients.py): none bad, one with shuffled labels, one
flipped, one ten times too long, and four with wrong labels beside eight good ones, all with one
wrong assignment of names (alike) or each shuffled by itself (apart). `planted.py` has synthetic
ones. The tables go to
benchmarks/results/contaminated.md: accuracy on the domain left out, and how many good and bad
clients were flagged.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import tables
import torch
from bed import families as names
from bed.clients import SETTINGS
from bed.training import REGIMES
from bed.trial import Server
from families import INITS, Trial, World

import sapmerge as sm

SOME = ("equal", "label noise", "flipped", "scaled", "4 alike", "4 apart")
METHODS = {
    "mean": sm.mean,
    "FlagContaminated(mean)": lambda: sm.FlagContaminated(sm.mean()),
    "sap": sm.sap,
    "FlagContaminated(sap)": lambda: sm.FlagContaminated(sm.sap()),
}
READING = """\
Accuracy in %, the mean over {trials} trials per setting (one domain left out, one seed), and the
standard error of the mean where there are two or more. Every method is as it is called, nothing
is tuned; the tests of FlagContaminated are its default ones. A trial decides nothing: look at
differences of many standard errors."""
FLAGS = """\
Of the clients of each setting, over all trials: how many good ones were flagged and how many bad
ones."""


def measure(world: World, trial: Trial) -> tuple[dict[str, float], list[tuple[bool, bool]]]:
    """Method -> accuracy; and of every client whether it is bad, and whether it is flagged."""
    server, _ = world.server(trial)
    found = {"zero-shot": _percent(server.right({}))}
    marks: list[tuple[bool, bool]] = []
    for name, method in METHODS.items():
        anchored = name != "mean"
        merged = sm.merge(
            server.opened,
            server._loader(32) if anchored else None,
            server.half if anchored else None,
            method=method(),
            loss=Server.losses[0] if anchored else None,
            cache=server.cache if anchored else None,
            progress=False,
        )
        updates = dict(merged.updates())
        found[name] = _percent(server.right(updates))
        if name == "FlagContaminated(mean)":
            flagged = merged.report.notes.get("contaminated", {})
            marks = [(label in server.bad, label in flagged) for label in server.adapters]
    return found, marks


def _percent(right: torch.Tensor) -> float:
    return 100 * float(right.double().mean())


def main() -> None:
    given = _arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    world = World(given.data, given.cache, None)
    accuracy: dict[str, dict[str, list[float]]] = {s: defaultdict(list) for s in given.settings}
    flags: dict[str, list[tuple[bool, bool]]] = {s: [] for s in given.settings}
    for seed in given.seeds:
        for family in given.families:
            domains = list(world.task(family).domains)
            for setting in given.settings:
                target = domains[(seed + SETTINGS.index(setting)) % len(domains)]
                regime = given.regime
                trial = Trial(family, target, seed, regime, INITS[seed % 2], setting)
                found, marks = measure(world, trial)
                for name, value in found.items():
                    accuracy[setting][name].append(value)
                flags[setting] += marks
                print(trial, {name: round(value, 1) for name, value in found.items()}, flush=True)
            write(accuracy, flags)


def write(
    accuracy: Mapping[str, Mapping[str, list[float]]],
    flags: Mapping[str, list[tuple[bool, bool]]],
) -> None:
    """The tables of what has been run so far: after every family, so that an end costs nothing."""
    columns = ["zero-shot", *METHODS]
    rows = [[s, *(_shown(accuracy[s][name]) for name in columns)] for s in accuracy]
    counted = [
        [
            setting,
            f"{sum(f for b, f in marks if not b)} of {sum(not b for b, _ in marks)}",
            f"{sum(f for b, f in marks if b)} of {sum(b for b, _ in marks)}",
        ]
        for setting, marks in flags.items()
    ]
    trials = len(next(iter(accuracy.values()))["mean"])
    tables.write(
        "contaminated",
        "Clients that do not belong",
        tables.provenance(),
        "## Accuracy on the domain left out",
        READING.format(trials=trials),
        tables.table(["setting", *columns], rows),
        "## Who was flagged",
        FLAGS,
        tables.table(["setting", "good flagged", "bad flagged"], counted),
    )


def _shown(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def seeds(text: str) -> list[int]:
        first, _, last = text.partition("-")
        return list(range(int(first), int(last or first) + 1))

    cache = Path(__file__).parent / "cache" / "families"
    parser.add_argument("--data", type=Path, required=True, help="the bundle")
    parser.add_argument("--cache", type=Path, default=cache)
    parser.add_argument("--families", nargs="+", default=None, help=", ".join(names.FAMILIES))
    parser.add_argument("--settings", nargs="+", default=list(SOME), choices=SETTINGS)
    parser.add_argument("--regime", default="M", choices=REGIMES)
    parser.add_argument("--seeds", type=seeds, default=seeds("0-5"), help="first-last, or one")
    given = parser.parse_args()
    given.families = given.families or [n for n in names.choosing() if n != names.LANGUAGE]
    return given


if __name__ == "__main__":
    main()
