"""Does a merge do well on a domain nobody trained on? Many families of domains,
in trials of a few seconds.

    python benchmarks/families.py --data BUNDLE --half choosing --seeds 0-5
    python benchmarks/families.py --data BUNDLE --half confirming --seeds 0-5

The confirming half is run once, after the choice.

BUNDLE is that of `domain_generalization.py`. Adapters are LoRAs on the upper half of the ViT-Ti,
whose lower half runs once per image (bed/half.py). Every seed has one regime and one kind of
initialisation, unless they are given: six seeds have each pair of them once.
Adapters and results are kept in the cache, so a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import tables
import torch
from bed import contenders, families, summary
from bed.clients import CAMPS, ODD, SETTINGS, Clients, split
from bed.half import Half, load_vit, lower_half
from bed.language import Language
from bed.training import REGIMES
from bed.trial import Server, pack
from dg.data import Domain, Task
from dg.trial import AS_IS, Contender
from safetensors.torch import load_file, save_file

import sapmerge as sm

INITS = ("own", "shared")
OTHER = {True: "digits", False: "pacs"}
"""Has it ten classes? -> the family that the client with another task solves."""


@dataclass(frozen=True)
class Trial:
    """One domain left out."""

    family: str
    target: str
    seed: int
    regime: str
    init: str
    setting: str


@dataclass(frozen=True)
class World:
    """The model and the families' tokens, read once."""

    data: Path
    cache: Path
    model: Path | None

    @functools.cached_property
    def language(self) -> Language:
        assert self.model is not None
        return Language(self.model, self.cache)

    @functools.cached_property
    def vit(self) -> torch.nn.Module:
        return load_vit(self.data / "vit-tiny")

    @functools.cached_property
    def half(self) -> Half:
        return Half(self.vit)

    @functools.lru_cache(8)  # noqa: B019 - there is one world
    def task(self, name: str) -> Task:
        """A family with tokens in the place of images."""
        if name == families.LANGUAGE:
            return self.language.task
        path = self.cache / "tokens" / f"{name}.safetensors"
        if not path.exists():
            made = families.FAMILIES[name](self.data)
            tensors = {"text": made.text, "anchors": lower_half(self.vit, made.anchor_images)}
            tensors["anchor_text"] = made.anchor_text
            for domain, content in made.domains.items():
                tensors[f"images {domain}"] = lower_half(self.vit, content.images)
                tensors[f"labels {domain}"] = content.labels
            path.parent.mkdir(parents=True, exist_ok=True)
            # labels may be shared
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
        kept = load_file(path)
        names = [key.removeprefix("images ") for key in kept if key.startswith("images ")]
        domains = {
            key: Domain(kept[f"images {key}"], kept[f"labels {key}"]) for key in sorted(names)
        }
        return Task(name, domains, kept["text"], kept["anchors"], kept["anchor_text"])

    def server(self, trial: Trial) -> tuple[Server, Path]:
        """The server of a trial, and the adapter of its target."""
        if trial.family == families.LANGUAGE:
            return self.language.server(trial.target, trial.regime, trial.init, trial.seed)
        task = self.task(trial.family)
        other = self.task(OTHER[len(task.text) != 10])
        clients = Clients(
            self.half, task, other, trial.regime, trial.init, trial.seed, self.cache / "adapters"
        )
        adapters, bad = clients.received(trial.target, trial.setting)
        _, test = split(task, trial.target, "", 0)
        server = Server(self.half, task, adapters, bad, test, trial.seed, self.cache / "anchors")
        return server, clients.own(trial.target)


def rows_of(
    world: World, trial: Trial, chosen: list[Contender], facts: bool, known: bool = False
) -> list[dict[str, object]]:
    """The rows of a trial: from its file, completed by what is missing there."""
    name = "_".join(str(value).replace(" ", "-") for value in asdict(trial).values())
    path = world.cache / "rows" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    # a run may have died within a line
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    wanted = {(c.name, c.recipe) for c in chosen}

    def asked(row: dict[str, object]) -> bool:
        return row["recipe"] == "" or (row["method"], row["recipe"]) in wanted

    if known:
        return [asdict(trial) | row for row in rows if asked(row)]
    done = {(row["method"], row["recipe"], row["length"]) for row in rows}
    missing = [
        c for c in chosen if not {(c.name, c.recipe, str(length)) for length in c.lengths} <= done
    ]
    if missing or (facts and ("facts", "", "") not in done):
        with path.open("a") as file:
            for row in run(world, trial, missing, facts and ("facts", "", "") not in done):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
    return [asdict(trial) | row for row in rows if asked(row)]


