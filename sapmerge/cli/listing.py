"""`sapmerge methods`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from sapmerge.cli.catalogue import Described, catalogue
from sapmerge.method_names import ALIASES, factory_of

__all__ = ["add_to"]


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "methods",
        help="what methods there are",
        description="List the methods, or describe one.",
        epilog="example: sapmerge methods ties",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe this one")
    parser.add_argument("--json", action="store_true", help="data instead of a page")
    parser.set_defaults(run=_methods)
    return [parser]


def _methods(options: argparse.Namespace) -> None:
    every = catalogue()
    if options.name is not None:
        real = ALIASES.get(options.name, options.name)
        if real not in every:
            factory_of(real)  # the error, with the nearest name
        one = every[real]
        print(json.dumps(_data(one), indent=2) if options.json else _page(one))
        return
    if options.json:
        print(json.dumps([_data(one) for one in every.values()], indent=2))
        return
    width = max(map(len, every))
    for one in every.values():
        print(f"{one.name:<{width}}  {'anchors' if one.anchors else '':<7}  {one.summary}")
    print("\nalso called: " + ", ".join(f"{alias} ({real})" for alias, real in ALIASES.items()))
    print("`sapmerge methods NAME` describes one; those with anchors need --anchors and --model")


def _data(one: Described) -> dict[str, Any]:
    return {**asdict(one), "summary": one.summary, "aliases": one.aliases}


def _page(one: Described) -> str:
    given = [f"{key}={value}" if value else key for key, value in one.arguments.items()]
    lines = [f"{one.name}({', '.join(given)})", "", one.text]
    if one.aliases:
        lines += ["", f"also called {', '.join(one.aliases)}"]
    flags = [f"--{key}" for key in ("density", "seed") if key in one.arguments]
    command = f"sapmerge merge A B -o OUT --method {one.name}"
    if one.anchors:
        command += " --anchors DIR --model BASE"
    if flags:
        command += "".join(f" [{flag} ...]" for flag in flags)
    return "\n".join([*lines, "", f"from the shell: {command}"])
