"""`sapmerge inspect`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import sapmerge
from sapmerge.cli.arguments import adapters_of, add_reading_options
from sapmerge.cli.pages import add_page, save_page
from sapmerge.display.tables import Look

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    look = commands.add_parser(
        "inspect",
        help="describe and compare adapters",
        description="Describe adapters.",
        epilog="example: sapmerge inspect art sketch --html look.html",
    )
    look.add_argument("adapters", nargs="+", metavar="ADAPTER")
    look.add_argument("--json", action="store_true", help="data instead of tables")
    add_page(look)
    add_reading_options(look)
    look.set_defaults(run=_inspect)
    return [look]


def _inspect(options: argparse.Namespace) -> None:
    found = sapmerge.inspect(adapters_of(options))
    look = Look.of(sys.stdout)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.to_text(look))
    save_page(options, found.plot)
