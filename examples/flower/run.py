"""The whole round in one process: python examples/flower/run.py FOLDER [--base-only]"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

from one_shot import task  # noqa: E402


def main(folder: Path) -> None:
    from flwr.simulation import run_simulation
    from one_shot import client_app, server_app

    run_simulation(server_app=server_app.app, client_app=client_app.app, num_supernodes=8)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    target.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "ONE_SHOT_FOLDER": str(target),
        "ONE_SHOT_LEFT_OUT": "outline",
        "ONE_SHOT_NODES": "8",
        "ONE_SHOT_SEED": "0",
    }
    if not (target / "base").exists():
        task.make_base(target, seed=0)
    if "--base-only" not in sys.argv:
        main(target)