def run(
    world: World, trial: Trial, missing: list[Contender], facts: bool
) -> Iterator[dict[str, object]]:
    server, own = world.server(trial)
    plain = {"recipe": "", "images": len(server.right({}))}
    if facts:
        gram = server.products.tolist()
        labels = {"labels": list(server.adapters), "bad": sorted(server.bad)}
        yield plain | {
            "method": "facts",
            "length": "",
            **labels,
            "gram": gram,
            "losses": server.anchor_losses(),
        }
        yield plain | {"method": "zero-shot", "length": AS_IS, "right": pack(server.right({}))}
        alone = replace(server, adapters={"own": own})
        for length, right in alone.rows(Contender("own", sm.mean(), lengths=(AS_IS,))):
            yield plain | {
                "method": "adapter of the domain itself",
                "length": length,
                "right": pack(right),
            }
    for contender in missing:
        for length, right in server.rows(contender):
            yield plain | {
                "method": contender.name,
                "recipe": contender.recipe,
                "length": length,
                "right": pack(right),
            }


def trials_of(world: World, given: argparse.Namespace) -> Iterator[Trial]:
    """In the order of seeds, so that an interrupted run has whole seeds. An unequal setting is
    tried with one target per family and seed, the next one each time."""
    for seed in given.seeds:
        regimes = given.regimes or [list(REGIMES)[seed % 3]]
        inits = given.init or [INITS[seed // 3 % 2]]
        for family in given.families:
            domains = list(world.task(family).domains)
            targets = (
                [name for name in domains if name in given.targets] if given.targets else domains
            )
            for regime in regimes:
                for init in inits:
                    for setting in given.settings:
                        some = targets
                        if setting != "equal" and not given.targets:
                            some = [targets[(seed + SETTINGS.index(setting)) % len(targets)]]
                        for target in some:
                            yield Trial(family, target, seed, regime, init, setting)


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    world = World(given.data, given.cache, given.language)
    chosen = {c.name: c for suite in given.suites for c in getattr(contenders, suite)()}
    if given.own is not None:
        spec = importlib.util.spec_from_file_location("own_contenders", given.own)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        chosen |= {c.name: c for c in module.contenders()}
    trials = list(trials_of(world, given))
    start, rows = time.monotonic(), list[dict[str, object]]()
    for number, trial in enumerate(trials):
        rows += rows_of(world, trial, list(chosen.values()), given.facts, given.known)
        spent = time.monotonic() - start
        print(f"{number + 1} of {len(trials)}, {spent:.0f} s: {trial}", file=sys.stderr, flush=True)
    if given.name is not None:
        summary.write(given.name, rows, given.results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def seeds(text: str) -> list[int]:
        first, _, last = text.partition("-")
        return (
            list(range(int(first), int(last) + 1))
            if last
            else [int(part) for part in text.split(",")]
        )

    halves = {"choosing": families.choosing, "confirming": families.confirming}
    parser.add_argument("--data", type=Path, required=True, help="the bundle")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache" / "families")
    parser.add_argument(
        "--language",
        type=Path,
        help="SmolLM2-135M-Instruct as a transformers folder, for that family",
    )
    parser.add_argument("--half", choices=halves, default="choosing", help="of the families")
    parser.add_argument(
        "--families",
        type=listed,
        help=", ".join(families.FAMILIES) + "; by default those of the half",
    )
    parser.add_argument(
        "--targets", type=listed, default=[], help="domains to leave out; by default each in turn"
    )
    parser.add_argument("--regimes", type=listed, default=[], help=", ".join(REGIMES))
    parser.add_argument("--init", type=listed, default=[], help=", ".join(INITS))
    parser.add_argument(
        "--settings", type=listed, default=["equal"], help=", ".join(SETTINGS) + "; odd, camps"
    )
    parser.add_argument(
        "--suites",
        type=listed,
        default=["parts", "peers"],
        help="of bed/contenders.py; may be empty",
    )
    parser.add_argument(
        "--own", type=Path, help="a file with contenders() -> list[Contender]: methods of your own"
    )
    parser.add_argument("--seeds", type=seeds, default=seeds("0-5"), help="first-last, or a list")
    parser.add_argument("--name", help="of the result, RESULTS/NAME.md; none without it")
    parser.add_argument("--results", type=Path, default=tables.RESULTS, help="a folder for them")
    parser.add_argument(
        "--known", action="store_true", help="only tables of the trials that are in the cache"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--no-facts",
        dest="facts",
        action="store_false",
        help="no Gram matrices, losses, references",
    )
    given = parser.parse_args()
    given.families = given.families or [
        name
        for name in halves[given.half]()
        if name != families.LANGUAGE or given.language is not None
    ]
    groups = {"odd": ODD, "camps": CAMPS}
    given.settings = [one for name in given.settings for one in groups.get(name, (name,))]
    return given


if __name__ == "__main__":
    main()
