"""`sapmerge compare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import sapmerge
from sapmerge.cli.arguments import (
    adapters_of,
    add_reading_options,
    policy_of,
    split_methods,
    weights_of,
)
from sapmerge.cli.models import add_model_options, anchors_of, loss_of, model_of
from sapmerge.cli.recipes import imported, method_of

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "compare",
        help="which method is better on your data",
        description="Merge with several methods and evaluate each.",
        epilog="example: sapmerge compare art sketch --methods mean,ties,tsv --model base "
        "--evaluate mine:accuracy",
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="as in `sapmerge merge`")
    parser.add_argument(
        "--methods", required=True, help="names and recipes: mean,ties,ties(density=0.5)"
    )
    parser.add_argument(
        "--evaluate",
        required=True,
        metavar="MODULE:FUNCTION",
        help="model -> a number, one per sample, or a mapping",
    )
    parser.add_argument("--metric", help="the name the table goes by, where there are several")
    parser.add_argument("--minimize", action="store_true", help="less is better")
    parser.add_argument("--own-length", action="store_true", help="leave matched lengths out")
    parser.add_argument("--weights", help="one number per adapter: 1,0.5")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every merge")
    parser.add_argument("--modules-to-save", help="heads: mean, first, drop, or module=adapter")
    parser.add_argument("--base-model", help="the base, where adapters name different ones")
    parser.add_argument("--folder", help="keep results there, and go on from them")
    parser.add_argument("--plot", metavar="FILE", help="write a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="data instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    add_model_options(parser)
    add_reading_options(parser)
    parser.set_defaults(run=_compare)
    return [parser]


def _compare(options: argparse.Namespace) -> None:
    evaluate = imported(options.evaluate)
    methods = {text: method_of(text, {}) for text in split_methods(options.methods)}
    table = sapmerge.compare(
        adapters_of(options),
        methods,
        anchors_of(options),
        model_of(options),
        evaluate=evaluate,
        metric=options.metric,
        maximize=not options.minimize,
        matched=not options.own_length,
        weights=weights_of(options.weights),
        scale=options.scale,
        loss=loss_of(options),
        modules_to_save=policy_of(options.modules_to_save),
        base_model=options.base_model,
        device=options.device,
        folder=options.folder,
        progress=False if options.quiet else None,
    )
    if options.plot:
        table.plot(options.plot)
    print(json.dumps(table.to_dict(), indent=2) if options.json else table)
