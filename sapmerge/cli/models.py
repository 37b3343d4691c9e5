"""The base model and the anchors that a command names."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from sapmerge.cli.choices import DTYPES, LOSSES
from sapmerge.errors import AnchorError, MethodError, ModelMismatchError, printable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["add_model_options", "anchors_of", "loss_of", "model_of"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--model`, `--anchors` and what goes with them."""
    group = parser.add_argument_group("anchors and the base model")
    group.add_argument(
        "--anchors", metavar="DIR", help="images with captions.json, .jsonl, .csv or .txt"
    )
    group.add_argument("--model", help="the base model: a folder, or a name of the Hub")
    group.add_argument("--loss", choices=LOSSES, help="of the anchors; by default by the model")
    group.add_argument("--batch-size", type=int, help="pairs per batch (default: 16)")
    group.add_argument("--device", help="where to compute: cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32)")


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
        found: Any = kind.from_pretrained(options.model, dtype=options.dtype or "float32")
    except (OSError, ValueError, KeyError) as error:
        raise ModelMismatchError(
            f"--model {printable(options.model)}: cannot be loaded ({error})"
        ) from None
    return found.eval().to(options.device or "cpu")


def anchors_of(options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The batches of `--anchors`; None without it."""
    if options.anchors is None:
        for flag in ("loss", "batch_size"):
            if getattr(options, flag) is not None:
                raise MethodError(f"--{flag.replace('_', '-')} is of anchors: add --anchors DIR")
        return None
    if options.model is None:
        raise AnchorError("anchors run through the base model: add --model FOLDER_OR_NAME")
    if not os.path.isdir(options.anchors):
        raise AnchorError(f"--anchors {printable(options.anchors)}: there is no such folder")
    size = 16 if options.batch_size is None else options.batch_size
    if size < 1:
        raise AnchorError(f"--batch-size {size}: a batch holds at least one pair")
    from sapmerge.anchors import from_folder

    try:
        processor = _transformers().AutoProcessor.from_pretrained(options.model)
    except (OSError, ValueError, KeyError) as error:
        raise AnchorError(
            f"--model {printable(options.model)} has no processor that turns images and captions "
            f"into batches ({error})"
        ) from None
    return from_folder(options.anchors, processor, size)


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
