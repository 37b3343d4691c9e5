"""What all commands share. Errors are one line on stderr and exit code 2."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Sequence

from sapmerge.cli.commands import parser
from sapmerge.cli.flags import in_flags, with_negative_numbers
from sapmerge.errors import SapmergeError, SapmergeWarning, printable

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, or 2 for an error that is the user's to mend)."""
    _have_streams()
    _print_in_any_encoding()
    options = parser().parse_args(
        with_negative_numbers(sys.argv[1:] if arguments is None else arguments)
    )
    warnings.simplefilter("always", SapmergeWarning)
    warnings.showwarning = _show_warning
    try:
        options.run(options)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # whoever reads had enough, as in `sapmerge ... | head`; what was asked for is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, SapmergeError):
            text = in_flags(str(error))
        else:  # of the user's own function, say
            text = (
                f"{type(error).__name__}: {printable(' '.join(str(error).split()))} (--debug "
                "shows where)"
            )
        print(f"sapmerge: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _have_streams() -> None:
    """A service, or `>&-` in a shell, may start a process without stdout or stderr: nobody reads
    what it says, and no file that it opens may take their number.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _print_in_any_encoding() -> None:
    """Letters that the terminal's encoding lacks are printed as escapes:
    a finished merge must not end as an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sapmerge: warning: {printable(in_flags(str(message)))}", file=sys.stderr)
