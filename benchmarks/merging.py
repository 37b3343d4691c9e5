"""Speed, memory and accuracy of merging, from files to files, beside PEFT,
mergekit and plain torch.

    python benchmarks/merging.py            # everything
    python benchmarks/merging.py --quick    # shallow models, a few minutes

Adapters with random weights are written first. Every merge runs in a process of its own; peers take
turns. The tables go to benchmarks/results/merging.md. The peers come with `pip install ".[bench]"`;
without mergekit its rows are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from speed.comparison import PEERS, Comparison, Inputs, compare, has_mergekit
from speed.growth import depth_table, kernel_table, thread_table, width_table
from speed.jobs import Job, measure
from speed.shapes import MODELS, shallow
from tables import provenance, table, write

READING = """\
Seconds are wall time from opening the inputs to the output on disk, without imports: the median
of {repeats} run(s), or a single run of what takes over a minute. `time / ours` is what to look
at: how many times as long a peer takes. `merge alone / ours` leaves out the peer's loading and
saving, but not ours (sapmerge reads while it merges).
{scaled}

Peak memory is what the process holds at most beyond an interpreter with torch imported; for PEFT
and mergekit beyond that with the library imported as well, and for PEFT without the weights of
the model, which here are never touched. PEFT merges on a module that has the linear layers only.
mergekit stores matrices of full size and has no step that brings them to a low rank, so it does
less. With cat, `error` is that of the exact result.

