"""The command line: `sapmerge merge`, `inspect`, `verify`, `reproduce`, `round`, `demo`.

Errors are one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn, cast

import sapmerge
from sapmerge import contrib, methods
from sapmerge.core.protocols import Method
from sapmerge.errors import MethodError, OutputError, SapmergeError, SapmergeWarning, printable
from sapmerge.federated.commands import add_commands
from sapmerge.merging import verification
from sapmerge.merging.spelling import CHOICES

__all__ = ["main"]

_IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, or 2 for an error that is the user's to mend)."""
    _print_in_any_encoding()
    options = _parser().parse_args(arguments)
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
            text = str(error)
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


def _print_in_any_encoding() -> None:
    """Letters that the terminal's encoding lacks are printed as escapes:
    a finished merge must not end as an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sapmerge: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sapmerge", description="Merge LoRA adapters.")
    parser.add_argument("--version", action="version", version=sapmerge.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    merge = commands.add_parser(
        "merge", help="merge adapters into one", description="Merge adapters into one."
    )
    merge.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="folder of a PEFT LoRA adapter, or label=folder",
    )
    merge.add_argument("-o", "--output", required=True, help="folder to write")
    merge.add_argument(
        "--method",
        required=True,
        help=f"{', '.join(methods.__all__)}; a recipe; or module:function",
    )
    merge.add_argument("--density", type=float, help="fraction kept, in (0, 1]")
    merge.add_argument("--seed", type=int, help="of methods that draw random masks")
    merge.add_argument("--weights", help="one number per adapter: --weights=1,0.5,-1")
    merge.add_argument("--scale", type=float, default=1.0, help="multiplies the merged update")
    merge.add_argument(
        "--rank", type=_rank, help="cap on the rank, share of energy in (0, 1), or 'exact'"
    )
    merge.add_argument(
        "--modules-to-save", help="heads: mean, first, drop, or module=adapter[,module=adapter]"
    )
    merge.add_argument("--base-model", help="the base model the output is for")
    merge.add_argument(
        "--names",
        choices=CHOICES,
        help="how the output spells its modules: as the adapters do, or ...",
    )
    merge.add_argument("--overwrite", action="store_true", help="replace an existing output")
    merge.add_argument("--quiet", action="store_true", help="no progress, no report")
    merge.set_defaults(run=_merge)

    look = commands.add_parser(
        "inspect", help="describe and compare adapters", description="Describe adapters."
    )
    look.add_argument("adapters", nargs="+", metavar="ADAPTER")
    look.add_argument("--json", action="store_true", help="data instead of tables")
    look.set_defaults(run=_inspect)

    check = commands.add_parser(
        "verify", help="check an output against its digests", description="Check an output."
    )
    check.add_argument("output", help="folder that sapmerge wrote")
    check.add_argument(
        "--inputs", nargs="+", default=[], metavar="DIR", help="the adapters it was made from"
    )
    check.set_defaults(run=_verify)

    again = commands.add_parser(
        "reproduce", help="merge again and compare bits", description="Run the stored recipe."
    )
    again.add_argument("output", help="folder that sapmerge wrote")
    again.add_argument(
        "--inputs", nargs="+", required=True, metavar="DIR", help="the adapters it was made from"
    )
    again.add_argument(
        "--use",
        nargs="+",
        default=[],
        metavar="MODULE:FUNCTION",
        help="your functions in the recipe",
    )
    again.set_defaults(run=_reproduce)

    demo = commands.add_parser(
        "demo", help="the mission in small, in about a minute", description="Train, merge, compare."
    )
    demo.add_argument(
        "-o", "--output", default="sapmerge-demo", help="folder to write (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    for command in (merge, look, check, again, demo, *add_commands(commands, _method, _rank)):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sapmerge: warning: {printable(str(message))}", file=sys.stderr)


def _merge(options: argparse.Namespace) -> None:
    merged = sapmerge.merge(
        _adapters(options.adapters),
        method=_method(options.method, {"density": options.density, "seed": options.seed}),
        weights=_weights(options.weights),
        scale=options.scale,
        rank=options.rank,
        modules_to_save=_policy(options.modules_to_save),
        base_model=options.base_model,
        progress=False if options.quiet else None,
    )
    merged.save_pretrained(options.output, overwrite=options.overwrite, names=options.names)
    if not options.quiet:
        print(f"{merged.report}\n\nwritten to {printable(options.output)}")


def _inspect(options: argparse.Namespace) -> None:
    found = sapmerge.inspect(_adapters(options.adapters))
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)


def _verify(options: argparse.Namespace) -> None:
    problems = verification.verify(options.output, options.inputs)
    what = "config, weights and inputs" if options.inputs else "config and weights"
    _report_problems(
        problems,
        f"{what} have the digests in the output's metadata. That its recipe gives these weights is "
        "a claim: "
        "`sapmerge reproduce` proves it",
    )


def _reproduce(options: argparse.Namespace) -> None:
    functions = {name: _imported(name) for name in options.use}
    _report_problems(
        verification.reproduce(options.output, options.inputs, functions), "the same bits again"
    )


def _report_problems(problems: Sequence[str], fine: str) -> None:
    if problems:
        raise OutputError("; ".join(problems))
    print(fine)


def _demo(options: argparse.Namespace) -> None:
    from sapmerge.demo import run

    print(
        run(Path(options.output), seed=options.seed, say=lambda line: print(line, file=sys.stderr))
    )


def _adapters(arguments: Sequence[str]) -> Any:
    """Folders, or label=folder for all of them; what exists as it is written is a folder."""
    pairs = [argument.partition("=") for argument in arguments]
    if not any(map(os.path.lexists, arguments)) and all(
        separator and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", label) for label, separator, _ in pairs
    ):
        labels = [label for label, _, _ in pairs]
        repeated = [label for label in labels if labels.count(label) > 1]
        if repeated:
            raise MethodError(f"two adapters have the label {repeated[0]!r}")
        return {label: folder for label, _, folder in pairs}
    return list(arguments)


def _method(text: str, given: dict[str, Any]) -> Method:
    """A name of `methods.__all__`, a recipe, or module:function that the user wrote and so allowed
    to be imported.
    """
    options = {key: value for key, value in given.items() if value is not None}
    names = [*methods.__all__, *(name for name in contrib.__all__ if name.islower())]
    if text in names:
        factory = cast(
            "Callable[..., Method]", getattr(methods if text in methods.__all__ else contrib, text)
        )
        unknown = sorted(set(options) - set(signature(factory).parameters))
        if unknown:
            known = ", ".join(signature(factory).parameters) or "no arguments"
            raise MethodError(f"the method {text!r} has no {unknown[0]}; it takes {known}")
        missing = [
            p.name
            for p in signature(factory).parameters.values()
            if p.default is p.empty and p.name not in options
        ]
        if missing:
            raise MethodError(
                f"the method {text!r} needs {missing[0]}; it takes {signature(factory)}"
            )
        return factory(**options)
    if options:
        raise MethodError(
            f"--{next(iter(options))} goes with a method's name; write it into {text!r} instead"
        )
    if _IMPORTABLE.fullmatch(text):
        return _imported(text)
    if "(" not in text:
        close = get_close_matches(text.lower(), names, 1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        raise MethodError(f"there is no method {text!r}; {hint} methods are {', '.join(names)}")
    functions = {name: _imported(name) for name in _strings(text) if _IMPORTABLE.fullmatch(name)}
    return sapmerge.parse(text, functions)


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a function in a file of the working folder, as with python -m
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # importing runs the user's code: anything can go wrong there
        raise MethodError(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise MethodError(f"{name!r} is not a function")
    return found


def _strings(text: str) -> list[str]:
    """The string literals of a recipe; an unreadable one has none,
    and `parse` says what is wrong with it.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def _policy(text: str | None) -> Any:
    if text is None or "=" not in text:
        return text
    return {module: label for module, _, label in (pair.partition("=") for pair in text.split(","))}


def _rank(text: str) -> int | float | str:
    if text == "exact":
        return text
    try:
        return int(text) if re.fullmatch(r"\d+", text) else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a number, a share in (0, 1) or 'exact'; got {text!r}"
        ) from None


def _weights(text: str | None) -> list[float] | dict[str, float] | None:
    """1,0.5 in the order of the adapters, or label=1,label=0.5."""
    if text is None:
        return None
    pairs = [entry.partition("=") for entry in text.split(",")]
    if all(separator for _, separator, _ in pairs):
        return {label: _number(number) for label, _, number in pairs}
    return [_number(entry) for entry in text.split(",")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"--weights takes numbers separated by commas; got {text!r}") from None
