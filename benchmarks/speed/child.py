"""The process that is measured: `python -m speed.child JOB` does one job and prints its
outcome as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

import torch
from process import memory
from torch import Tensor

__all__ = ["Clock", "Updates", "read_updates", "write_factors"]

Updates = dict[str, list[tuple[Tensor, Tensor]]]
"""Module -> for every adapter B with its scaling, and A, in float32."""


class Clock:
    """Seconds per part of the work, and the memory from which peaks are counted."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._start = memory("VmRSS")

    @contextmanager
    def part(self, name: str, times: float = 1.0) -> Generator[None]:
        """Adds the time of the block, `times` as much where the block stands for several layers."""
        start = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + times * (time.perf_counter() - start)

    def restart_memory(self) -> None:
        """Count peaks from here: what is there now is not the merge's."""
        self._start = memory("VmRSS")

    def outcome(self) -> dict[str, object]:
        peak = (memory("VmHWM") - self._start) / (1 << 20)
        return {"seconds": sum(self.parts.values()), "parts": self.parts, "peak": peak}


def read_updates(adapters: list[str]) -> Updates:
    """All factors of all adapters, for the peers that are written here."""
    from safetensors.torch import load_file

    found: Updates = {}
    for folder in adapters:
        with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
            config = json.load(file)
        tensors = load_file(f"{folder}/adapter_model.safetensors")
        for key, a in tensors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[key.replace("lora_A", "lora_B")].float() * (
                    config["lora_alpha"] / config["r"]
                )
                found.setdefault(name, []).append((b, a.float()))
    return found


def write_factors(out: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """B and A of every module, as PEFT names them."""
    from pathlib import Path

    from safetensors.torch import save_file

    Path(out).mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{n}.lora_B.weight": b.contiguous() for n, (b, _) in factors.items()
    }
    tensors |= {
        f"base_model.model.{n}.lora_A.weight": a.contiguous() for n, (_, a) in factors.items()
    }
    save_file(tensors, f"{out}/adapter_model.safetensors")


def main() -> None:
    job = json.loads(sys.argv[1])
    clock = Clock()
    with torch.no_grad():
        importlib.import_module(f"speed.{job['peer']}").run(job, clock)
    print(json.dumps(clock.outcome()))


if __name__ == "__main__":
    main()
