"""`sapmerge completion`: a script for the shell, made of the parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any, cast

from sapmerge.cli.catalogue import catalogue

__all__ = ["add_to"]


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
    print(_SCRIPTS[options.shell](_words_of(options.program, ())), end="")


Words = Mapping[tuple[str, ...], Mapping[str, tuple[str, ...]]]
"""Command -> what may follow: names of actions (and then ""), flags, each with its choices."""


def _words_of(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> dict[Any, Any]:
    """All commands below a parser, this one first."""
    found: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {path: {}}
    actions = cast("list[Any]", parser._actions)  # pyright: ignore[reportPrivateUsage] (there is no other list)
    for action in actions:
        flags: list[str] = action.option_strings
        choices: Any = action.choices or ()
        if not flags and hasattr(choices, "values"):  # commands, by name
            below = cast("Mapping[str, argparse.ArgumentParser]", choices)
            found[path][""] = tuple(below)
            for name, one in below.items():
                found |= _words_of(one, (*path, name))
        for flag in flags:
            allowed = catalogue() if flag == "--method" else choices
            found[path][flag] = tuple(map(str, allowed))
    return found


def _bash(words: Words) -> str:
    nested = [path for path in words if len(path) == 1 and "" in words[path]]
    cases = "\n".join(
        f'        "{" ".join((*path, flag))}") choices={shlex.quote(" ".join(choices))} ;;'
        for path, flags in words.items()
        for flag, choices in flags.items()
        if flag and choices
    )
    flags = "\n".join(
        f'        "{" ".join(path)}") choices={shlex.quote(" ".join(filter(None, flags)))} ;;'
        for path, flags in words.items()
        if path
    )
    actions = "\n".join(
        f'        "{path[0]}") actions={shlex.quote(" ".join(words[path][""]))} ;;'
        for path in nested
    )
    first = shlex.quote(" ".join((*words[()][""], "--help", "--version")))
    return f"""_sapmerge() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="${{COMP_WORDS[1]}}" actions="" choices=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {first} -- "$current"))
        return
    fi
    case "$command" in
{actions}
    esac
    if [ -n "$actions" ] && [ "$COMP_CWORD" -eq 2 ]; then
        COMPREPLY=($(compgen -W "$actions" -- "$current"))
        return
    fi
    [ -n "$actions" ] && command="$command ${{COMP_WORDS[2]}}"
    case "$command $previous" in
{cases}
    esac
    if [ -z "$choices" ] && [ "${{current#-}}" != "$current" ]; then
        case "$command" in
{flags}
        esac
    fi
    [ -n "$choices" ] && COMPREPLY=($(compgen -W "$choices" -- "$current"))
}}
complete -o default -F _sapmerge sapmerge
"""


def _zsh(words: Words) -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(words)}"


def _fish(words: Words) -> str:
    lines = list[str]()
    for path, flags in words.items():
        seen = "".join(f"__fish_seen_subcommand_from {name}; and " for name in path)
        for flag, choices in flags.items():
            if not flag:
                fresh = f"not __fish_seen_subcommand_from {' '.join(choices)}"
                lines.append(f"complete -c sapmerge -n '{seen}{fresh}' -xa '{' '.join(choices)}'")
                continue
            condition = seen.removesuffix("; and ") or "__fish_use_subcommand"
            kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            given = f" -xa '{' '.join(choices)}'" if choices else ""
            lines.append(f"complete -c sapmerge -n '{condition}' {kind}{given}")
    return "\n".join(lines) + "\n"


_SCRIPTS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
