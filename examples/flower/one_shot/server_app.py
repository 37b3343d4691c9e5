"""The server: one round, SAP on public anchors, accuracy on the domain that no client has."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from flwr.serverapp import ServerApp

import sapmerge as sm
from one_shot import task
from sapmerge.federated import Inbox
from sapmerge.federated.flower import OneShot, Patience

app = ServerApp()


@app.main()
def main(grid: Any, context: Any) -> None:
    folder, left_out = Path(task.setting(context, "folder")), task.setting(context, "left-out")
    nodes = int(task.setting(context, "nodes"))
    base = task.base_model(folder)
    inbox = Inbox(
        folder / "round", base_model="digits-clip", model=base, max_rank=8, quorum=nodes // 2
    )
    strategy = OneShot(
        inbox, task.anchors(), base, nodes=nodes, patience=Patience(first=1200, rest=900)
    )
    strategy.start(grid)
    found = {"base": task.test(base, left_out)}
    for name, merged in (("sap", strategy.merged), ("mean", inbox.merge(method=sm.mean()))):
        model = copy.deepcopy(base)
        merged.apply_to(model)
        found[name] = task.test(model, left_out)
    (folder / "accuracy.json").write_text(json.dumps({"left out": left_out, **found}, indent=1))
    print(f"accuracy on {left_out}, which no client has: {found}")
