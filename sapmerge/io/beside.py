"""`non_lora_trainables.bin`: what the original code of LLaVA has trained besides the LoRA,
as modules saved whole.

It is a pickle: it is read with leave only, as tensors and nothing else,
and every name in it is known or refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from sapmerge.errors import AdapterFormatError, AdapterSecurityError
from sapmerge.io.contents import Contents
from sapmerge.io.files import HeldWeights, Limits, RegularFile, Weights, shown
from sapmerge.io.folder import BESIDE
from sapmerge.io.keys import FLOATS
from sapmerge.io.measuring import Entry, Facts
from sapmerge.io.modules import SavedTensor
from sapmerge.io.names import canonical
from sapmerge.io.pickles import open_pickle

__all__ = ["JoinedWeights", "with_beside"]

# Parts of a multimodal model that its training recipes train whole.
_TRAINED = re.compile(
    r"(?:model\.)*(?:mm_projector|vision_tower|vision_resampler|multi_modal_projector|image_newline|embed_tokens|"
    r"lm_head)\b.*"
)


class JoinedWeights:
    """The tensors of the adapter's file and of one beside it;
    those have the file's name in front.
    """

    def __init__(self, main: Weights, beside: HeldWeights) -> None:
        self.where, self._main, self._beside = main.where, main, beside
        self.entries: dict[str, Entry] = main.entries | {
            _inside(name): one for name, one in beside.entries.items()
        }
        self.facts: dict[str, Facts] = main.facts | {
            _inside(name): one for name, one in beside.facts.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of our own."""
        own = name.removeprefix(f"{BESIDE}/")
        return self._main.read(name) if own == name else self._beside.read(own)


def _inside(name: str) -> str:
    return f"{BESIDE}/{name}"


def with_beside(
    contents: Contents, path: str, where: str, limits: Limits
) -> tuple[Contents, Mapping[str, str]]:
    """The contents with the tensors of `non_lora_trainables.bin`, and the sha256 of that file.

    Args:
        contents: of the adapter's own file, with every value seen.
        path: of the file.
        where: how messages name it.

    Raises:
        AdapterSecurityError: more than tensors, or a tensor that is no part of what such a recipe
            trains.
        AdapterFormatError: a tensor that is a duplicate, or whose dtype is none of ours.
    """
    with RegularFile(path, where) as file:
        weights, data = open_pickle(file, limits)
    weights.scan()
    joined = JoinedWeights(contents.weights, weights)
    extended = replace(
        contents, saved=dict(contents.saved), tensors=dict(contents.tensors), weights=joined
    )
    for name, entry in weights.entries.items():
        spelled = _spelled(name)
        module, _, last = spelled.rpartition(".")
        key = f"{canonical(module)}.{last}"
        if (
            not _TRAINED.fullmatch(spelled)
            or ".lora_" in spelled
            or canonical(module) in contents.modules
        ):
            raise AdapterSecurityError(
                f"{where}: tensor {shown(name)} would replace a weight of the base model, and is "
                "no part of a "
                "projector, a tower or the embeddings, which recipes for LLaVA train whole"
            )
        if entry.dtype not in FLOATS or 0 in entry.shape:
            dtype = str(entry.dtype).removeprefix("torch.")
            raise AdapterFormatError(
                f"{where}: tensor {shown(name)} has dtype {dtype} and shape {entry.shape}"
            )
        if key in extended.tensors:
            raise AdapterFormatError(f"{where}: tensor {shown(name)} is a duplicate")
        extended.saved[key] = SavedTensor(spelled, entry.dtype, entry.shape)
        extended.tensors[key] = (_inside(name),)
    return extended, {BESIDE: hashlib.sha256(data).hexdigest()}


def _spelled(name: str) -> str:
    """The name in the model: the code of LLaVA takes the same prefixes off when it
    loads the file.
    """
    inner = name.removeprefix("base_model.")
    return (
        inner.removeprefix("model.") if inner != name or inner.startswith("model.model.") else inner
    )
