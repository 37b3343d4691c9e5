"""`sapmerge neighbours` and `sapmerge prompts`: what a server of a federated round does besides
merging.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from sapmerge.cli.arguments import adapters_of, add_reading_options, weights_of
from sapmerge.cli.hub import add_hub_option, local
from sapmerge.errors import printable

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands; returns their parsers."""
    near = commands.add_parser(
        "neighbours",
        help="which clients are near to each other",
        description="Weights of every client for itself and for the clients nearest to it; the "
        "rows sum to 1.",
        epilog="example: sapmerge neighbours art sketch cartoon --count 2 --distance cosine",
    )
    near.add_argument("adapters", nargs="+", metavar="ADAPTER", help="as in `sapmerge merge`")
    near.add_argument("--count", type=int, default=3, help="of neighbours (default: %(default)s)")
    near.add_argument("--samples", help="per client: 700,900 or label=700,label=900")
    near.add_argument("--self-weight", type=float, help="of a client for itself, in [0, 1]")
    near.add_argument(
        "--distance",
        choices=("euclidean", "cosine"),
        default="euclidean",
        help="between updates (default: %(default)s)",
    )
    near.add_argument("--json", action="store_true", help="data instead of a table")
    add_reading_options(near)
    near.set_defaults(run=_neighbours)

    mean = commands.add_parser(
        "prompts",
        help="the mean of soft prompts",
        description="Average soft prompts by samples: PEFT's (prompt, p-, prefix, CPT tuning), or "
        "CoOp's ctx.",
        epilog="example: sapmerge prompts one two -o mean --samples 700,900",
    )
    mean.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="folder of PEFT, or a file; or hf://"
    )
    mean.add_argument("-o", "--output", required=True, help="folder to write")
    mean.add_argument("--samples", help="per client: 700,900")
    mean.add_argument("--modules-to-save", choices=("mean", "drop"), help="heads beside prompts")
    mean.add_argument("--overwrite", action="store_true", help="replace an existing output")
    mean.add_argument("--json", action="store_true", help="data instead of a table")
    add_hub_option(mean)
    mean.set_defaults(run=_prompts)
    return [near, mean]


def _neighbours(options: argparse.Namespace) -> None:
    from sapmerge.display.tables import table
    from sapmerge.federated import neighbours
    from sapmerge.merging.inputs import load_adapters

    opened = load_adapters(adapters_of(options))
    labels = [adapter.label for adapter in opened]
    found = neighbours(
        {adapter.label: adapter for adapter in opened},
        options.count,
        samples=weights_of(options.samples),
        self_weight=options.self_weight,
        distance=options.distance,
    )
    weights = [[float(weight) for weight in row] for row in found]
    if options.json:
        rows = {
            label: dict(zip(labels, row, strict=True))
            for label, row in zip(labels, weights, strict=True)
        }
        print(json.dumps(rows, indent=2))
    else:
        rows = [
            [label, *(f"{weight:.3f}" for weight in row)]
            for label, row in zip(labels, weights, strict=True)
        ]
        print(table(["client", *labels], rows))


def _prompts(options: argparse.Namespace) -> None:
    from sapmerge.display.tables import table
    from sapmerge.federated import average_prompts

    mean = average_prompts(
        [local(prompt, options) for prompt in options.prompts],
        weights_of(options.samples),
        modules_to_save=options.modules_to_save,
    )
    os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
    mean.save_pretrained(options.output, overwrite=options.overwrite)
    if options.json:
        print(json.dumps(dict(mean.report), indent=2))
        return
    rows = [
        [path, f"{one['share']:.3f}", f"{one['distance']:.3g}"]
        for path, one in zip(options.prompts, mean.report["clients"].values(), strict=True)
    ]
    print(table(["prompt", "share", "distance from the mean"], rows))
    print(f"\nnorm kept: {mean.report['norm kept']:.1%}\nwritten to {printable(options.output)}")
