"""Everything that docs/trust.md counts, in one go: `python -m tests.long_run OUT --minutes 40`.

Kills, faults, interruptions, threads, fuzzing and all mutations of the reader, on one core. Every
step is a process of its own and one line of `OUT/log.jsonl`; started again with the same OUT, it
goes on where it was. Each part has its share of the time; one that is done leaves the rest to the
others. `OUT/summary.md` has the counts.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

import sapmerge as sm
from sapmerge.io import atomic
from sapmerge.io.cache import Cache
from tests.corpus import mutations
from tests.fuzz.drive import run as fuzz
from tests.fuzz.targets import TARGETS
from tests.io.test_writing import run_faults
from tests.trust import helpers as h
from tests.trust.test_whole_model import write_base

ROOT = Path(__file__).parents[1]
Counts = Mapping[str, int]
SECONDS = 1800  # of one step


class Step(NamedTuple):
    """One line of the log.

    Args:
        name: unique in its part.
        act: gives the counts, and raises at a finding.
    """

    name: str
    act: Callable[[Path], Counts]


# ----------------------------------------------------------------------------------------
# kills and faults


def kills(chunk: int = 50) -> Iterator[Step]:
    for system in ("native", "fallback"):
        yield Step(
            f"writer, every call, {system}", _script("tests.io.faults", "calls", "0", system)
        )
    yield Step("round, every call", _script("tests.federated.kills", "kills", "0"))
    yield Step("round, two processes", _script("tests.federated.kills", "race", "6"))
    for number in itertools.count():
        for system in ("native", "fallback"):
            script = _script("tests.io.faults", "random", str(chunk), system)
            yield Step(f"writer, random, {system}, {number}", script)
        race = _script("tests.io.faults", "race", "10", "native")
        yield Step(f"two writers and a reader, {number}", race)


def _script(module: str, task: str, *rest: str) -> Callable[[Path], Counts]:
    def act(place: Path) -> Counts:
        command = [sys.executable, "-m", module, task, str(place), *rest]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return act


def faults() -> Iterator[Step]:
    codes = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EFBIG)
    for native, existing, code in itertools.product((True, False), (False, True), codes):
        for sticky in (False, True):
            name = (
                f"{errno.errorcode[code]}{' from there on' if sticky else ''}, "
                f"{'overwrite' if existing else 'fresh'}, {'native' if native else 'fallback'}"
            )

            def act(
                place: Path,
                code: int = code,
                existing: bool = existing,
                sticky: bool = sticky,
                native: bool = native,
            ) -> Counts:
                if not native:
                    atomic._renameat2 = None
                return {"faults": run_faults(place, code, existing=existing, sticky=sticky)}

            yield Step(name, act)


# ----------------------------------------------------------------------------------------
# interruptions

_IO = tuple(
    f"sapmerge/io/{path.relative_to(ROOT / 'sapmerge' / 'io')}"
    for path in sorted((ROOT / "sapmerge" / "io").rglob("*.py"))
)
_SINKS = tuple(f"sapmerge/merging/{name}.py" for name in ("sinks", "merge", "live", "whole"))
_HOOKS = tuple(
    f"sapmerge/anchors/{name}.py"
    for name in ("hooks", "freezing", "prefix", "towers", "parameters", "calls", "runner")
)


class Scene:
    """Something to interrupt, and what must be true afterwards."""

    def __init__(self, place: Path, name: str) -> None:
        self.place, self.name = place, name
        self.inputs = [h.write_adapter(place / label, seed) for seed, label in enumerate("ab")]
        self.names = {"a", "b"}
        self.model: nn.Module = h.Small().train()
        if name == "add":
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
            self.model = peft.get_peft_model(self.model, config)
        if name == "whole":
            write_base(place / "base")
            self.names.add("base")
        self.out = place / "out"
        self.before = h.state(self.model)

    def act(self) -> None:
        if self.name in ("anchors", "cache"):
            cache = self.place / "cache" if self.name == "cache" else None
            loss = sm.anchors.outputs_only(h.loss)
            merged = sm.merge(
                self.inputs,
                h.batches(),
                self.model,
                loss=loss,
                method=sm.sap_original(),
                cache=cache,
            )
            merged.save_pretrained(self.out)
            return
        merged = sm.merge(self.inputs, method=sm.mean())
        if self.name == "apply":
            merged.apply_to(self.model)
        elif self.name == "add":
            merged.add_to(self.model, "merged")
        elif self.name == "whole":
            merged.save_merged(self.place / "base", self.out)
        else:
            merged.save_pretrained(self.out, overwrite=True)

    def again(self) -> None:
        """Everything as it was before the first time."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.place / "cache", ignore_errors=True)
        if self.name == "overwrite":
            sm.merge(self.inputs, method=sm.ties(0.5)).save_pretrained(self.out)

    def check(self) -> None:
        assert h.same(self.before, h.state(self.model)), f"{self.name}: the model is another one"
        assert "merged" not in getattr(self.model, "peft_config", {})
        found = {path.name for path in self.place.iterdir()} - {"cache"}
        wanted = self.names | ({"out"} if self.name == "overwrite" else set())
        assert found == wanted, f"{sorted(found ^ wanted)} is there or is missing"
        if self.out.exists():
            assert sm.verify(self.out) == []
        told = torch.get_num_threads(), torch.get_default_dtype()
        assert told == (1, torch.float32), f"torch is left with {told}"
        assert torch.is_grad_enabled(), "the grad mode stayed off"


