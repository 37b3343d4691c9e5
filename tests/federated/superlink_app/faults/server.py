"""One round, which writes what came of it; in the scenario "killed" it dies after three uploads,
once.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from flwr.serverapp import ServerApp

import sapmerge as sm
from faults import MODULES, SCENARIOS
from sapmerge.federated import Inbox
from sapmerge.federated.flower import OneShot, Patience

app = ServerApp()


@app.main()
def main(grid: Any, context: Any) -> None:
    folder, scenario = Path(context.run_config["folder"]), context.run_config["scenario"]
    began = time.monotonic()
    inbox = Inbox(folder / "round", manifest={name: [6, 6] for name in MODULES}, max_rank=2)

    def say(line: str) -> None:
        with (folder / "said.txt").open("a") as log:
            log.write(f"{time.monotonic() - began:.1f} {line}\n")
        dying = folder / "killed-once"
        if scenario == "killed" and len(inbox.clients) >= 3 and not dying.exists():
            dying.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    patience = Patience(first=240, rest=150, pull=30, pause=1)
    strategy = OneShot(
        inbox, method=sm.mean(), nodes=len(SCENARIOS[scenario]), patience=patience, say=say
    )
    strategy.start(grid)
    found = {
        "clients": inbox.clients,
        "failed": sorted(strategy.collected.failed.values()),
        "seconds": time.monotonic() - began,
    }
    (folder / "result.tmp").write_text(json.dumps(found))
    (folder / "result.tmp").rename(folder / "result.json")
