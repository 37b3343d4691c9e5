"""All commands, in groups, and the parser made of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn

from sapmerge.cli import (
    caching,
    checking,
    choosing,
    clients,
    comparing,
    completing,
    converting,
    listing,
    looking,
    merging,
    rounds,
    scoring,
    showing,
)
from sapmerge.version import __version__

__all__ = ["parser"]

_GROUPS: Mapping[str, Sequence[ModuleType]] = {
    "merge and compare": (merging, comparing, listing),
    "look at adapters": (looking, checking),
    "anchors": (choosing, scoring, caching),
    "federated rounds": (rounds, clients),
    "files of others, and help": (converting, showing, completing),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sapmerge: {message}; see {self.prog} --help\n")


@dataclass
class _Recorded:
    """Where a module adds its commands; says which they were."""

    commands: Any
    rows: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add_parser(self, name: str, *, help: str, **options: Any) -> argparse.ArgumentParser:
        self.rows.append((name, help))
        return self.commands.add_parser(name, **options)  # without help: the groups have it


def parser() -> argparse.ArgumentParser:
    """The parser of the whole program."""
    top = _Parser(
        prog="sapmerge",
        description="Merge LoRA adapters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.set_defaults(program=top)  # for `completion`
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", help="one of those below")
    lines = list[str]()
    for title, modules in _GROUPS.items():
        recorded = _Recorded(commands)
        for module in modules:
            for command in module.add_to(recorded):
                command.add_argument(
                    "--debug", action="store_true", help="show the traceback of an error"
                )
        lines += ["", f"{title}:", *(f"  {name:<11} {what}" for name, what in recorded.rows)]
    top.epilog = "\n".join([*lines[1:], "", "`sapmerge COMMAND --help` has an example of each"])
    return top
