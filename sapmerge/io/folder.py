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
from sapmerge.io.pickles import open_pickle
from sapmerge.io.strict_json import parse

__all__ = ["CONFIG", "PICKLE", "WEIGHTS", "check_readable", "read_folder", "which_weights"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def which_weights(folder: str, where: str, allow_pickle_weights: bool) -> str:
    """The name of the file with the weights, from a look at the folder."""
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise AdapterFormatError(f"{where}: is a file; expected the folder that holds {CONFIG} and {WEIGHTS}")
    except (OSError, ValueError) as error:
        raise AdapterFormatError(
            f"{where}: cannot be opened ({reason(error)}). Paths are local only; use Adapter.from_hub('user/name') "
            "for the Hub"
        ) from None
    safe, pickled = (os.path.lexists(os.path.join(folder, name)) for name in (WEIGHTS, PICKLE))
    if not os.path.lexists(os.path.join(folder, CONFIG)):
        raise AdapterFormatError(f"{where}: has no {CONFIG}; expected a folder written by save_pretrained")
    if safe and pickled:
        _warn(f"{where}: {PICKLE} is ignored, {WEIGHTS} is used; one of them may be out of date")
    if safe:
        return WEIGHTS
    if not pickled:
        raise AdapterFormatError(f"{where}: has no {WEIGHTS}; nothing is downloaded for a local folder")
    if not allow_pickle_weights:
        raise AdapterSecurityError(
            f"{where}: the weights are in {PICKLE}, a pickle, which can hold code. If you trust its author, load it "
            "with sapmerge.Adapter.load(path, allow_pickle_weights=True), or ask for safetensors"
        )
    return PICKLE


def check_readable(folder: str) -> None:
    """Refuse what `Adapter.load` would refuse, without a warning: for a folder that is about to become an output."""
    contents = read_folder(folder, WEIGHTS, "the output", DEFAULT_LIMITS)[2]
    contents.check_finite("the output")


def read_folder(
    folder: str, weights_name: str, where: str, limits: Limits
) -> tuple[dict[str, object], Settings, Contents, dict[str, str]]:
    """Config, what it says, the contents of the weights with every value seen, and file name -> sha256."""
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
            _warn(f"{weights_where}: read from a pickle; save it as safetensors, which cannot hold code")
        else:
            weights = open_weights(file, weights_path, limits)
            contents = sort_contents(weights, chosen, config, config_where, limits)
            weights.scan(file)
            sha256 = weights.sha256
    return config, chosen, contents, {CONFIG: hashlib.sha256(raw).hexdigest(), weights_name: sha256}


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=4)
