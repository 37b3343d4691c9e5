"""`sapmerge anchors`: a few anchors out of many."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from sapmerge.cli.models import add_base_options, batches_of, model_of, pairs_of
from sapmerge.errors import AnchorError, printable

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "anchors",
        help="choose anchors from a larger pool",
        description="Choose a few pairs that stand for a pool, and write them as a folder for "
        "--anchors.",
        epilog="example: sapmerge anchors photos -o anchors --count 32 --model base",
    )
    parser.add_argument(
        "pool",
        metavar="POOL",
        help="images with captions.json, .jsonl, .csv or .txt; or hf://user/dataset:split",
    )
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=32, help="pairs (default: %(default)s)")
    parser.add_argument(
        "--by",
        choices=("coreset", "kmeans", "random"),
        default="coreset",
        help="coreset and kmeans go by the model's embeddings, and weigh the pairs "
        "(default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="data instead of a line")
    parser.add_argument("--quiet", action="store_true", help="no progress, no line")
    add_base_options(parser.add_argument_group("the base model"))
    parser.set_defaults(run=_choose)
    return [parser]


def _choose(options: argparse.Namespace) -> None:
    from sapmerge import anchors

    pool = pairs_of(options.pool)
    if not 1 <= options.count <= len(pool):
        raise AnchorError(f"--count {options.count}: the pool has {len(pool)} pairs")
    if options.by == "random":
        import torch

        chosen = anchors.at_random(torch.empty(len(pool), 1), options.count, options.seed)
    else:
        batches = batches_of(pool, options)
        choose = anchors.coreset if options.by == "coreset" else anchors.kmeans
        progress = False if options.quiet else None
        found = anchors.features(batches, model_of(options), progress)
        chosen = choose(found, options.count, seed=options.seed)
    pairs = chosen.among(pool)
    os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
    anchors.write_folder(pairs, options.output, overwrite=options.overwrite)
    if options.json:
        data = {"pool": len(pool), "rows": chosen.indices, "weights": chosen.weights}
        print(json.dumps({**data, "output": options.output}, indent=2))
    elif not options.quiet:
        print(f"{len(pairs)} of {len(pool)} pairs written to {printable(options.output)}")
