"""An upload survives a kill at any moment, and two processes may add at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.federated.kills", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_kill_between_any_two_system_calls(tmp_path: Path) -> None:
    seen = run("kills", str(tmp_path), "0")
    for task in ("new", "again", "remove"):
        assert seen[f"{task}: not done"] > 10, seen
        assert seen[f"{task}: done"] > 3, seen


def test_two_processes_add_at_once(tmp_path: Path) -> None:
    assert run("race", str(tmp_path), "6") == {"clients": 30}