SCENES = {
    "save": (*_SINKS, *_IO),
    "overwrite": _IO,
    "apply": (*_SINKS, *_IO),
    "add": (*_SINKS, *_IO),
    "whole": (*_SINKS, *_IO),
    "anchors": (*_HOOKS, *_SINKS),
    "cache": (*_HOOKS, "sapmerge/anchors/cache.py", "sapmerge/io/cache.py"),
}


Points = list[tuple[str, tuple[Any, ...], int]]
"""(scene, place, which time)"""


def interruptions(chunk: int = 40) -> Iterator[Step]:
    """At every line, when it is reached for the first and for the last time, in random order."""
    points = [point for point in _points(h.places) if str(point[1][0]).endswith(SCENES[point[0]])]
    for number, start in enumerate(range(0, len(points), chunk)):
        some = points[start : start + chunk]
        yield Step(f"points {number} of {-(-len(points) // chunk)}", _interrupting(some, _at_line))


def moments(chunk: int = 40) -> Iterator[Step]:
    """Real ones wherever Python looks for them, the first and the last time; random order. Also
    inside of context managers, and where they are delayed.
    """
    points = _points(h.moments)
    for number, start in enumerate(range(0, len(points), chunk)):
        some = points[start : start + chunk]
        yield Step(
            f"moments {number} of {-(-len(points) // chunk)}", _interrupting(some, _at_moment)
        )


def _points(look: Callable[[Callable[[], object], tuple[str, ...]], Counter[Any]]) -> Points:
    points: Points = []
    for name in SCENES:
        with tempfile.TemporaryDirectory() as place:
            found = forked(lambda name=name, place=place: _seen(Path(place), name, look))
        for where, count in found["places"]:
            points += [(name, tuple(where), nth) for nth in sorted({1, count})]
    random.Random(0).shuffle(points)
    return points


def _seen(
    place: Path, name: str, look: Callable[[Callable[[], object], tuple[str, ...]], Counter[Any]]
) -> dict[str, Any]:
    scene = Scene(place, name)
    scene.again()
    return {"places": list(look(scene.act, SCENES[name]).items())}


def _at_line(scene: Scene, where: tuple[Any, ...], nth: int) -> bool:
    reached = h.interrupted_at(scene.act, SCENES[scene.name], where, nth)
    if reached:
        scene.check()
    return reached


def _at_moment(scene: Scene, where: tuple[Any, ...], nth: int) -> bool:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        h.pressed(scene.act, SCENES[scene.name], where, nth)
    except KeyboardInterrupt:
        scene.check()  # while the exception is alive, and what it holds with it
        return True
    return False


