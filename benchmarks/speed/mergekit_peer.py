"""mergekit's `merge_tensors` on the same updates, as matrices beside a base of zero.

mergekit merges whole models and stores matrices; it has no step that brings the result back to a
low rank. What is measured is reading the adapters, forming the updates, its merge,
and writing matrices: it does less than the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from speed.child import Clock, read_updates

__all__ = ["run"]


def run(job: dict[str, Any], clock: Clock) -> None:
    from mergekit.merge_methods.api import merge_tensors

    clock.restart_memory()
    with clock.part("load"):
        updates = read_updates(job["adapters"])
    times = {module: sample["times"] for module, sample in job["samples"].items()} or dict.fromkeys(
        updates, 1.0
    )
    for module, count in times.items():
        with clock.part("merge", count):
            matrices = [b @ a for b, a in updates[module]]
            parameters = {"weight": 1.0, "density": job["options"]["density"]}
            merged = merge_tensors(
                [torch.zeros_like(matrices[0]), *matrices],
                job["method"],
                parameters=parameters,
                base_index=0,
            )
        with clock.part("save", count):
            (target := Path(job["out"]) / module).mkdir(parents=True, exist_ok=True)
            save_file({f"{module}.weight": merged}, target / "matrix.safetensors")
