"""A round of 1,000 clients: seconds and memory of the mean, and what each rule reads.

    python benchmarks/clients.py                        # 100 and 1,000 clients, 5.3 GB of scratch
    python benchmarks/clients.py --counts 100 400

Adapters of rank 8 on the 72 matrices of ViT-B/32's vision tower. One hundred have random weights,
the others are those, each factor times a number of its own. Every merge runs in a process of its
own on one thread. The table goes to benchmarks/results/clients.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from held import matrices_per_adapter
from process import memory
from safetensors.torch import load_file, save_file
from speed.adapters import write_adapters
from tables import provenance, table, write

import sapmerge as sm
from sapmerge import Adapter
from sapmerge.core.protocols import Method
from sapmerge.merging import stream

WIDTH, DEPTH, RANK, DISTINCT = 768, 12, 8, 100
AIM_SECONDS, AIM_MB = 180, 900
RULES = (
    "mean()",
    "MatchEnergy(Chain(Mean()))",
    "fedit()",
    "WeighByAgreement(mean())",
    "geometric_median()",
    "krum()",
    "ClipNorms(mean())",
    "clair()",
    "coordinate_median()",
    "trimmed_mean()",
    "iso_c()",
    "dare()",
    "consensus_ta()",
    "ties()",
    "core_space()",
    "dc_merge()",
    "sce()",
    "cart()",
    "iso_cts()",
    "knots()",
)

READING = """\
CPU seconds of one process with one thread, from opening {counts} adapters (72 matrices, rank 8,
5.3 MB each) to the result of rank 16 on disk, and its peak memory (torch included). Aim for 1,000:
{seconds} s, {mb} MB, and no more memory than for 100. Wall time is not said: the machine was
shared."""

PASSES = """\
How often a merge reads every update (opening reads each file once more), counted on 6 small
adapters of 4 layers; and by how many float32 matrices of a layer the peak of all tensors grows with
every adapter more, counted call by call at 40 and 48 adapters of one layer of 80 x 64. A K x K
matrix of inner products counts as a part of one there; it is 8 MB for 1,000 clients."""


def shapes() -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for layer in range(DEPTH):
        block = f"vision_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found[f"{block}.self_attn.{name}"] = WIDTH, WIDTH
        found[f"{block}.mlp.fc1"] = 4 * WIDTH, WIDTH
        found[f"{block}.mlp.fc2"] = WIDTH, 4 * WIDTH
    return found


def make(folder: Path, count: int) -> list[Path]:
    """`count` adapters, no two with a common factor."""
    first = write_adapters(folder, shapes(), RANK, min(count, DISTINCT), torch.float32)
    for k in range(len(first), count):
        source, target = first[k % DISTINCT], folder / str(k)
        target.mkdir(exist_ok=True)
        factor = 1 + k / count
        tensors = {
            name: value * (factor if "lora_A" in name else 1 / factor**2)
            for name, value in load_file(source / "adapter_model.safetensors").items()
        }
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(source / "adapter_config.json", target)
    return [folder / str(k) for k in range(count)]


def one(folder: Path, count: int) -> None:
    """In a process of its own: merge, and print what it took."""
    torch.set_num_threads(1)
    paths = [folder / str(k) for k in range(count)]
    began = time.process_time()
    merged = sm.merge(paths, method=sm.mean(), rank=16, progress=False)
    merged.save_pretrained(folder / f"merged{count}", overwrite=True)
    print(json.dumps([time.process_time() - began, memory("VmHWM") / 1e6]))


def measured(folder: Path, count: int) -> tuple[float, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def method_of(rule: str) -> Method:
    return sm.federated.fedit() if rule == "fedit()" else sm.parse(rule)


def passes(rule: str, folder: Path) -> float:
    """How often a merge by a rule reads an update, of a layer of an adapter."""
    layers = {f"layers.{n}.q_proj": (24, 20) for n in range(4)}
    paths = write_adapters(folder, layers, 2, 6, torch.float32)
    method = method_of(rule)
    read, room, found = Adapter.update, stream._HELD, list[str]()

    def counted(self: Adapter, name: str) -> object:
        found.append(name)
        return read(self, name)

    Adapter.update = counted  # type: ignore[method-assign]
    stream._HELD = 0  # of a thousand adapters pre-passes can hold next to nothing
    try:
        merged = sm.merge(paths, method=method, rank=2, progress=False)
        merged.save_pretrained(folder / "out", overwrite=True)
    finally:
        Adapter.update, stream._HELD = read, room  # type: ignore[method-assign]
    return len(found) / (len(paths) * len(layers))


def main(counts: Sequence[int], scratch: Path) -> None:
    make(scratch / "clients", max(counts))
    rows: list[list[object]] = []
    for count in counts:
        seconds, peak = measured(scratch / "clients", count)
        rows.append([count, f"{seconds:.0f}", f"{peak:.0f}"])
        print(rows[-1], flush=True)
    reading = [
        [
            rule,
            f"{passes(rule, scratch / 'small'):g}",
            f"{matrices_per_adapter(method_of(rule)):.1f}",
        ]
        for rule in RULES
    ]
    text = READING.format(
        counts=" or ".join(f"{count:,}" for count in counts), seconds=AIM_SECONDS, mb=AIM_MB
    )
    write(
        "clients",
        "A round of 1,000 clients",
        provenance(),
        "## The mean to rank 16",
        text,
        table(["clients", "CPU seconds", "peak MB"], rows),
        "## What each rule reads and holds",
        PASSES,
        table(["rule", "reads", "matrices per adapter"], reading),
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000])
        parser.add_argument("--scratch", type=Path, help="where adapters are made, and left")
        options = parser.parse_args()
        if options.scratch:
            main(options.counts, options.scratch)
        else:
            with tempfile.TemporaryDirectory() as name:
                main(options.counts, Path(name))
