"""The round of the example in a real federation, seed by seed: a SuperLink with TLS and eight
SuperNodes with keys, one client each.

    python examples/flower/federation.py FOLDER                 # seeds 0 to 4, then the table
    python examples/flower/federation.py FOLDER --seeds 0       # one round

A seed has a base model, a split of the digits and a domain that no client has of its own. What is
done is kept in FOLDER, and a second call goes on there. The table is FOLDER/federation.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from one_shot import task
from superlink import Federation, certificates, federation, wait_for

from sapmerge.demo.domains import DOMAINS
from sapmerge.evaluation import Interval, over_seeds

HERE = Path(__file__).parent
CLIENTS, LIMIT = 8, 1800.0


def main(folder: Path, seeds: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    due = [seed for seed in seeds if not (folder / f"seed{seed}" / "accuracy.json").exists()]
    for seed in due:
        place = folder / f"seed{seed}"
        place.mkdir(exist_ok=True)
        if not (place / "base").exists():
            task.make_base(place, seed)
    if due:
        certificates(folder)
        with federation(folder / "link", folder, CLIENTS) as run:
            for seed in due:
                one_round(run, folder / f"seed{seed}", seed)
    found = [json.loads((folder / f"seed{s}" / "accuracy.json").read_text()) for s in seeds]
    text = page(seeds, found)
    task.write(folder / "federation.md", text)
    print(text)


def one_round(run: Federation, folder: Path, seed: int) -> None:
    """Start it, and wait for its result."""
    began, names = time.monotonic(), list(DOMAINS)
    left_out = names[(names.index("outline") + seed) % len(names)]
    told = {"folder": folder, "left-out": left_out, "nodes": CLIENTS, "seed": seed}
    run.start(HERE, told)
    if not wait_for(folder / "accuracy.json", LIMIT):
        raise SystemExit(f"seed {seed}: no result after {LIMIT:.0f} s; look at {run.folder}/*.log")
    print(f"seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


def page(seeds: Sequence[int], found: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table."""
    accuracy = {
        name: [100 * sum(one["right"][name]) / len(one["right"][name]) for one in found]
        for name in found[0]["right"]
    }
    rows = [
        "| | " + " | ".join(f"seed {s}, {one['left out']}" for s, one in zip(seeds, found)),
        "|---|" + "---|" * (len(seeds) + 2),
    ]
    rows[0] += " | all | `sap` minus this |"
    for name, each in accuracy.items():
        gaps = [mine - other for mine, other in zip(accuracy["sap"], each)]
        last = "" if name == "sap" else points(over_seeds(gaps))
        numbers = " | ".join(f"{value:.1f}" for value in each)
        rows.append(f"| {name} | {numbers} | {points(over_seeds(each))} | {last} |")
    kept = [f"{len(one['clients'])} of {CLIENTS}" for one in found]
    refused = {name for one in found for name, _ in one["refused"] if not name.startswith("node-")}
    return "\n".join(
        [*rows, "", f"Kept: {', '.join(kept)}; refused: {', '.join(sorted(refused))}.", ""]
    )


def points(value: Interval) -> str:
    return f"{value.value:.1f} [{value.low:.1f}, {value.high:.1f}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the federation ends, too
    main(given.folder.resolve(), given.seeds)
