"""`sapmerge demo`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    demo = commands.add_parser(
        "demo",
        help="the mission in small, in about a minute and a half",
        description="Train, merge, compare.",
        epilog="example: sapmerge demo -o demo --seed 1",
    )
    demo.add_argument(
        "-o", "--output", default="sapmerge-demo", help="folder to write (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    demo.add_argument("--json", action="store_true", help="data instead of a table")
    demo.add_argument("--quiet", action="store_true", help="no progress, no table")
    demo.set_defaults(run=_demo)
    return [demo]


def _demo(options: argparse.Namespace) -> None:
    from sapmerge.demo import run

    found = run(
        Path(options.output),
        seed=options.seed,
        say=(lambda _: None) if options.quiet else (lambda line: print(line, file=sys.stderr)),
        progress=False if options.quiet else None,
        overwrite=options.overwrite,
    )
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
    elif not options.quiet:
        print(found)
