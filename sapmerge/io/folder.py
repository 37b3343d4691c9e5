"""The folder of an adapter: which of its files are read."""

from __future__ import annotations

import os
import stat
import warnings

from sapmerge.errors import AdapterFormatError, AdapterSecurityError, SapmergeWarning
from sapmerge.io.files import reason

__all__ = ["CONFIG", "PICKLE", "WEIGHTS", "which_weights"]

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


def _warn(text: str) -> None:
    warnings.warn(text, SapmergeWarning, stacklevel=4)
