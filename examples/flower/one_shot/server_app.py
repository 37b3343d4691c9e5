"""The server: one round, SAP on public anchors, accuracy on the domain that no client has."""

from __future__ import annotations

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
    nodes, seed = (int(task.setting(context, name)) for name in ("nodes", "seed"))
    base = task.base_model(folder)
    inbox = Inbox(
        folder / "round", base_model="digits-clip", model=base, max_rank=8, quorum=nodes // 2
    )
    strategy = OneShot(
        inbox, task.anchors(seed), base, nodes=nodes, patience=Patience(first=1200, rest=900)
    )
    strategy.start(grid)
    honest = [folder / "clients" / f"client{k}" for k in range(task.LIAR)]  # known here alone
    results = {
        "sap": strategy.merged,
        "mean, matched": inbox.merge(method=sm.MatchEnergy(sm.mean())),
        "mean": inbox.merge(method=sm.mean()),
        "good ones, matched": sm.merge(honest, method=sm.MatchEnergy(sm.mean())),
        "good ones": sm.merge(honest, method=sm.mean()),
    }
    found = {"zero-shot": task.right(base, left_out, seed)}
    for name, merged in results.items():
        with merged.applied(base):
            found[name] = task.right(base, left_out, seed)
    record = {"left out": left_out, "clients": inbox.clients, "right": found}
    record["refused"] = [list(pair) for pair in inbox.report.refused]
    task.write(folder / "accuracy.json", json.dumps(record))
    shares = {name: f"{sum(calls) / len(calls):.1%}" for name, calls in found.items()}
    print(f"accuracy on {left_out}, which no client has: {shares}")
