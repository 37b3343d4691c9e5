"""The long run over Flower: a SuperLink with TLS and node keys, four SuperNodes, and everything
that can go wrong.

    python -m tests.federated.superlink FOLDER          # 10 to 20 minutes; no part of the tests

Prints a table and exits with 1 where a scenario does not end as it must.
"""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "examples" / "flower"))

from superlink import (  # noqa: E402
    Federation,
    certificates,
    federation,
    node_key,
    settings,
    supernode,
    wait_for,
)

NODES = 4
Expected = Callable[[dict[str, Any]], bool]


def main(work: Path) -> int:
    work.mkdir(parents=True, exist_ok=True)
    certificates(work)
    right: list[bool] = []

    def row(name: str, said: str, held: bool) -> None:
        print(f"| {name} | {said} | {'as it must' if held else 'NOT AS IT MUST'} |", flush=True)
        right.append(held)

    with federation(work / "memory", work, NODES) as run:
        row("a stranger's key", *stranger(work, run.port))
        row("NaN; a wrong shape", *scenario(run, "values", values))
        row("server killed after three uploads", *killed(run))
        row("raises; is killed; never answers", *scenario(run, "processes", failures))
        peaks = {name: round(peak(process)) for name, process in run.processes.items()}
        print("peak MB:", peaks)
    with federation(work / "sqlite", work, NODES, database=True) as run:
        row("a locked database, 20 s", *locked(run))
    return 0 if all(right) else 1


# Scenarios.


def values(found: dict[str, Any]) -> bool:
    said = " ".join(found["failed"])
    return sorted(found["clients"]) == ["client0", "client1"] and "NaN" in said and "6" in said


def failures(found: dict[str, Any]) -> bool:
    return sorted(found["clients"]) == ["client0"] and len(found["failed"]) == 3


def everybody(found: dict[str, Any]) -> bool:
    return len(found["clients"]) == NODES


def start(run: Federation, name: str) -> Path:
    folder = run.folder / name
    folder.mkdir(exist_ok=True)
    run.start(HERE / "superlink_app", {"folder": folder, "scenario": name})
    return folder


def scenario(run: Federation, name: str, held: Expected) -> tuple[str, bool]:
    folder = start(run, name)
    if not wait_for(folder / "result.json", 600):
        return "no result after 600 s", False
    found = json.loads((folder / "result.json").read_text())
    reasons = "; ".join(re.sub(r"\s+", " ", reason)[:90] for reason in found["failed"])
    kept = ", ".join(found["clients"])
    return f"kept {kept} in {found['seconds']:.0f} s; {reasons or 'nobody failed'}", held(found)


def killed(run: Federation) -> tuple[str, bool]:
    folder = start(run, "killed")
    if not wait_for(folder / "killed-once", 600):
        return "never had three uploads", False
    time.sleep(5)
    kept = len(list((folder / "round" / "clients").glob("*.json")))
    text, whole = scenario(run, "killed", everybody)
    trained = [len((folder / f"trained-{k}").read_text()) for k in range(NODES)]
    return (
        f"{kept} on disk after the kill; second run: {text}; trained {trained} times",
        whole and kept >= 3 and trained == [1] * NODES,
    )


def locked(run: Federation) -> tuple[str, bool]:
    """Nobody else writes for 20 s, from the moment when all clients have trained. Uploads get
    errors, the run loses its permission to pull, and the link starts no other run: all processes
    are started again, and the round is run again.
    """
    folder = start(run, "locked")
    while len(list(folder.glob("trained-*"))) < NODES:
        time.sleep(0.05)
    with sqlite3.connect(run.folder / "state.db", timeout=60, isolation_level=None) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(20)
        database.execute("ROLLBACK")
    time.sleep(30)
    first = len(list((folder / "round" / "clients").glob("*.json")))
    ended = run.restart()
    text, whole = scenario(run, "locked", everybody)
    trained = [len((folder / f"trained-{k}").read_text()) for k in range(NODES)]
    return (
        f"{first} kept, {len(ended)} processes ended; all started again, second run: {text}; "
        f"trained {trained} times",
        whole and trained == [1] * NODES,
    )


def stranger(work: Path, port: int) -> tuple[str, bool]:
    key = node_key(work / "stranger")
    environment = settings(work / "stranger-home")
    command = [*supernode(work, port, key, NODES), "--max-retries", "1"]
    with (work / "stranger.log").open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            code = process.wait(180)
        except subprocess.TimeoutExpired:
            process.kill()
            return "was still there after 180 s", False
    return f"its node ended with code {code}", code != 0


def peak(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1000 if found else float("nan")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