`error` is ||stored - best|| / ||best||, best being the best approximation of the stored rank to
the float64 dense result, the largest of one layer per shape (layers with a smaller side above
1024 are left out). `excess loss` is ||stored - result|| / ||best - result|| - 1: where singular
values at the cut are nearly equal, as those of TIES are, the first is large for vectors that
lose nothing. dare_ties draws at random: there is no common reference."""

SCALED = """\
Peers that decompose matrices of full size are slow: of them one layer of each shape is merged
and counted as often as the shape occurs; loading and saving are measured whole. PEFT's cat and
sapmerge are always measured whole."""
WHOLE = "Every layer was merged by everyone; nothing is scaled."


def clip_blocks(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """Section 1: CLIP ViT-B/32 and ViT-L/14, both towers, against all peers."""
    counts = options.counts or ((4,) if options.quick else (4, 16))
    tasks = [task for task in PEERS if options.tasks is None or task.title in options.tasks]
    yield "## CLIP, rank 16: q, k, v, out, fc1 and fc2 of both towers"
    yield READING.format(repeats=options.repeats, scaled=WHOLE if options.whole else SCALED)
    last: dict[int, Comparison] = {}
    for name in ("ViT-B/32",) if options.quick else ("ViT-B/32", "ViT-L/14"):
        shapes = shallow(MODELS[name], 2) if options.quick else MODELS[name]
        for count in counts:
            folder = scratch / name.replace("/", "-")
            inputs = Inputs.write(folder, shapes, 16, count, torch.float32, options.whole)
            last[count] = compare(inputs, tasks, options.repeats, options.device)
            yield f"### {name}, K = {count}, {len(shapes)} layers"
            yield str(last[count])
        shutil.rmtree(scratch / name.replace("/", "-"))
    yield "## Aims" + (" (on shallow models they say little)" if options.quick else " on ViT-L/14")
    yield table(
        ["aim", "wanted", *(f"K = {count}" for count in counts)],
        _aims([last[count] for count in counts]),
    )


def _aims(found: list[Comparison]) -> Iterator[list[object]]:
    def met(value: float, wanted: float) -> str:
        return f"{value:.3g} x, {'met' if value >= wanted else 'not met'}"

    for title, wanted, task, who in (
        ("mean to rank 16 / PEFT svd", 50, "mean", "PEFT svd"),
        ("mean to rank 16 / PEFT svd, thin", 50, "mean", "PEFT svd, svd_full_matrices=False"),
        ("ties to rank 16 / PEFT ties_svd", 20, "ties", "PEFT ties_svd"),
        ("ties to rank 16 / PEFT ties_svd, thin", 20, "ties", "PEFT ties_svd, "
                                                              "svd_full_matrices=False"),
        ("dare_ties to rank 16 / PEFT dare_ties_svd", 12, "dare_ties", "PEFT dare_ties_svd"),
        ("tsv / dense", 50, "tsv", "dense torch"),
        ("iso_c / dense", 50, "iso_c", "dense torch"),
        ("knots / dense", 50, "knots", "dense torch"),
    ):  # fmt: skip
        if any(each.ratio(task, who) for each in found):
            yield [title, f"{wanted} x", *(met(each.ratio(task, who), wanted) for each in found)]
    pairs = [[each.errors("mean", who) for who in ("sapmerge", "PEFT svd")] for each in found]
    verdicts = [
        f"{a[0]:.1e}, {b[0]:.1e}: {'met' if a[0] <= b[0] else 'not met'}" if a and b else "-"
        for a, b in pairs
    ]
    if any(map(all, pairs)):
        yield ["error of mean to rank 16, PEFT's", "ours <= PEFT's", *verdicts]


def llava_blocks(options: argparse.Namespace, scratch: Path) -> Iterator[str]:
    """Section 2: the shapes of LLaVA-1.5-7B."""
    shapes = shallow(MODELS["LLaVA-1.5-7B"], 1) if options.quick else MODELS["LLaVA-1.5-7B"]
    folder = scratch / "llava"
    inputs = Inputs.write(folder, shapes, 64, 4, torch.bfloat16, whole=False)
    query = next(
        name for name in shapes if name.endswith("layers.0.self_attn.q_proj") and "language" in name
    )
    large = sum(shape >= (4096, 4096) for shape in shapes.values())
    one = {query: {**inputs.samples.get(query, _alone(inputs, query)), "times": large}}
    jobs = [
        Job(
            "ours",
            method,
            inputs.adapters,
            str(folder / "out" / str(k)),
            64,
            options={"device": options.device},
        )
        for k, method in enumerate(("mean()", "task_arithmetic()", "tsv()"))
    ]
    keywords = {"density": None, "mean": True, "full_matrices": True}
    jobs.append(
        Job("peft_peer", "svd", inputs.adapters, str(folder / "out" / "peft"), 64, one, keywords)
    )
    outcomes = measure(jobs, 1)
    rows: list[list[object]] = [
        [
            job.method,
            job.peer,
            f"{o.seconds:.1f}",
            f"{o.seconds / outcomes[0].seconds:.3g} x",
            f"{o.peak:.0f}",
            o.failed,
        ]
        for job, o in zip(jobs, outcomes, strict=True)
    ]
    ours = outcomes[0]
    verdict = "met" if ours.seconds <= 90 and ours.peak < 2000 else "not met"
    yield (
        f"## LLaVA-1.5-7B, r = 64, K = 4, bfloat16, {len(shapes)} layers "
        "(language model, vision tower, projector)"
    )
    yield (
        f"PEFT merges one layer of 4096 x 4096, counted {large} times: as if the MLPs, 2.7 times "
        "as large, took no longer, and the vision tower nothing. So its time is a lower bound."
    )
    yield table(
        ["method, to rank 64", "who", "seconds", "time / mean of ours", "peak MB", ""], rows
    )
    yield f"Aim: mean within 90 s and 2 GB: {ours.seconds:.1f} s and {ours.peak:.0f} MB, {verdict}."
    shutil.rmtree(folder)


def _alone(inputs: Inputs, module: str) -> dict[str, object]:
    from speed.adapters import extract

    where = inputs.folder / "only" / module
    return {
        "adapters": [
            str(extract(Path(p), module, where / str(k))) for k, p in enumerate(inputs.adapters)
        ]
    }


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shallow models, one repeat")
    parser.add_argument("--repeats", type=int, help="default 3; 1 with --quick")
    parser.add_argument(
        "--tasks", nargs="+", choices=[task.title for task in PEERS], help="of the part clip"
    )
    parser.add_argument("--counts", nargs="+", type=int, help="adapters, in the part clip: 4 16")
    parser.add_argument(
        "--whole", action="store_true", help="peers merge every layer: nothing is scaled; hours"
    )
    parser.add_argument(
        "--device", help="where sapmerge computes, e.g. cuda; the peers stay on the CPU"
    )
    parser.add_argument(
        "--scratch", type=Path, help="where adapters are written (about 5 GB); a temporary folder"
    )
    parser.add_argument(
        "--only",
        choices=["clip", "llava", "growth", "kernels"],
        help="one part, kept as merging-PART",
    )
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


def main() -> None:
    options = options_of()
    parts = {
        "clip": clip_blocks,
        "llava": llava_blocks,
        "growth": lambda o, s: iter([*width_table(o, s), *depth_table(o, s)]),
        "kernels": lambda o, s: iter([*kernel_table(o, s), *thread_table(o, s)]),
    }
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="merging-") as scratch:
        blocks: list[str] = []
        for name, part in parts.items():
            for block in part(options, Path(scratch)) if options.only in (None, name) else ():
                print(block, file=sys.stderr)
                blocks.append(block)
    cores = (
        f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads of torch for "
        "everyone."
    )
    packages = ("peft", "safetensors", *(["mergekit"] if has_mergekit() else []))
    file = (
        "merging"
        + (f"-{options.only}" if options.only else "")
        + "".join(f"-{task.replace(', ', '_')}" for task in options.tasks or ())
        + ("-quick" if options.quick else "")
    )
    write(file, "Speed, memory and accuracy of merging",
          provenance(*packages), cores, *blocks)  # fmt: skip


if __name__ == "__main__":
    main()
