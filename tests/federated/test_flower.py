"""A whole round over Flower, in one process: clients that are good, bad, raise, and die;
a second run after a kill.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="needs the extra flower")
pytest.importorskip("ray", reason="needs Flower's simulation")

ROOT = Path(__file__).parents[2]

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def test_a_round_in_one_process(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.federated.flower_round", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert (tmp_path / "result.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "result.json").read_text())
    assert sorted(found["clients"]) == ["client0", "client1"]
    assert len(found["failed"]) == 2
    assert any("NaN" in reason for reason in found["failed"])
    assert found["arrays"] == 6  # three modules, two factors each
    assert found["trained"] == {"client0": 1, "client1": 1, "client2": 2, "client3": 1}, (
        "asked twice, trained once"
    )
