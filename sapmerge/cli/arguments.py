"""What is typed: adapters, weights, ranks, policies."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from sapmerge.cli.hub import SCHEME, add_hub_option, place_of, with_hub
from sapmerge.errors import MethodError

__all__ = [
    "adapters_of",
    "add_reading_options",
    "policy_of",
    "rank_of",
    "split_methods",
    "weights_of",
]


def add_reading_options(parser: Any) -> None:
    """What goes with adapters that are read."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read weights in .bin files, which you trust"
    )
    add_hub_option(parser)


def adapters_of(options: argparse.Namespace) -> Any:
    """Folders and hf://user/name@revision, or label=either for all of them; what exists as it is
    written is a folder.
    """
    arguments: list[str] = with_hub(options.adapters) if options.hub else options.adapters
    allow_pickle: bool = options.allow_pickle
    pairs = [argument.partition("=") for argument in arguments]
    if not any(map(os.path.lexists, arguments)) and all(
        separator and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", label) for label, separator, _ in pairs
    ):
        labels = [label for label, _, _ in pairs]
        repeated = [label for label in labels if labels.count(label) > 1]
        if repeated:
            raise MethodError(f"two adapters have the label {repeated[0]!r}")
        return {label: _adapter(folder, allow_pickle) for label, _, folder in pairs}
    odd = next((a for a in arguments if "=" in a and not os.path.lexists(a)), None)
    if odd is not None and not odd.startswith(SCHEME):
        raise MethodError(
            f"{odd!r} is no folder; label=folder is given for all adapters or for none, with 1 to "
            "64 letters, digits, '.', '_' and '-' in each label"
        )
    return [_adapter(argument, allow_pickle) for argument in arguments]


def _adapter(text: str, allow_pickle: bool) -> Any:
    if text.startswith(SCHEME):
        from sapmerge import Adapter

        repository, revision, subfolder = place_of(text)
        return Adapter.from_hub(repository, revision=revision, subfolder=subfolder)
    if allow_pickle:
        from sapmerge import Adapter

        return Adapter.load(text, allow_pickle_weights=True)
    return text


def policy_of(text: str | dict[str, str] | None) -> Any:
    """A policy for heads, or module=adapter,..."""
    if not isinstance(text, str) or "=" not in text:
        return text
    return {module: label for module, _, label in (pair.partition("=") for pair in text.split(","))}


def rank_of(text: str) -> int | float | str:
    if text == "exact":
        return text
    try:
        return int(text) if re.fullmatch(r"\d+", text) else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a number, a share in (0, 1) or 'exact'; got {text!r}"
        ) from None


def weights_of(text: str | list[float] | None) -> list[float] | dict[str, float] | None:
    """1,0.5 in the order of the adapters, or label=1,label=0.5."""
    if not isinstance(text, str):
        return text
    pairs = [entry.partition("=") for entry in text.split(",")]
    if all(separator for _, separator, _ in pairs):
        return {label: _number(number) for label, _, number in pairs}
    return [_number(entry) for entry in text.split(",")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"--weights takes numbers separated by commas; got {text!r}") from None


def split_methods(text: str) -> list[str]:
    """mean,ties(density=0.5) -> its parts: commas inside of parentheses and quotes separate
    nothing.
    """
    found, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            found.append("")
            continue
        if letter in "'\"":
            quote = "" if quote == letter else quote or letter
        elif not quote:
            depth += (letter in "([{") - (letter in ")]}")
        found[-1] += letter
    return [one.strip() for one in found if one.strip()]
