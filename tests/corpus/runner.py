"""Runs one case in a process of its own, with limits on time and memory and a canary for code."""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import oracle
from .build import CANARY, CONFIG, PICKLE, WEIGHTS, Case, write

SECONDS = 60.0
HEADROOM = 64 << 20
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """What happened.

    Args:
        verdict: "refuse", "warn", "accept"; or "wrong" (another update), "raised" (an error that is
            not of sapmerge), "hung", "died", "code" (the canary is there).
        message: of the error, or of all warnings.
        seconds: of processor time.
    """

    verdict: str
    message: str = ""
    error: str = ""
    seconds: float = 0.0


def build(case: Case, place: Path) -> Path:
    """Fill a fresh folder below `place`; returns what has to be loaded."""
    folder = place / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.build(folder)
    return Path(f"{folder}/{case.target}")


def run(
    case: Case, place: Path, act: Callable[[Case, Path], Mapping[str, Any]] | None = None
) -> Outcome:
    """Build and run one case below `place`, which has to be empty of canaries."""
    target = build(case, place)
    outcome = forked(lambda: (act or ours)(case, target))
    canary = place / CANARY
    if canary.exists():
        canary.unlink()
        return Outcome("code", outcome.message)
    return outcome


def forked(work: Callable[[], Mapping[str, Any]]) -> Outcome:
    """What `work` returns in a child that is killed after a minute."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # The collector would write to every object of the parent, each page a copy.
        gc.freeze()
        try:
            os.close(reader)
            result = json.dumps(dict(work())).encode()
            while result:
                result = result[os.write(writer, result) :]
            os._exit(0)
        except BaseException as error:
            os.write(
                writer, json.dumps({"verdict": "died", "message": repr(error)[:3000]}).encode()
            )
            os._exit(1)
    os.close(writer)
    data, end = b"", time.monotonic() + SECONDS
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
            part = os.read(reader, 1 << 16) if ready else None
            if part is None:
                os.kill(child, signal.SIGKILL)
                return Outcome("hung")
            if not part:
                return Outcome(**json.loads(data)) if data else Outcome("died", "a signal")
            data += part
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def limit_memory(more: int) -> None:
    """No address space beyond what is mapped now and `more` bytes."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))


def on_disk(target: Path) -> int:
    """Bytes of the two files."""
    return sum(
        (target / name).stat().st_size
        for name in (CONFIG, WEIGHTS, PICKLE)
        if "\0" not in str(target) and (target / name).is_file()
    )


def ours(case: Case, target: Path) -> Mapping[str, Any]:
    """Load, or merge, with sapmerge; three times the bytes on disk plus 64 MB is all the
    memory there is.
    """
    _warm_up(case)
    if case.action == "load":
        try:
            size = on_disk(target)
        except OSError:
            size = 0
        limit_memory(3 * size + HEADROOM)
    return vars(judged(case, target))


def judged(case: Case, target: Path) -> Outcome:
    """What sapmerge makes of a folder, in this process."""
    from sapmerge.errors import SapmergeError, SapmergeWarning

    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = _act(case, target)
            seconds = time.process_time() - start
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            found = got()
        except SapmergeError as error:
            return Outcome("refuse", str(error), type(error).__name__, time.process_time() - start)
        except BaseException as error:
            return Outcome("raised", repr(error)[:3000], type(error).__name__)
    said = [item for item in caught if issubclass(item.category, SapmergeWarning)]
    off = oracle.error(found, wanted(case, target))
    if not off <= TOLERANCE:
        return Outcome("wrong", f"the update is off by {off:g}")
    return Outcome(
        "warn" if said else "accept", "; ".join(str(item.message) for item in said), seconds=seconds
    )


def wanted(case: Case, target: Path) -> dict[str, Any]:
    """The right update, from the oracle."""
    if case.truth == "good":
        return oracle.of_good()
    if case.action == "merge":
        return oracle.mean([oracle.of_folder(target / name) for name in "ab"])
    return oracle.of_folder(target)


def _act(case: Case, target: Path) -> Callable[[], dict[str, Any]]:
    """Load or merge; the function that is returned gives the updates."""
    import sapmerge as sm

    def product(update: Any) -> Any:
        # In float64: of two denormal factors nothing would be left in float32.
        return (
            update.dense().double().numpy()
            if isinstance(update, sm.Dense)
            else (update.B.double() @ update.A.double()).numpy()
        )

    if case.action in ("load", "pickle"):
        adapter = sm.Adapter.load(target, allow_pickle_weights=case.action == "pickle")
        return lambda: {name: product(adapter.update(name)) for name in adapter.modules}
    if case.action == "merge":
        merged = sm.merge([target / "a", target / "b"], method=sm.mean())
    else:
        from .base import tiny

        merged = sm.merge([target], method=sm.mean(), model=tiny())
    return lambda: {name: product(update) for name, update in merged.updates()}


def _warm_up(case: Case) -> None:
    """What the first adapter of a process costs once (imports, buffers) is not counted."""
    import tempfile

    import regex  # noqa: F401

    from sapmerge.io.adapter import Adapter

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        adapter = Adapter.load(folder)
        for name in adapter.modules:
            adapter.update(name).dense()


def problems(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with an outcome; nothing if the case passed."""
    found = (
        [] if outcome.verdict == case.verdict else [f"{outcome.verdict}, expected {case.verdict}"]
    )
    if case.verdict != "accept" and not found:
        found += [
            f"the message lacks {word!r}" for word in case.words if word not in outcome.message
        ]
        if len(outcome.message) > 2000:
            found.append(f"the message has {len(outcome.message)} characters")
        if not outcome.message.isprintable():
            found.append("the message has control characters")
    if found:
        found.append(f"{outcome.error} {outcome.message[:1200]!r}")
    return found
