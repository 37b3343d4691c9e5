"""Time and memory of scoring, beside those of plain passes through a PeftModel."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from process import memory

import sapmerge as sm
from cost.setups import Setup
from sapmerge.losses import alignment, language_modeling
from sapmerge.merging.stream import AdapterLayers

Work = Callable[[], object]


def floor(made: Setup) -> None:
    """One adapter: forward, and backward to the LoRA parameters alone; all batches."""
    model = made.wrapped
    model.set_adapter("a0")
    chosen = [p for name, p in model.named_parameters() if ".a0." in name]
    inner = model.get_base_model()
    loss = alignment if hasattr(inner, "get_text_features") else language_modeling
    total = [torch.zeros_like(p) for p in chosen]
    for batch in made.batches:
        for sums, grad in zip(
            total, torch.autograd.grad(loss(inner, batch), chosen, allow_unused=True)
        ):
            if grad is not None:
                sums += grad


def gradients(made: Setup, units: Any, statistic: str, at: str) -> None:
    """The statistics of all adapters' gradients, in two halves of the anchors,
    in the coordinates of the units.
    """
    layers = AdapterLayers.of(made.adapters, [1.0] * len(made.adapters), torch.device("cpu"))
    layers = layers.with_anchors(made.batches, made.base, None)
    assert layers.anchors is not None
    for turn, seen in layers.anchors.in_turn(layers, units):
        for layer in layers:
            for k in turn:
                if layer.updates[k].rank:
                    for part in _PARTS[type(units)]:
                        seen.moment(layer.name, k, part, statistic, at)


_PARTS = {sm.Factors: ("A", "B"), sm.Directions: ("directions",), sm.Entries: ("entries",)}


def merge(made: Setup, method: sm.Method) -> None:
    """The whole call: what the method asks the anchors for, the merge, and what its report needs.
    Nothing is written.
    """
    sm.merge(made.adapters, made.batches, made.base, method=method, progress=False)


def seconds(work: Work) -> float:
    """Of this process, on all its threads: other programs on the machine count as
    little as can be.
    """
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def interleaved(peer: Work, works: list[Work]) -> tuple[float, list[float]]:
    """Seconds of the peer (the median of its runs before, between and after), and of each work."""
    beside, found = [seconds(peer)], list[float]()
    for work in works:
        found.append(seconds(work))
        beside.append(seconds(peer))
    return statistics.median(beside), found


def extra_memory(work: Work) -> int:
    """Bytes by which the peak of this process exceeds what it holds before."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def in_fresh_process(script: Path, question: dict[str, Any]) -> int:
    """Ask the script for the extra memory of one piece of work."""
    command = [sys.executable, str(script), "--memory", json.dumps(question)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{question}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])