def _interrupting(
    points: Points, interrupt: Callable[[Scene, tuple[Any, ...], int], bool]
) -> Callable[[Path], Counts]:
    def act(place: Path) -> Counts:
        seen, bad = Counter[str](), list[str]()
        for number, (name, where, nth) in enumerate(points):
            (place / str(number)).mkdir()
            scene = Scene(place / str(number), name)
            scene.again()
            try:
                seen[name if interrupt(scene, where, nth) else "not reached again"] += 1
            except AssertionError as error:
                file, *rest = where
                bad.append(f"{str(file).removeprefix(str(ROOT))}:{rest}, {nth}, {name}: {error}")
                torch.set_grad_enabled(True)
            shutil.rmtree(scene.place)
        assert not bad, "; ".join(bad)
        return seen

    return act


def signals(chunk: int = 20) -> Iterator[Step]:
    """Real ones at random moments, where Python itself looks for them."""
    for number in itertools.count():
        yield Step(f"signals {number}", lambda place, number=number: _signals(place, number, chunk))


def _signals(place: Path, seed: int, count: int) -> Counts:
    draw, seen, bad = random.Random(seed), Counter[str](), list[str]()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in range(count):
        name = draw.choice(list(SCENES))
        (place / str(number)).mkdir()
        scene = Scene(place / str(number), name)
        scene.again()
        started = time.monotonic()
        other = Scene(_made(place / f"{number}-usual"), name)
        other.again()
        other.act()
        usual = time.monotonic() - started
        scene.again()
        timer = threading.Timer(draw.uniform(0, usual), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            scene.act()
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            timer.join()
            after = h.state(other.model)
            if name in ("apply", "add") and h.same(after, h.state(scene.model)):
                seen[f"{name}, done"] += 1
            elif scene.out.exists() and name != "overwrite":
                assert _files(scene.out) == _files(other.out)
                seen[f"{name}, done"] += 1
            else:
                seen[name] += 1
                try:
                    scene.check()
                except AssertionError as error:
                    bad.append(f"{name}: {error}")
                    torch.set_grad_enabled(True)
            continue
        seen["came too late"] += 1
    assert not bad, "; ".join(bad)
    return seen


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# ----------------------------------------------------------------------------------------
# threads


def threads() -> Iterator[Step]:
    for number in itertools.count():
        yield Step(f"threads {number}", lambda place, number=number: _threads(place, number))


def _threads(place: Path, seed: int) -> Counts:
    """One model for three merges with anchors and one without, and one cache for all."""
    draw = random.Random(seed)
    inputs = [h.write_adapter(place / label, number) for number, label in enumerate("abc")]
    sets = [inputs[:2], inputs[1:], inputs, inputs[::2]]
    failed: list[BaseException] = []

    def merged(some: list[Path], model: nn.Module, out: Path, cache: Path) -> None:
        sm.merge(
            some, h.batches(), model, loss=h.loss, method=sm.sap_original(), cache=cache
        ).save_pretrained(out)

    def plain(some: list[Path], out: Path) -> None:
        sm.merge(some, method=sm.ties(0.4), rank="exact").save_pretrained(out)

    for k, some in enumerate(sets):
        merged(some, h.Small(), place / f"wanted{k}", place / "own")
        plain(some, place / f"wanted-plain{k}")
    model = h.Small().train()
    before, jobs = h.state(model), list[threading.Thread]()

    def guarded(action: Callable[..., None], *arguments: Any) -> None:
        try:
            time.sleep(draw.uniform(0, 0.05))
            action(*arguments)
        except BaseException as error:
            failed.append(error)

    for k, some in enumerate(sets):
        shared = (merged, some, model, place / f"out{k}", place / "shared")
        jobs.append(threading.Thread(target=guarded, args=shared))
        jobs.append(threading.Thread(target=guarded, args=(plain, some, place / f"out-plain{k}")))
    draw.shuffle(jobs)
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not failed, repr(failed)
    assert h.same(before, h.state(model)), "the model is another one"
    for k in range(len(sets)):
        for kind in ("", "-plain"):
            assert h.tensors_of(place / f"out{kind}{k}") == h.tensors_of(place / f"wanted{kind}{k}")
    assert torch.get_num_threads() == 1
    left = [path.name for path in (place / "shared").rglob("*") if ".tmp" in path.name]
    assert not left, left
    assert Cache(place / "shared")
    return {"merges": len(jobs)}


# ----------------------------------------------------------------------------------------
# the reader


def fuzzing(seconds: float = 30) -> Iterator[Step]:
    for number in itertools.count():
        for target in TARGETS:

            def act(_: Path, target: str = target, number: int = number) -> Counts:
                return {target: fuzz(target, seconds, 1000 + number)}

            yield Step(f"{target}, seed {1000 + number}", act)


def mutants() -> Iterator[Step]:
    found = mutations.mutants()
    with tempfile.TemporaryDirectory() as place:
        built = mutations.prepare(Path(place))
        reach = mutations.Reach(built, tests=True)

        def act(_: Path, mutant: mutations.Mutant) -> Counts:
            kind, by = mutations.noticed(mutant, built, reach)
            if not kind:
                raise AssertionError(f"nobody notices: {mutant}")
            return {f"by the {kind}": 1, f"note: {by}": 0}

        for mutant in found:
            yield Step(f"{mutant}"[:150], lambda place, mutant=mutant: act(place, mutant))


# ----------------------------------------------------------------------------------------
# the run

PARTS: dict[str, tuple[Callable[[], Iterator[Step]], float]] = {
    "faults": (faults, 0.1),
    "kills": (kills, 0.15),
    "interruptions": (interruptions, 0.25),
    "moments": (moments, 0.1),
    "signals": (signals, 0.1),
    "threads": (threads, 0.05),
    "fuzz": (fuzzing, 0.1),
    "mutations": (mutants, 0.25),
}
"""What makes the steps, and the share of the time."""


def forked(action: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What an action returns in a process of its own; {"finding": ...} if it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            signal.alarm(SECONDS)
            found: Mapping[str, Any] = action()
        except BaseException as error:
            said = "".join(traceback.format_exception(error, limit=-4))
            found = {"finding": f"{error!r}"[:1000], "trace": said[-3000:]}
        with os.fdopen(writer, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"finding": f"ended with status {status}"}


def run(part: str, steps: Iterator[Step], budget: float, log: Path) -> bool:
    """Run steps until the time is used up; whether there are no more."""
    done = {entry["step"] for entry in entries(log) if entry["part"] == part}
    end = time.monotonic() + budget
    for step in steps:
        if step.name in done:
            continue
        if time.monotonic() >= end:
            return False
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            counts = forked(lambda step=step, place=place: step.act(Path(place)))
        entry = {"part": part, "step": step.name, "seconds": round(time.monotonic() - began, 2)}
        with open(log, "a") as file:
            file.write(json.dumps({**entry, "counts": counts}) + "\n")
    return True


def entries(log: Path) -> list[dict[str, Any]]:
    if not log.exists():
        return []
    whole = [line for line in log.read_text().splitlines() if line.endswith("}")]
    return [json.loads(line) for line in whole]


def summary(log: Path, complete: Mapping[str, bool]) -> str:
    lines = ["| part | steps | seconds | what was done | findings |", "|---|---:|---:|---|---:|"]
    findings: list[str] = []
    for part in PARTS:
        mine = [entry for entry in entries(log) if entry["part"] == part]
        bad = [entry for entry in mine if "finding" in entry["counts"]]
        counts = Counter[str]()
        for entry in mine:
            if "finding" not in entry["counts"]:
                counts.update(entry["counts"])
        said = ", ".join(f"{value:,} {name}" for name, value in sorted(counts.items()) if value)
        seconds = sum(entry["seconds"] for entry in mine)
        whole = "" if complete.get(part) else "; not all" if part in complete else "; not begun"
        lines.append(f"| {part} | {len(mine)} | {seconds:.0f} | {said}{whole} | {len(bad)} |")
        findings += [f"* {part}, {e['step']}: {e['counts']['finding']}" for e in bad]
    return "\n".join([*lines, "", "Findings:", "", *(findings or ["none"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--part", action="append", choices=[*PARTS], help="only these")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    log, chosen = options.out / "log.jsonl", options.part or [*PARTS]
    complete: dict[str, bool] = {}
    end, left = time.monotonic() + 60 * options.minutes, sum(PARTS[part][1] for part in chosen)
    for part in chosen:
        make, share = PARTS[part]
        budget = max(0.0, end - time.monotonic()) * share / left
        left -= share
        complete[part] = run(part, make(), budget, log)
        (options.out / "summary.md").write_text(summary(log, complete))
    print((options.out / "summary.md").read_text())


if __name__ == "__main__":
    main()
