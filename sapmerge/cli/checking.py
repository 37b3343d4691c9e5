"""`sapmerge check`, `sapmerge verify` and `sapmerge reproduce`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from sapmerge.cli.choices import ENGINES
from sapmerge.cli.hub import add_hub_option, local
from sapmerge.cli.models import add_model_options, anchors_of, loss_of, model_of
from sapmerge.cli.recipes import imported
from sapmerge.errors import OutputError

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the commands; returns their parsers."""
    serve = commands.add_parser(
        "check",
        help="whether an engine serves an adapter",
        description="Check an adapter.",
        epilog="example: sapmerge check merged --serving vllm",
    )
    serve.add_argument("adapter", help="folder of any PEFT LoRA adapter, or hf://user/name")
    serve.add_argument("--serving", required=True, choices=ENGINES, help="the engine")
    serve.set_defaults(run=_check)

    check = commands.add_parser(
        "verify",
        help="check an output against its digests",
        description="Check an output.",
        epilog="example: sapmerge verify merged --inputs art sketch",
    )
    check.add_argument("output", help="folder that sapmerge wrote, or hf://user/name")
    check.add_argument(
        "--inputs", nargs="+", default=[], metavar="ADAPTER", help="what it was made from"
    )
    check.set_defaults(run=_verify)

    again = commands.add_parser(
        "reproduce",
        help="merge again and compare bits",
        description="Run the stored recipe.",
        epilog="example: sapmerge reproduce merged --inputs art sketch",
    )
    again.add_argument("output", help="folder that sapmerge wrote, or hf://user/name")
    again.add_argument(
        "--inputs", nargs="+", required=True, metavar="ADAPTER", help="what it was made from"
    )
    again.add_argument(
        "--use",
        nargs="+",
        default=[],
        metavar="MODULE:FUNCTION",
        help="your functions in the recipe",
    )
    add_model_options(again)
    again.set_defaults(run=_reproduce)
    for parser in (serve, check, again):
        add_hub_option(parser)
        parser.add_argument("--json", action="store_true", help="data instead of a line")
    return [serve, check, again]


def _check(options: argparse.Namespace) -> None:
    from sapmerge.io.engines import ENGINES
    from sapmerge.merging import serving

    title = ENGINES[options.serving].title
    _report_problems(
        serving.check(local(options.adapter, options), options.serving),
        f"{title} serves it as PEFT does, by its source",
        options,
    )


def _verify(options: argparse.Namespace) -> None:
    from sapmerge.merging import verification

    problems = verification.verify(
        local(options.output, options), [local(one, options) for one in options.inputs]
    )
    what = "config, weights and inputs" if options.inputs else "config and weights"
    _report_problems(
        problems,
        f"{what} have the digests in the output's metadata. That its recipe gives these weights "
        "is a claim: `sapmerge reproduce` proves it",
        options,
    )


def _reproduce(options: argparse.Namespace) -> None:
    from sapmerge.merging import verification

    functions = {name: imported(name) for name in options.use}
    anchors = anchors_of(options)
    folder = anchors is None and (options.model is None or os.path.isdir(options.model))
    problems = verification.reproduce(
        local(options.output, options),
        [local(one, options) for one in options.inputs],
        functions,
        options.model if folder else model_of(options),
        anchors,
        loss_of(options),
        options.device,
    )
    _report_problems(problems, "the same bits again", options)


def _report_problems(problems: Sequence[str], fine: str, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps({"problems": list(problems)}, indent=2))
        raise SystemExit(2 if problems else 0)
    if problems:
        raise OutputError("; ".join(problems))
    print(fine)
