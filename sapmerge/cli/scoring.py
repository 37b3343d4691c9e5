"""`sapmerge score`: one machine's share of the passes that a merge needs."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, cast

from sapmerge.cli.arguments import adapters_of, add_reading_options, weights_of
from sapmerge.cli.recipes import imported, method_of
from sapmerge.errors import MethodError

__all__ = ["SETUP", "add_to", "setup_of"]

SETUP = "module:function of yours, () -> (anchors, model) or (anchors, model, loss)"


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "score",
        help="fill the cache of a merge",
        description="Run the anchors' passes of some adapters; `merge --cache-only` reads them.",
        epilog="example: sapmerge score art sketch --setup mine:setup --cache kept --shard 0/2",
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="all of the merge, in any order"
    )
    parser.add_argument("--setup", required=True, help=SETUP)
    parser.add_argument("--cache", required=True, metavar="DIR", help="where all shards write")
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="this one of N, from 0/N to N-1/N; 0/1, the default, is what is missing",
    )
    parser.add_argument(
        "--method", default="sap", help="as in `sapmerge merge` (default: %(default)s)"
    )
    parser.add_argument("--density", type=float, help="fraction kept, in (0, 1]")
    parser.add_argument("--seed", type=int, help="of methods that draw random masks")
    parser.add_argument("--weights", help="those of the merge")
    add_reading_options(parser)
    parser.add_argument("--json", action="store_true", help="data instead of a line")
    parser.add_argument("--quiet", action="store_true", help="no progress, no line")
    parser.set_defaults(run=_score)
    return [parser]


def setup_of(text: str) -> tuple[Any, Any, Any]:
    """The anchors, the model and perhaps the loss (else None) that a function of the user's makes.

    Raises:
        MethodError: it cannot be imported, or gives something else.
    """
    made = imported(text)()
    if not isinstance(made, tuple) or len(cast("tuple[Any, ...]", made)) not in (2, 3):
        raise MethodError(
            f"--setup {text}: it has to return (anchors, model) or one more, the loss"
        )
    anchors, model, loss = (*cast("tuple[Any, ...]", made), None)[:3]
    return anchors, model, loss


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"I/N, as in 3/16; got {text!r}")
    return int(found[1]), int(found[2])


def _score(options: argparse.Namespace) -> None:
    from sapmerge.federated.shards import score

    method = method_of(options.method, {"density": options.density, "seed": options.seed})
    adapters, weights = adapters_of(options), weights_of(options.weights)
    anchors, model, loss = setup_of(options.setup)
    whole = score(
        adapters,
        anchors,
        model,
        method,
        cache=options.cache,
        shard=options.shard,
        weights=weights,
        loss=loss,
        progress=False if options.quiet else None,
    )
    number, count = options.shard
    if options.json:
        print(json.dumps({"shard": number, "of": count, "complete": whole}))
    elif not options.quiet:
        print(
            "the cache has what the merge needs"
            if whole
            else f"shard {number}/{count} is done; the cache lacks what others run"
        )
