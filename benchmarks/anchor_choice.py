"""Does it matter which anchors there are? A coreset, k-means and chance, at several counts.

    python benchmarks/anchor_choice.py --data BUNDLE --seeds 0,1

BUNDLE, adapters and trials are those of `families.py`, whose cache is used. The pool is a family's
public pairs. The same trial is merged with every choice, so that differences are paired; a run
that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tables
import torch
from bed.bootstrap import gain, paired, rights
from bed.training import REGIMES
from bed.trial import Server, pack
from dg.trial import AS_IS, MATCHED, Contender
from families import INITS, Trial, World
from torch import Tensor

import sapmerge as sm
from sapmerge.evaluation import over_seeds

COUNTS = (8, 16, 32, 64)
FAMILIES = ("pacs", "tones", "textures", "printed-digits")
SETTINGS = ("equal", "label noise")
POOL = 512
"""Pairs of a pool at most: the first ones."""

METHODS: Mapping[str, tuple[Callable[[], sm.Method], str]] = {
    "sap_original": (sm.sap_original, MATCHED),
    "sap": (sm.sap, AS_IS),
}


def unweighted(chosen: sm.anchors.Chosen) -> sm.anchors.Chosen:
    return sm.anchors.Chosen(chosen.indices, (1 / len(chosen.indices),) * len(chosen.indices))


CHOICES: Mapping[str, Callable[[Tensor, int, int], sm.anchors.Chosen]] = {
    "chance": lambda x, count, seed: sm.anchors.at_random(x, count, seed),
    "coreset": lambda x, count, seed: sm.anchors.coreset(x, count, seed=seed),
    "coreset, equal weights": lambda x, count, seed: unweighted(
        sm.anchors.coreset(x, count, seed=seed)
    ),
    "k-means": lambda x, count, seed: sm.anchors.kmeans(x, count, seed=seed),
}


@dataclass(eq=False)
class Choosing(Server):
    """A server that merges with given anchors."""

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    stability: float | None = None

    def merged(self, method: sm.Method) -> dict[str, sm.Update]:
        result = sm.merge(
            self.opened,
            self.batches,
            self.half,
            method=method,
            loss=sm.alignment,
            cache=self.cache,
            progress=False,
        )
        updates = dict(result.updates())
        found = [
            value
            for layer in result.report.layers
            for value in layer.notes.get("anchor_stability", {}).values()
        ]
        self.stability = sum(found) / len(found) if found else None
        return updates

    def rows(self, contender: Contender) -> Iterator[tuple[str, Tensor]]:
        updates, length = self.merged(contender.method), str(contender.lengths[0])
        norm = sum(update.norm() ** 2 for update in updates.values()) ** 0.5
        size = sum(self.norms.values()) / len(self.norms)
        yield length, self.right(updates, 1.0 if length == AS_IS or norm == 0 else size / norm)


def rows_of(world: World, trial: Trial, folder: Path) -> list[dict[str, object]]:
    """The rows of a trial: from its file, completed by what is missing there."""
    name = "_".join(str(value).replace(" ", "-") for value in asdict(trial).values())
    path = folder / f"{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    done = {row["method"] for row in rows}
    wanted = [
        (method, choice, count) for count in COUNTS for choice in CHOICES for method in METHODS
    ]
    missing = [each for each in wanted if label(*each) not in done]
    if missing:
        plain, _ = world.server(trial)
        task = plain.task
        pool = [
            {"pixel_values": image.float(), "text_embeds": text}
            for image, text in zip(
                task.anchor_images[:POOL].split(32), task.anchor_text[:POOL].split(32), strict=True
            )
        ]
        world.half.get_text_features = lambda **_: None  # never called: texts are embedded
        features = sm.anchors.features(pool, world.half)
        with path.open("a") as file:
            for method, choice, count in missing:
                chosen = CHOICES[choice](features, count, trial.seed)
                server = Choosing(
                    plain.half, task, plain.adapters, plain.bad, plain.test, trial.seed
                )
                server.batches = chosen.of(pool)
                make, length = METHODS[method]
                contender = Contender(method, make(), lengths=(length,))
                for _, right in server.rows(contender):
                    row = {"method": label(method, choice, count), "length": length}
                    row |= {"right": pack(right), "images": len(right)}
                    row["stability"] = server.stability
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    rows.append(row)
    return [asdict(trial) | row for row in rows]


def label(method: str, choice: str, count: int) -> str:
    return f"{method}, {count}, {choice}"


def summary(rows: Sequence[Mapping[str, object]], setting: str) -> list[str]:
    """The tables of one setting."""
    some = [row for row in rows if row["setting"] == setting]
    stable: dict[str, list[float]] = defaultdict(list)
    for row in some:
        if row["stability"] is not None:
            stable[str(row["method"])].append(float(str(row["stability"])))
    blocks = []
    for method, (_, length) in METHODS.items():
        lines = []
        for count in COUNTS:
            chance = rights(some, label(method, "chance", count), length)
            accuracy = 100 * sum(float(r.mean()) for r in chance.values()) / max(1, len(chance))
            for choice in CHOICES:
                name = label(method, choice, count)
                gap = "-"
                if choice != "chance" and chance:
                    gap = str(gain(paired(rights(some, name, length), chance)))
                found = over_seeds(stable[name]) if len(stable[name]) > 1 else "-"
                level = f"{accuracy:.1f}" if choice == "chance" else ""
                lines.append((count, choice, level, gap, found))
        header = ("anchors", "choice", "accuracy", "difference to chance", "mask stability")
        blocks += [f"## {method}, {setting}", tables.table(header, lines)]
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the bundle")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache" / "families")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trial after")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    world, start, rows = World(given.data, given.cache, None), time.monotonic(), []
    trials = list[Trial]()
    for seed in map(int, given.seeds.split(",")):
        regime, init = list(REGIMES)[seed % 3], INITS[seed // 3 % 2]
        for family in FAMILIES:
            domains = list(world.task(family).domains)
            for number, setting in enumerate(SETTINGS):
                target = domains[(seed + number) % len(domains)]
                trials.append(Trial(family, target, seed, regime, init, setting))
    done = 0
    for number, trial in enumerate(trials):
        if time.monotonic() - start > 60 * given.minutes:
            break
        rows += rows_of(world, trial, given.cache / "anchor_choice")
        done = number + 1
        spent = time.monotonic() - start
        print(f"{done} of {len(trials)}, {spent:.0f} s: {trial}", file=sys.stderr, flush=True)
    reading = (
        f"{done} trials of {len(trials)}, over the families {', '.join(FAMILIES)}; one domain "
        "left out in each, and another one per seed. Accuracy in per cent; differences to the "
        "anchors drawn by chance in the same trial, in points, with 95 % intervals (hierarchical "
        "bootstrap: families, seeds, images). Mask stability: the overlap of the masks from two "
        "halves of the anchors, the mean over layers and adapters, with Student's interval over "
        "trials."
    )
    blocks = [block for setting in SETTINGS for block in summary(rows, setting)]
    title = "Anchors by choice and by chance"
    tables.write("anchor_choice", title, tables.provenance(), reading, *blocks)


if __name__ == "__main__":
    main()
