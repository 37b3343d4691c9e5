"""`sapmerge convert`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sapmerge.cli.arguments import add_reading_options
from sapmerge.cli.choices import FORMATS
from sapmerge.cli.hub import ADAPTER, local
from sapmerge.errors import MethodError, printable

__all__ = ["add_to"]

# What is looked for in a repository of the Hub.
_OTHERS = ("adapters.safetensors", "pytorch_lora_weights.safetensors")
_PICKLES = ("adapter_model.bin", "adapter_model.pt")


def add_to(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the command; returns its parser."""
    parser = commands.add_parser(
        "convert",
        help="LoRA files of other programs, into PEFT folders and back",
        description="Convert LoRA files of kohya, diffusers, mlx-lm and torchtune to PEFT "
        "folders, and back, where that is exact.",
        epilog="example: sapmerge convert style.safetensors -o style",
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="a file or folder, whose format is found out, or hf://user/name; or PEFT folders of "
        "one pipeline, unet=FOLDER text_encoder=FOLDER",
    )
    parser.add_argument(
        "-o", "--output", required=True, help="folder to write; of kohya's format a file"
    )
    parser.add_argument(
        "--to", choices=FORMATS, default="peft", help="the format to write (default: %(default)s)"
    )
    parser.add_argument(
        "--model", metavar="FOLDER", help="the base, where names or heads are looked up"
    )
    parser.add_argument("--base-model", help="name of the base, for the output")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="data instead of a line")
    add_reading_options(parser)
    parser.set_defaults(run=_convert)
    return [parser]


def _convert(options: argparse.Namespace) -> None:
    from sapmerge import convert

    done = convert(
        _source(options),
        options.output,
        to=options.to,
        model=options.model,
        base_model=options.base_model,
        allow_pickle=options.allow_pickle,
        overwrite=options.overwrite,
    )
    print(json.dumps(asdict(done), indent=2) if options.json else printable(str(done)))


def _source(options: argparse.Namespace) -> str | dict[str, str]:
    """A path, or component=folder of each."""
    arguments: Sequence[str] = options.source
    if len(arguments) == 1 and ("=" not in arguments[0] or os.path.lexists(arguments[0])):
        pickles = _PICKLES if options.allow_pickle else ()
        return local(arguments[0], options, (), (*ADAPTER, *_OTHERS, *pickles))
    pairs = [argument.partition("=") for argument in arguments]
    table = {
        component: local(folder, options) for component, separator, folder in pairs if separator
    }
    if len(table) < len(pairs):
        raise MethodError("several folders need their components: unet=FOLDER text_encoder=FOLDER")
    return table
