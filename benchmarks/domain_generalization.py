"""Does a merge do well on a domain nobody trained on? Leave each domain out in turn;
every method, several seeds.

    python benchmarks/domain_generalization.py --data BUNDLE --quick
    python benchmarks/domain_generalization.py --data BUNDLE --seeds 10-14
    python benchmarks/domain_generalization.py --data PACS --anchors COCO \\
        --model openai/clip-vit-base-patch32

The first takes three to four minutes, the second hours on two CPU cores.

BUNDLE is a folder with vit-tiny/, text_features.safetensors, coco_anchors/, folders
NAME/domain/class/image whose classes have texts there (pacs/), and digits*.npz; the domains are
those that lie in it. PACS is any folder domain/class/image, and COCO one of images with
captions.json: [{"file": ..., "captions": [...]}, ...]. Adapters are trained once and kept in the
cache as PEFT checkpoints; accuracies too, so that a run that was interrupted, or that gets more
methods, goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import tables
import torch
from dg import contenders, data, encoders, summary
from dg.clients import SETTINGS, Clients
from dg.contenders import Contender
from dg.trial import AS_IS, Place, Server

import sapmerge as sm

T = TypeVar("T")

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """What every trial shares."""

    data: Path
    model: str | None
    anchors: Path
    cache: Path
    device: str
    threads: int
    suites: tuple[str, ...]
    own: Path | None
    test: int
    init: str


@dataclass(frozen=True)
class Trial:
    """One domain left out."""

    task: str
    regime: str
    seed: int
    setting: str
    target: str

    def __str__(self) -> str:
        return "/".join((self.task, self.regime, str(self.seed), self.setting, self.target))


Row = dict[str, object]


@functools.cache
def world(options: Options) -> tuple[encoders.Encoder, dict[str, data.Task], Place]:
    """The encoder, the tasks, and a copy of the model to try updates in; read once per process."""
    if options.model is None:
        encoder = encoders.tiny(options.data / "vit-tiny", options.device)
        tasks = data.bundled(options.data)
    else:
        clip = encoders.Clip(options.model, options.device)
        encoder = clip.encoder
        tasks = {options.data.name: data.folder(options.data, options.anchors, clip)}
    return encoder, tasks, Place(encoder.model)


def clients_of(trial: Trial, options: Options) -> Clients:
    encoder, tasks, _ = world(options)
    other = next((task for name, task in tasks.items() if name != trial.task), None)
    return Clients(
        encoder, tasks[trial.task], other, trial.regime, trial.seed, options.cache, options.init
    )


def fit(trials: list[Trial], options: Options) -> None:
    """Train what some trials need. Trials that share adapters go to one process:
    each is trained once.
    """
    _quiet(options.threads)
    for trial in trials:
        clients = clients_of(trial, options)
        _references(trial, options, clients, clients.received(trial.target, trial.setting))


def run(trial: Trial, options: Options, done: frozenset[tuple[object, ...]]) -> Iterator[Row]:
    """The accuracies of one trial that are not known yet."""
    encoder, tasks, place = world(options)
    task, clients = tasks[trial.task], clients_of(trial, options)
    _, test = task.split(trial.target, trial.seed, 0, options.test)
    received = clients.received(trial.target, trial.setting)
    server = Server(encoder, task, received, test, trial.seed, place, options.cache / "anchors")

    def row(method: str, length: str, accuracy: float, made: str = "") -> Row:
        return {
            **vars(trial),
            "method": method,
            "recipe": made,
            "length": length,
            "accuracy": accuracy,
        }

    for name, path in _references(trial, options, clients, received).items():
        if (name, "", AS_IS) not in done:
            alone = Server(
                encoder, task, {"alone": path} if path else received, test, trial.seed, place
            )
            plain = Contender(name, sm.mean(), lengths=(AS_IS,))
            yield row(
                name, AS_IS, next(alone.rows(plain))[1] if path else alone.accuracy(encoder.model)
            )
    for contender in chosen(options):
        if (
            not {(contender.name, contender.recipe, str(length)) for length in contender.lengths}
            <= done
        ):
            for length, accuracy in server.rows(contender):
                yield row(contender.name, length, accuracy, contender.recipe)


def _references(
    trial: Trial, options: Options, clients: Clients, received: dict[str, Path]
) -> dict[str, Path | None]:
    """What is no merge: name -> its adapter, None for the model without any."""
    if trial.setting != "equal":
        return {}
    found: dict[str, Path | None] = {}
    if "references" in options.suites:
        found["zero-shot"] = None
        found |= {f"single adapter {k + 1}": path for k, path in enumerate(received.values())}
        found["adapter of the domain itself"] = clients.own(trial.target)
    if "upper" in options.suites:
        found["all sources trained together"] = clients.together(trial.target)
    return found


def chosen(options: Options) -> list[Contender]:
    """The contenders of the suites, and the user's own."""
    found = {
        c.name: c
        for suite in options.suites
        if suite not in ("references", "upper")
        for c in getattr(contenders, suite)()
    }
    if options.own is not None:
        spec = importlib.util.spec_from_file_location("own_contenders", options.own)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= {c.name: c for c in module.contenders()}
    return list(found.values())


