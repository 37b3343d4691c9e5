"""A client: it trains once, and answers a second request of the same round from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from one_shot import task
from sapmerge.federated.flower import train_app

app = ClientApp()


@app.train()
def answer(message: Any, context: Any) -> Any:
    folder, left_out = Path(task.setting(context, "folder")), task.setting(context, "left-out")
    which, seed = int(context.node_config["partition-id"]), int(task.setting(context, "seed"))

    def train(_: Any, config: Any) -> tuple[object, int]:
        return task.train(folder, which, left_out, seed)

    return train_app(train, keep=str(folder / f"keep{which}"), client=f"client{which}")(
        message, context
    )
