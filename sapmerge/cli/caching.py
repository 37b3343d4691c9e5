"""`sapmerge cache merge`: caches of several machines as one."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from typing import Any

from sapmerge.errors import SapmergeWarning, printable

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns the parsers of its actions."""
    parser = commands.add_parser(
        "cache", help="caches of anchors' statistics", description="Caches of anchors' statistics."
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    merge = actions.add_parser(
        "merge",
        help="copy what other machines have scored into one cache",
        description="Copy what caches of other machines have into one, checked result by result.",
        epilog="example: sapmerge cache merge kept node-1/kept node-2/kept",
    )
    merge.add_argument("target", metavar="INTO", help="a cache, made if it does not exist")
    merge.add_argument("sources", nargs="+", metavar="FROM", help="folders that `score` has filled")
    merge.add_argument("--json", action="store_true", help="data instead of a line")
    merge.set_defaults(run=_merge)
    return [merge]


def _merge(options: argparse.Namespace) -> None:
    from sapmerge.anchors.cache import LOSSES
    from sapmerge.io.cache import gather

    done = gather(options.target, options.sources, ("", LOSSES))
    for what, paths in (
        ("is damaged and left out", done.damaged),
        ("has other numbers than the one that is there, which is kept", done.different),
    ):
        for path in paths:
            warnings.warn(f"{path!r} {what}", SapmergeWarning, stacklevel=2)
    if options.json:
        print(json.dumps(asdict(done), indent=2))
    else:
        print(f"{done.copied} results copied into {printable(options.target)}, {done.there} there")
