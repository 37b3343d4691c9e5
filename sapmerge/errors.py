"""Every error and warning of sapmerge. A message says what is wrong, where,
what was expected and what to do.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "AdapterConfigError",
    "AdapterFormatError",
    "AdapterSecurityError",
    "AnchorError",
    "IncompatibleAdaptersError",
    "InputChangedError",
    "LimitExceededError",
    "MethodError",
    "ModelMismatchError",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "RoundError",
    "SapmergeError",
    "SapmergeWarning",
    "not_one_of",
    "printable",
    "warn",
    "warn_afterwards",
]


_LONGEST = 2000
_OURS = ("sapmerge", "contextlib")  # and what stands between its functions and their callers


class SapmergeError(Exception):
    """Base of every error that sapmerge raises on purpose.

    Text from untrusted files may be in a message: control characters are shown as escapes,
    and a long message is cut.
    """

    def __init__(self, message: str) -> None:
        text = printable(" ".join(message.split()))
        super().__init__(text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ...")


class SapmergeWarning(UserWarning):
    """Something the user should know, and that does not make the result wrong."""


class AdapterFormatError(SapmergeError):
    """The files of an adapter are not what they should be (container, tensor names,
    shapes, dtypes).
    """


class AdapterConfigError(SapmergeError):
    """`adapter_config.json` cannot be read, contradicts the tensors,
    or asks for something unsupported.
    """


class AdapterSecurityError(SapmergeError):
    """The input would need code, a network, or a file outside the adapter to be read."""


class LimitExceededError(SapmergeError):
    """The input is larger, deeper or slower than the limits allow."""


class InputChangedError(SapmergeError):
    """A file changed between the moment it was opened and the moment it was read."""


class IncompatibleAdaptersError(SapmergeError):
    """The adapters cannot be merged with each other."""


class ModelMismatchError(SapmergeError):
    """The model has no such module, or one of another shape."""


class MethodError(SapmergeError, ValueError):
    """A method, a primitive or an argument of `merge` has a wrong value."""


class AnchorError(SapmergeError):
    """The anchors or the loss cannot be used."""


class NonFiniteError(SapmergeError):
    """A NaN or an infinity, with the adapter and the layer it was found in."""


class OutputError(SapmergeError):
    """The output could not be written; nothing was changed."""


class OutputExistsError(OutputError):
    """The output already exists and `overwrite=True` was not given."""


class RoundError(SapmergeError):
    """A federated round cannot go on: its folder is damaged or of another round,
    or too few clients are there.
    """


def printable(text: str) -> str:
    """The text with control characters as escapes:
    text from untrusted files must not steer a terminal.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def not_one_of(what: str, value: object, allowed: Iterable[str]) -> str:
    """What an error says of a value that is none of those allowed, with the nearest of them."""
    from difflib import get_close_matches

    names, text = list(allowed), str(value)
    close = get_close_matches(text, names, 1, 0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{what} is one of {', '.join(names)}; got {printable(text[:80])!r}{hint}"


def warn(message: str) -> None:
    """A `SapmergeWarning` at the caller's own line, however deep in the library it is noticed."""
    level, frame = 1, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SapmergeWarning, stacklevel=level)


def warn_afterwards(message: str) -> None:
    """Warn of something when the work is done: nothing may raise any more,
    not even a warning made an error.
    """
    try:
        warn(message)
    except Exception:
        logging.getLogger("sapmerge").warning(message)
