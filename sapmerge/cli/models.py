"""The base model and the anchors that a command names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sapmerge.cli.choices import LOSSES, MODEL_DTYPES
from sapmerge.errors import AnchorError, MethodError, ModelMismatchError, printable
from sapmerge.io.machine import at_terminal

if TYPE_CHECKING:
    from torch import nn

    from sapmerge.anchors.folders import Pair

__all__ = [
    "add_base_options",
    "add_model_options",
    "anchors_of",
    "batches_of",
    "loss_of",
    "model_of",
    "pairs_of",
]


def add_model_options(parser: argparse.ArgumentParser) -> Any:
    """`--model`, `--anchors` and what goes with them; the group that they are in."""
    group = parser.add_argument_group("anchors and the base model")
    group.add_argument(
        "--anchors",
        metavar="DIR",
        help="images with captions.json, .jsonl, .csv or .txt; or hf://user/dataset:split",
    )
    group.add_argument("--loss", choices=LOSSES, help="of the anchors; by default by the model")
    add_base_options(group)
    return group


def add_base_options(group: Any) -> None:
    """`--model` and how it runs."""
    group.add_argument("--model", help="the base model: a folder, or a name of the Hub")
    group.add_argument("--batch-size", type=int, help="pairs per batch (default: 16)")
    group.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", choices=MODEL_DTYPES, help="of the model (default: float32)")


def model_of(options: argparse.Namespace) -> nn.Module:
    """The base model, loaded by transformers, in eval mode."""
    if options.model is None:
        raise AnchorError("anchors run through the base model: add --model FOLDER_OR_NAME")
    library, config = _transformers(), None
    try:
        config = library.AutoConfig.from_pretrained(options.model)
        architecture: str = (config.architectures or ["AutoModel"])[0]
        kind: Any = getattr(library, architecture, None)
        if kind is None:
            raise ModelMismatchError(
                f"--model {printable(options.model)}: transformers has no {architecture}"
            )
        with _own_bars(library, options):
            found: Any = kind.from_pretrained(options.model, dtype=options.dtype or "float32")
    except (OSError, ValueError, KeyError) as error:
        raise ModelMismatchError(
            f"--model {printable(options.model)}: cannot be loaded ({error})"
        ) from None
    return found.eval().to(options.device or "cpu")


@contextmanager
def _own_bars(library: Any, options: argparse.Namespace) -> Generator[None]:
    """No bars of transformers where there are none of ours."""
    logging = library.utils.logging
    shown = logging.is_progress_bar_enabled()
    if getattr(options, "quiet", False) or not at_terminal():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def anchors_of(options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The batches of `--anchors`; None without it."""
    if options.anchors is None:
        for flag in ("loss", "batch_size"):
            if getattr(options, flag) is not None:
                raise MethodError(f"--{flag.replace('_', '-')} is of anchors: add --anchors DIR")
        return None
    return batches_of(pairs_of(options.anchors), options)


def pairs_of(anchors: str) -> list[Pair]:
    """Images and captions of a folder, or of hf://user/dataset:split."""
    from sapmerge.anchors import read_dataset, read_folder

    if anchors.startswith("hf://"):
        name, _, split = anchors.removeprefix("hf://").removeprefix("datasets/").partition(":")
        name, _, revision = name.partition("@")
        return read_dataset(name, split=split or "train", revision=revision or None)
    if not os.path.isdir(anchors):
        raise AnchorError(f"--anchors {printable(anchors)}: there is no such folder")
    return read_folder(anchors)


def batches_of(pairs: Sequence[Pair], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs as batches for the model of `--model`."""
    if options.model is None:
        raise AnchorError("anchors run through the base model: add --model FOLDER_OR_NAME")
    size = 16 if options.batch_size is None else options.batch_size
    if size < 1:
        raise AnchorError(f"--batch-size {size}: a batch holds at least one pair")
    from sapmerge.anchors.folders import batches

    try:
        processor = _transformers().AutoProcessor.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        raise AnchorError(
            f"--model {printable(options.model)} has no processor that turns images and captions "
            f"into batches ({error})"
        ) from None
    return batches(pairs, processor, size)


def loss_of(options: argparse.Namespace) -> Any:
    """The loss of `--loss`; None without it."""
    from sapmerge import losses

    return None if options.loss is None else losses.NAMED[options.loss]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ModelMismatchError(
            'the base model is loaded by transformers: pip install "transformers>=5"'
        ) from None
    return transformers
