"""`sapmerge inspect`."""

from __future__ import annotations

import argparse
import json
from typing import Any

import sapmerge
from sapmerge.cli.arguments import adapters_of

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    look = commands.add_parser(
        "inspect", help="describe and compare adapters", description="Describe adapters."
    )
    look.add_argument("adapters", nargs="+", metavar="ADAPTER")
    look.add_argument("--json", action="store_true", help="data instead of tables")
    look.set_defaults(run=_inspect)
    return [look]


def _inspect(options: argparse.Namespace) -> None:
    found = sapmerge.inspect(adapters_of(options.adapters))
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
