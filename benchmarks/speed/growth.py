"""How time and memory grow, what the pure kernels take, and what a second core brings."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tables import table

from speed.adapters import write_adapters
from speed.jobs import Job, Outcome, measure
from speed.kernels import BESIDES, NEEDED
from speed.shapes import MODELS, shallow, stack

__all__ = ["depth_table", "kernel_table", "thread_table", "width_table"]

_METHODS = ("mean()", "ties(0.2)")


def width_table(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """More and more adapters."""
    counts = (1, 4, 16) if options.quick else (1, 4, 16, 64, 256)
    layers = 2 if options.quick else 12
    folder = scratch / "width"
    paths = tuple(
        str(path) for path in write_adapters(folder, stack(layers), 16, counts[-1], torch.bfloat16)
    )
    yield f"## Growth in K: a tower of {layers} layers, hidden 512, rank 16, stored at rank 16"
    for method in _METHODS:
        jobs = [Job("ours", method, paths[:count], str(folder / "out"), 16) for count in counts]
        yield _growth(
            method, "K", counts, measure(jobs, 1 if method != "mean()" else options.repeats)
        )
    shutil.rmtree(folder)


def depth_table(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """Deeper and deeper models."""
    depths = (2, 4, 8) if options.quick else (12, 24, 48, 96)
    yield "## Growth in depth: hidden 512, rank 16, K = 4"
    jobs: dict[str, list[Job]] = {method: [] for method in _METHODS}
    for depth in depths:
        paths = write_adapters(scratch / f"depth{depth}", stack(depth), 16, 4, torch.bfloat16)
        for method in _METHODS:
            jobs[method].append(
                Job("ours", method, tuple(map(str, paths)), str(scratch / f"out{depth}"), 16)
            )
    for method in _METHODS:
        yield _growth(method, "layers of the tower", depths, measure(jobs[method], options.repeats))


def _growth(method: str, what: str, values: Sequence[int], outcomes: Sequence[Outcome]) -> str:
    first = outcomes[0]
    rows = [
        [
            value,
            f"{o.seconds:.2f}",
            f"{o.seconds / first.seconds:.3g} x",
            f"{value / values[0]:g} x",
            f"{o.peak:.0f}",
            f"{o.peak / first.peak:.2f} x",
        ]
        for value, o in zip(values, outcomes, strict=True)
    ]
    flat = max(o.peak for o in outcomes) / min(o.peak for o in outcomes)
    verdict = (
        f"Peak memory within 15 %: {'met' if flat <= 1.15 else 'not met'} ({flat:.2f} x "
        "between the extremes)."
    )
    head = [what, "seconds", "time / first", f"{what} / first", "peak MB", "peak / first"]
    return f"`{method}`\n\n{table(head, rows)}\n\n{verdict}"


def kernel_table(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """The time of `mean` beside the sum of the kernels it needs, everything on one thread."""
    name = "ViT-B/32" if options.quick else "ViT-L/14"
    shapes = shallow(MODELS[name], 2) if options.quick else MODELS[name]
    yield f"## Pure kernels: mean of {name}, to rank 16, one thread"
    yield (
        "What reading (as float64), QR, small SVD and writing take by themselves, called in a "
        "plain loop. The rest is what makes the result trustworthy, measured too: hashes of every "
        "byte at opening (file and tensor) and again at reading, and the report; what is left is "
        "the interpreter, checks of names and values, and conversions."
    )
    rows: list[list[object]] = []
    for count in (4,) if options.quick else (4, 16):
        paths = write_adapters(scratch / "kernels", shapes, 16, count, torch.float32)
        inputs, out = tuple(map(str, paths)), str(scratch / "out")
        jobs = [
            Job("ours", "mean()", inputs, out, 16, threads=1),
            Job("kernels", "mean", inputs, out, 16, threads=1),
        ]
        ours, pure = measure(jobs, options.repeats)
        needed = sum(pure.parts[part] for part in NEEDED)
        besides = [pure.parts[part] for part in BESIDES]
        left = ours.seconds - needed - sum(besides)
        ratio = ours.seconds / needed
        rows.append(
            [
                count,
                *(f"{pure.parts[part]:.2f}" for part in NEEDED),
                f"{needed:.2f}",
                f"{ours.seconds:.2f}",
                f"{ratio:.2f} x, {'met' if ratio <= 2.5 else 'not met'}",
                *(f"{each:.2f}" for each in besides),
                f"{left:.2f}",
            ]
        )
    head = [
        "K",
        *(f"{part}, s" for part in NEEDED),
        "sum",
        "sapmerge",
        "ratio (aim 2.5)",
        *BESIDES,
        "other",
    ]
    yield table(head, rows)


def thread_table(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """Layers side by side: one thread against all of them."""
    shapes = shallow(MODELS["ViT-B/32"], 2) if options.quick else MODELS["ViT-B/32"]
    paths = tuple(map(str, write_adapters(scratch / "threads", shapes, 16, 4, torch.float32)))
    rows: list[list[object]] = []
    for method in _METHODS:
        jobs = [
            Job("ours", method, paths, str(scratch / "out"), 16, threads=threads)
            for threads in (1, 0)
        ]
        one, all_of_them = measure(jobs, options.repeats)
        speed = f"{one.seconds / all_of_them.seconds:.2f} x"
        rows.append(
            [
                method,
                f"{one.seconds:.2f}",
                f"{all_of_them.seconds:.2f}",
                speed,
                f"{all_of_them.peak:.0f}",
            ]
        )
    yield "## Threads: ViT-B/32, K = 4, one layer per thread"
    yield table(["method", "one thread, s", "all threads, s", "faster", "peak MB, all"], rows)
