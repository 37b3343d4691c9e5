"""What is measured: one merge, files to file, in a process of its own;
several of them take turns.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Job", "Outcome", "measure"]

_LONG = 60.0  # seconds: what takes longer is run once
_HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """One merge by one library.

    Args:
        peer: a module of this package: "ours", "peft_peer", "dense", "mergekit_peer", "kernels".
        method: what the peer calls it.
        adapters: folders.
        out: folder to write.
        rank: of what is stored; None: whatever the method gives, exactly.
        samples: module -> {"times": how many layers it stands for, "adapters": folders with this
            module alone}. Empty: all layers are merged, and nothing is scaled.
        options: what else the peer wants to know.
        threads: of torch; 0: as many as there are cores.
    """

    peer: str
    method: str
    adapters: tuple[str, ...]
    out: str
    rank: int | None = None
    samples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Any])
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    threads: int = 0


@dataclass(frozen=True)
class Outcome:
    """Medians over the repeats.

    Args:
        seconds: reading, merging and writing; scaled where the job has samples.
        parts: seconds of each part.
        peak: memory in MB beyond what the process had before (the interpreter with torch; see each
            peer).
        failed: the last line of the error, where the peer could not do it.
        wall: seconds that the process really took, imports included.
    """

    seconds: float
    parts: Mapping[str, float]
    peak: float
    failed: str = ""
    wall: float = 0.0


def measure(jobs: Sequence[Job], repeats: int) -> list[Outcome]:
    """Run every job `repeats` times, the jobs taking turns, each in a fresh process;
    once if it takes over a minute.
    """
    found: list[list[Outcome]] = [[] for _ in jobs]
    for turn in range(repeats):
        for place, job in enumerate(jobs):
            if turn == 0 or not (found[place][0].failed or found[place][0].wall > _LONG):
                print(
                    f"  {turn + 1}/{repeats} {job.peer} {job.method} {Path(job.out).name}",
                    file=sys.stderr,
                )
                found[place].append(_run(job))
    return [_median(runs) for runs in found]


def _run(job: Job) -> Outcome:
    shutil.rmtree(job.out, ignore_errors=True)
    Path(job.out).parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(_HERE), str(_HERE.parent), environment.get("PYTHONPATH", "")]
    )
    if job.threads:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    command = [sys.executable, "-m", "speed.child", json.dumps(asdict(job))]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Outcome(0.0, {}, 0.0, lines[-1][:200])
    return Outcome(**json.loads(done.stdout.splitlines()[-1]), wall=time.perf_counter() - start)


def _median(runs: Sequence[Outcome]) -> Outcome:
    if runs[-1].failed:
        return runs[-1]
    return Outcome(
        statistics.median(run.seconds for run in runs),
        {part: statistics.median(run.parts[part] for run in runs) for part in runs[0].parts},
        statistics.median(run.peak for run in runs),
    )
