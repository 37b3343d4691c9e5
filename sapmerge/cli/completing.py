"""`sapmerge completion`: a script for the shell, made of the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, cast

from sapmerge.cli.catalogue import catalogue
from sapmerge.cli.completions import Command, Flag, bash, fish, zsh

__all__ = ["add_to"]

_SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "completion",
        help="completion for bash, zsh or fish",
        description="Print a script that completes commands, flags and what they may be.",
        epilog='example: eval "$(sapmerge completion bash)"',
    )
    parser.add_argument("shell", choices=tuple(_SCRIPTS))
    parser.set_defaults(run=_complete)
    return [parser]


def _complete(options: argparse.Namespace) -> None:
    print(_SCRIPTS[options.shell](list(_commands(options.program, ()))), end="")


def _commands(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[Command]:
    """A parser and all commands below it, this one first."""
    below, flags, words = dict[str, argparse.ArgumentParser](), dict[str, Flag](), list[str]()
    actions = cast("list[Any]", parser._actions)  # pyright: ignore[reportPrivateUsage] (there is no other list)
    for action in actions:
        choices: Any = action.choices or ()
        if not action.option_strings and hasattr(choices, "values"):  # commands, by name
            below |= cast("Mapping[str, argparse.ArgumentParser]", choices)
        elif not action.option_strings:
            words += catalogue() if path == ("methods",) else choices
        for name in action.option_strings:
            allowed = catalogue() if name == "--method" else choices
            said = (action.help or "") % {**vars(action), "prog": parser.prog}
            flags[name] = Flag(tuple(map(str, allowed)), action.nargs != 0, said)
    told = {name: one.description or "" for name, one in below.items()}
    yield Command(path, told, flags, tuple(map(str, words)))
    for name, one in below.items():
        yield from _commands(one, (*path, name))
