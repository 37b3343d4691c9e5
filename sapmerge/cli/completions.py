"""What may be typed, as scripts that complete it in bash, zsh and fish."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Command", "Flag", "bash", "fish", "zsh"]


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        choices: what its value may be; empty where that is anything.
        takes: whether it has a value.
        help: one line.
    """

    choices: tuple[str, ...]
    takes: bool
    help: str


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        path: its words, without the program's name.
        actions: name -> what it does, of the commands below it.
        flags: by the way they are typed.
        words: what may stand where no flag does; empty for files.
    """

    path: tuple[str, ...]
    actions: Mapping[str, str]
    flags: Mapping[str, Flag]
    words: tuple[str, ...]


def bash(commands: Sequence[Command]) -> str:
    """A script for bash, since 3.2, without the package bash-completion."""

    def case(path: str, answers: Iterable[str]) -> str:
        lines = shlex.quote("\n".join(answers))
        return f'        "{path}") answers={lines} ;;'

    top, *rest = commands
    first = shlex.quote("\n".join((*top.actions, *top.flags)))
    nested = [case(c.path[0], (*c.actions, *c.flags)) for c in rest if c.actions]
    values = [
        case(f"{' '.join(c.path)} {name}", flag.choices)
        for c in rest
        for name, flag in c.flags.items()
        if flag.choices
    ]
    flags = [case(" ".join(c.path), c.flags) for c in rest if not c.actions]
    words = [case(" ".join(c.path), c.words) for c in rest if c.words]
    return f"""_sapmerge() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    local command="${{COMP_WORDS[1]}}" answers="" at=1 one IFS=$'\\n'
    if [ "$current" = "=" ]; then
        current=""
    elif [ "$previous" = "=" ]; then
        previous="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    case "$command" in
{_lines(nested)}
    esac
    if [ -n "$answers" ]; then
        at=2
        command="$command ${{COMP_WORDS[2]}}"
    fi
    if [ "$COMP_CWORD" -eq 1 ]; then
        answers={first}
    elif [ "$COMP_CWORD" -gt "$at" ]; then
        answers=""
        case "$command $previous" in
{_lines(values)}
        *)
            if [ "${{current#-}}" != "$current" ]; then
                case "$command" in
{_lines(flags, 8)}
                esac
            else
                case "$command" in
{_lines(words, 8)}
                esac
            fi ;;
        esac
    fi
    COMPREPLY=()
    for one in $answers; do
        case "$one" in "$current"*) COMPREPLY+=("$(printf %q "$one")") ;; esac
    done
}}
complete -o default -F _sapmerge sapmerge
"""


def zsh(commands: Sequence[Command]) -> str:
    """A script for zsh: to `eval`, or as the file `_sapmerge` of a folder in `fpath`."""

    def case(path: str, answers: Iterable[str]) -> str:
        return f"        ({shlex.quote(path)}) answers=({' '.join(map(shlex.quote, answers))}) ;;"

    def told(texts: Mapping[str, str]) -> list[str]:
        return [f"{name}:{_one_line(text)}" if text else name for name, text in texts.items()]

    def flags_of(command: Command) -> list[str]:
        return told({name: flag.help for name, flag in command.flags.items()})

    top, *rest = commands
    nested = [case(c.path[0], told(c.actions)) for c in rest if c.actions]
    values = [
        case(f"{' '.join(c.path)} {name}", flag.choices)
        for c in rest
        for name, flag in c.flags.items()
        if flag.choices
    ]
    flags = [case(" ".join(c.path), flags_of(c)) for c in rest]
    words = [case(" ".join(c.path), c.words) for c in rest if c.words]
    first, second = (" ".join(map(shlex.quote, of)) for of in (told(top.actions), flags_of(top)))
    return f"""#compdef sapmerge
_sapmerge() {{
    local current=$words[CURRENT] previous=$words[CURRENT-1] command=$words[2]
    local -a answers
    if (( CURRENT == 2 )); then
        [[ $current == -* ]] && answers=({second}) || answers=({first})
        _describe command answers
        return
    fi
    case $command in
{_lines(nested)}
    esac
    if (( $#answers )); then
        if (( CURRENT == 3 )) && [[ $current != -* ]]; then
            _describe action answers
            return
        fi
        answers=()
        (( CURRENT == 3 )) || command="$command $words[3]"
    fi
    if [[ $current == --*=* ]]; then
        previous=${{current%%=*}}
        compset -P '*='
        current=$PREFIX
    fi
    case "$command $previous" in
{_lines(values)}
    esac
    if (( ! $#answers )) && [[ $current == -* ]]; then
        case $command in
{_lines(flags)}
        esac
        _describe -o option answers
        return
    fi
    if (( ! $#answers )); then
        case $command in
{_lines(words)}
        esac
    fi
    if (( $#answers )); then
        compadd -a answers
    else
        _files
    fi
}}
if [[ $funcstack[1] == _sapmerge ]]; then
    _sapmerge "$@"
else
    (( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
    compdef _sapmerge sapmerge
fi
"""


def fish(commands: Sequence[Command]) -> str:
    """A script for fish, since 3.0."""
    lines = [
        "function __sapmerge_in",
        "    set -l typed (commandline -opc)",
        "    test (count $typed) -gt (count $argv); or return 1",
        "    set -q argv[1]; or return 0",
        "    set -l last (math (count $argv) + 1)",
        '    test "$typed[2..$last]" = "$argv"',
        "end",
        "function __sapmerge_next",
        "    test (count (commandline -opc)) -eq (math (count $argv) + 1); and __sapmerge_in $argv",
        "end",
    ]
    for command in commands:
        path = " ".join(command.path)
        here = _fish(f"__sapmerge_{'next' if command.actions else 'in'} {path}".strip())
        for name, text in command.actions.items():
            lines.append(f"complete -c sapmerge -n {here} -xa {name} -d {_fish(_one_line(text))}")
        if command.words:
            lines.append(f"complete -c sapmerge -n {here} -xa {_fish(_listed(command.words))}")
        for name, flag in command.flags.items():
            kind = f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
            given = f" -xa {_fish(_listed(flag.choices))}" if flag.choices else " -r" * flag.takes
            said = f" -d {_fish(_one_line(flag.help))}" if flag.help else ""
            lines.append(f"complete -c sapmerge -n {here} {kind}{given}{said}")
    return "\n".join(lines) + "\n"


def _listed(words: Iterable[str]) -> str:
    """Words of fish, whose spaces are no ends."""
    return " ".join(re.sub(r"([^\w.-])", r"\\\1", word) for word in words)


def _fish(text: str) -> str:
    """One word of fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lines(lines: Iterable[str], further: int = 0) -> str:
    return "\n".join(" " * further + line for line in lines)
