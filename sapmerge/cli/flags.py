"""What the library says in Python, said in flags."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["in_flags", "with_negative_numbers"]

_FIXED = (
    ("overwrite=True", "--overwrite"),
    ("sapmerge.Adapter.load(path, allow_pickle_weights=True)", "--allow-pickle"),
    ("allow_pickle=True", "--allow-pickle"),
    ("sapmerge.convert(source, output) makes", "`sapmerge convert` makes"),
    ("Adapter.from_hub('user/name')", "hf://user/name"),
    ("Use apply_to(model), which is lossless, or a larger rank", "Use a larger rank"),
    ("use Sum()", "use --method task_arithmetic"),
    ("use FactorSum()", "use --method task_arithmetic"),
    ("model= (or the folder it is saved in)", "--model FOLDER"),
)
_ARGUMENT = re.compile(
    r"(?<![\w(])(modules_to_save|base_model|names|model|rank|scale|cache|method|weights)="
    r"('[^']*'|\"[^\"]*\"|\{[^}]*\}|\.\.\.|[\w/-]+(?:\.\w+)*)"
)


def in_flags(text: str) -> str:
    """A message of the library, with flags for its arguments.

    Example:
        >>> in_flags("give another path, or overwrite=True; modules_to_save='drop' leaves it out")
        'give another path, or --overwrite; --modules-to-save drop leaves it out'
    """
    for python, flag in _FIXED:
        text = text.replace(python, flag)

    def flag_of(match: re.Match[str]) -> str:
        value = match[2].strip("'\"")
        flag = f"--{match[1].replace('_', '-')}"
        if value == "...":
            return flag
        if value.startswith("{"):  # {module: adapter}
            value = "module=adapter"
        return f"{flag} {value}"

    return _ARGUMENT.sub(flag_of, text)


def with_negative_numbers(arguments: Sequence[str]) -> list[str]:
    """`--weights -1,1` as `--weights=-1,1`: argparse takes what begins with a dash for a flag."""
    found = list[str]()
    for argument in arguments:
        if found and found[-1] in ("--weights", "--scale") and re.match(r"-[\d.]", argument):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found
