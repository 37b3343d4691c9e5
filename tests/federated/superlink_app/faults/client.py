"""A client that does what its scenario says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp

from faults import MODULES, SCENARIOS
from sapmerge.federated.flower import train_app

app = ClientApp()


def upload(seed: int, wide: int = 6) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(MODULES)}
    state = {}
    for name in MODULES:
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, wide, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
    return config, state


@app.train()
def answer(message: Any, context: Any) -> Any:
    folder, which = Path(context.run_config["folder"]), int(context.node_config["partition-id"])
    does = SCENARIOS[context.run_config["scenario"]][which]

    def train(_: Any, __: Any) -> tuple[object, int]:
        with (folder / f"trained-{which}").open("a") as log:
            log.write("x")
        if does == "raises":
            raise RuntimeError("no data here")
        if does == "dies":
            os._exit(1)
        if does in ("silent", "slow"):
            time.sleep(240 if does == "silent" else 20)
        made = upload(which, 7 if does == "shape" else 6)
        if does == "nan":
            made[1]["base_model.model.a.lora_A.weight"].fill_(float("nan"))
        return made, 100 + which

    return train_app(train, str(folder / f"keep{which}"), client=f"client{which}")(message, context)
