"""`sapmerge methods`."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from sapmerge.methods import anchored
from sapmerge.named import ALIASES, factory_of, names

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
    if options.name is not None:
        described = _described(options.name)
        print(json.dumps(described, indent=2) if options.json else _page(described))
        return
    every = [_described(name) for name in names()]
    if options.json:
        print(json.dumps(every, indent=2))
        return
    rows = [(one["name"], "anchors" if one["anchors"] else "", one["summary"]) for one in every]
    width = max(len(row[0]) for row in rows)
    for name, needs, summary in rows:
        print(f"{name:<{width}}  {needs:<7}  {summary}")
    print("\nalso called: " + ", ".join(f"{alias} ({real})" for alias, real in ALIASES.items()))
    print("`sapmerge methods NAME` describes one; those with anchors need --anchors and --model")


def _described(name: str) -> dict[str, Any]:
    factory = factory_of(name)
    text = inspect.getdoc(factory) or ""
    taken = inspect.signature(factory).parameters.values()
    return {
        "name": factory.__name__,
        "anchors": factory.__name__ in anchored.__all__,
        "summary": " ".join(text.split("\n\n")[0].split()),
        "arguments": {p.name: None if p.default is p.empty else repr(p.default) for p in taken},
        "aliases": [alias for alias, real in ALIASES.items() if real == factory.__name__],
        "text": text,
    }


def _page(one: dict[str, Any]) -> str:
    given = [f"{key}={value}" if value else key for key, value in one["arguments"].items()]
    lines = [f"{one['name']}({', '.join(given)})", "", one["text"]]
    if one["aliases"]:
        lines += ["", f"also called {', '.join(one['aliases'])}"]
    flags = [f"--{key}" for key in ("density", "seed") if key in one["arguments"]]
    command = f"sapmerge merge A B -o OUT --method {one['name']}"
    if one["anchors"]:
        command += " --anchors DIR --model BASE"
    if flags:
        command += "".join(f" [{flag} ...]" for flag in flags)
    return "\n".join([*lines, "", f"from the shell: {command}"])