def rows_of(trial: Trial, options: Options) -> list[Row]:
    """The rows of a trial that are asked for: from its file, completed by a run."""
    _quiet(options.threads)
    folder = world(options)[0].name + ("" if options.init == "shared" else f"-{options.init}")
    path = options.cache / "rows" / folder / f"{str(trial).replace('/', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = {_key(row): row for row in rows if row["test"] == options.test}
    with path.open("a") as file:
        for row in run(trial, options, frozenset(found)):
            file.write(json.dumps(row | {"test": options.test}) + "\n")
            file.flush()
            found[_key(row)] = row
    recipes = {contender.name: contender.recipe for contender in chosen(options)}
    return [row for row in found.values() if row["recipe"] in ("", recipes.get(str(row["method"])))]


def _key(row: Row) -> tuple[object, ...]:
    return row["method"], row["recipe"], row["length"]


def _quiet(threads: int) -> None:
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def main() -> None:
    options, trials, name, results, jobs = _arguments()
    together: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        together.setdefault((trial.task, trial.regime, trial.seed), []).append(trial)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        _each("trained", [pool.submit(fit, group, options) for group in together.values()])
        rows = _each("tried", [pool.submit(rows_of, trial, options) for trial in trials])
    summary.write(name, [row for found in rows for row in found], results)


def _each(what: str, futures: list[Future[T]]) -> list[T]:
    """The results in their order, with a line for every one that is there."""
    for number, future in enumerate(as_completed(futures)):
        future.result()
        print(f"{what} {number + 1} of {len(futures)}", file=sys.stderr, flush=True)
    return [future.result() for future in futures]


def _arguments() -> tuple[Options, list[Trial], str, Path, int]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="the bundle, or with --model a folder domain/class/image",
    )
    parser.add_argument("--model", help="a CLIP, by its name on a hub or a folder")
    parser.add_argument(
        "--anchors",
        type=Path,
        help="images with captions.json; by default coco_anchors beside the data",
    )
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument(
        "--name", default="domain_generalization", help="of the result, benchmarks/results/NAME.md"
    )
    parser.add_argument("--results", type=Path, default=tables.RESULTS, help="a folder for them")
    parser.add_argument("--tasks", help="by default all of the data")
    parser.add_argument("--targets", help="domains to leave out; by default each in turn")
    parser.add_argument(
        "--init", default="shared", choices=("shared", "own"), help="do clients start from one A?"
    )
    parser.add_argument("--regimes", default="A,B", help="see dg/training.py")
    parser.add_argument("--settings", default="equal", help=", ".join(SETTINGS))
    parser.add_argument(
        "--suites",
        default="references,upper,library,tuned,contrib,study",
        help="of dg/contenders.py",
    )
    parser.add_argument(
        "--own", type=Path, help="a file with contenders() -> list[Contender]: methods of your own"
    )
    parser.add_argument("--seeds", default="0-4", help="first-last, or a list")
    parser.add_argument(
        "--test", type=int, default=data.HELD, help="test images per class, at most 50"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument(
        "--quick", action="store_true", help="PACS, regime A, one seed, the main methods"
    )
    given = parser.parse_args()
    if given.quick:
        given.tasks, given.regimes, given.suites, given.seeds, given.test = (
            "pacs",
            "A",
            "references,main",
            "0",
            20,
        )
        given.name += "_quick"
    options = Options(
        data=given.data,
        model=given.model,
        anchors=given.anchors or given.data / "coco_anchors",
        cache=given.cache,
        device=given.device,
        threads=given.threads,
        suites=tuple(name for name in given.suites.split(",") if name),
        own=given.own,
        test=given.test,
        init=given.init,
    )
    _quiet(options.threads)
    tasks = world(options)[1]
    domains = {name for task in tasks.values() for name in task.domains}
    targets = set(given.targets.split(",")) if given.targets else domains
    if not targets <= domains:
        parser.error(f"--targets: {sorted(targets - domains)} are none of {sorted(domains)}")
    trials = [
        Trial(task, regime, seed, setting, target)
        for seed in _seeds(given.seeds)
        for setting in given.settings.split(",")
        for task in (given.tasks.split(",") if given.tasks else tasks)
        for regime in given.regimes.split(",")
        for target in tasks[task].domains
        if target in targets
    ]
    return options, trials, given.name, given.results, given.jobs


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return (
        list(range(int(first), int(last) + 1)) if last else [int(part) for part in text.split(",")]
    )


if __name__ == "__main__":
    main()
