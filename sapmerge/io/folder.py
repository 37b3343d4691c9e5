"""The folder of an adapter: which of its files are read, and what they hold."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings

from sapmerge.errors import AdapterFormatError, AdapterSecurityError, SapmergeWarning
from sapmerge.io.config import Settings, settings
from sapmerge.io.contents import Contents, sort_contents
from sapmerge.io.files import DEFAULT_LIMITS, Limits, RegularFile, reason
from sapmerge.io.header import open_weights
from sapmerge.io.listing import unread_weights, way_on
from sapmerge.io.original_llava import MODEL_CONFIG, is_original_llava
from sapmerge.io.pickles import open_pickle
from sapmerge.io.strict_json import parse

__all__ = [
    "BESIDE",
    "CONFIG",
    "PICKLE",
    "WEIGHTS",
    "check_readable",
    "read_folder",
    "which_weights",
]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BESIDE = "non_lora_trainables.bin"
"""Where the original code of LLaVA keeps what it has trained besides the LoRA: the projector."""


def which_weights(folder: str, where: str, allow_pickle_weights: bool) -> tuple[str, bool]:
    """The name of the file with the weights, and whether there is one of `BESIDE`,
    from a look at the folder.

    Raises:
        AdapterFormatError: it is no folder of an adapter; the message says what lies there.
        AdapterSecurityError: weights in a pickle, without leave to read it.
    """
    names = _listed(folder, where)
    if CONFIG not in names:
        raise AdapterFormatError(f"{where}: has no {CONFIG}; {way_on(folder, names, CONFIG)}")
    if WEIGHTS in names and PICKLE in names:
        _warn(f"{where}: {PICKLE} is ignored, {WEIGHTS} is used; one of them may be out of date")
    if WEIGHTS not in names and PICKLE not in names:
        raise AdapterFormatError(f"{where}: has no {WEIGHTS}; {way_on(folder, names, CONFIG)}")
    pickled = [
        name
        for name in (BESIDE, PICKLE)
        if name in names and (name == BESIDE or WEIGHTS not in names)
    ]
    if pickled and not allow_pickle_weights:
        held = (
            "what was trained besides the LoRA (a projector)"
            if pickled[0] == BESIDE
            else "the weights"
        )
        verb = "is" if pickled[0] == BESIDE else "are"
        raise AdapterSecurityError(
            f"{where}: {held} {verb} in {pickled[0]}, a pickle, which can hold code. If you trust "
            "its author, load it "
            "with sapmerge.Adapter.load(path, allow_pickle_weights=True), or ask for safetensors"
        )
    if BESIDE not in names and MODEL_CONFIG in names and is_original_llava(folder):
        _warn(
            f"{where}: {MODEL_CONFIG} is that of the original code of LLaVA, which saves the "
            f"projector that it trains in {BESIDE}, and there is none: the merge is without it"
        )
    unread = unread_weights(names, (WEIGHTS, PICKLE, BESIDE))
    if unread is not None:
        _warn(f"{where}: {unread}")
    return (WEIGHTS if WEIGHTS in names else PICKLE), BESIDE in names


def _listed(folder: str, where: str) -> set[str]:
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise AdapterFormatError(
                f"{where}: is a file; expected the folder that holds {CONFIG} and {WEIGHTS}"
            )
        return set(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise AdapterFormatError(
            f"{where}: cannot be opened ({reason(error)}). Paths are local only; use "
            "Adapter.from_hub('user/name') for the Hub"
        ) from None


def check_readable(folder: str) -> None:
    """Refuse what `Adapter.load` would refuse, without a warning:
    for a folder that is about to become an output.
    """
    contents = read_folder(folder, WEIGHTS, "the output", DEFAULT_LIMITS)[2]
    contents.check_finite("the output")


def read_folder(
    folder: str, weights_name: str, where: str, limits: Limits
) -> tuple[dict[str, object], Settings, Contents, dict[str, str]]:
    """Config, what it says, the contents of the weights with every value seen,
    and file name -> sha256.
    """
    config_where, weights_where = f"{where}, {CONFIG}", f"{where}, {weights_name}"
    weights_path = os.path.join(folder, weights_name)
    with (
        RegularFile(os.path.join(folder, CONFIG), config_where) as config_file,
        RegularFile(weights_path, weights_where) as file,
    ):
        # One byte more than allowed is enough to refuse it.
        raw = bytes(config_file.read(0, min(config_file.size, limits.config_bytes + 1)))
        config = parse(raw, config_where, limits)
        chosen = settings(config, config_where)
        if weights_name == PICKLE:
            weights, data = open_pickle(file, limits)
            contents = sort_contents(weights, chosen, config, config_where, limits)
            weights.scan()
            sha256 = hashlib.sha256(data).hexdigest()
            _warn(
                f"{weights_where}: read from a pickle; save it as safetensors, which cannot hold "
                "code"
            )
        else:
            weights = open_weights(file, weights_path, limits)
            contents = sort_contents(weights, chosen, config, config_where, limits)
            weights.scan(file)
            sha256 = weights.sha256
    return config, chosen, contents, {CONFIG: hashlib.sha256(raw).hexdigest(), weights_name: sha256}


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=4)
