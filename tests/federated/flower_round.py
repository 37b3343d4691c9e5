"""Run as a script: one federation in one process, four clients. Writes what came of it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

import sapmerge as sm
from sapmerge.federated import Inbox
from sapmerge.federated.flower import OneShot, Patience, train_app

FOLDER = Path(sys.argv[1])
MODULES = ("a", "b", "c")


def upload(seed: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(MODULES)}
    state = {}
    for name in MODULES:
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 6, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(
            6, 2, generator=generator
        ).bfloat16()
    return config, state


def train(context: Any, config: Any) -> tuple[object, int]:
    """Client 2 raises, client 3 sends NaN."""
    which = int(context.node_config["partition-id"])
    log = FOLDER / f"trained-{which}"
    log.write_text(log.read_text() + "x" if log.exists() else "x")
    assert config["max-rank"] == 2
    if which == 2:
        raise RuntimeError("no data here")
    made = upload(which)
    if which == 3:
        made[1]["base_model.model.a.lora_A.weight"].fill_(float("nan"))
    return made, 100 + which


def client() -> ClientApp:
    """A `train_app` per node, which is told its number by the node's config."""
    app = ClientApp()

    @app.train()
    def answer(message: Any, context: Any) -> Any:
        which = context.node_config["partition-id"]
        return train_app(train, str(FOLDER / f"keep{which}"), client=f"client{which}")(
            message, context
        )

    return app


def server() -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        inbox = Inbox(
            FOLDER / "round", manifest={name: [6, 6] for name in MODULES}, max_rank=2, quorum=2
        )
        patience = Patience(first=120, rest=60, pull=20, pause=0.5)
        strategy = OneShot(inbox, method=sm.mean(), nodes=4, patience=patience)
        result = strategy.start(grid)
        found = {
            "clients": inbox.clients,
            "failed": list(strategy.collected.failed.values()),
            "arrays": len(result.arrays),
            "trained": {f"client{k}": len((FOLDER / f"trained-{k}").read_text()) for k in range(4)},
        }
        (FOLDER / "result.json").write_text(json.dumps(found))

    return app


if __name__ == "__main__":
    run_simulation(server_app=server(), client_app=client(), num_supernodes=4)
