"""In which form a merge is written: how modules are spelled, for which engine,
with one rank or several, in which dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from sapmerge.errors import MethodError, printable

__all__ = ["DTYPES", "Form", "dtype_name"]

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What an output may be stored in."""


@dataclass(frozen=True)
class Form:
    """The choices of `save_pretrained`.

    Args:
        names: see `spelling.written_names`.
        uniform_rank: whether all modules get the largest rank, padded with zeros.
        serving: the engine that is to load it, see `io.engines`.
        dtype: of all tensors; None: that of the inputs.
    """

    names: str | None = None
    uniform_rank: bool = True
    serving: str | None = None
    dtype: str | None = None

    def recorded(self, names: str | None) -> Mapping[str, object]:
        """What differs from the default, for the metadata;
        `names` is the choice that needs no model.
        """
        record: dict[str, object] = {} if names is None else {"names": names}
        record |= {} if self.uniform_rank else {"uniform_rank": False}
        record |= {} if self.serving is None else {"serving": self.serving}
        return record | ({} if self.dtype is None else {"dtype": self.dtype})


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """The name of an output's dtype, given by name or as torch's; None stays None.

    Raises:
        MethodError: an output is not stored in it; with the nearest that there is.

    Example:
        >>> from sapmerge.merging.form import dtype_name
        >>> dtype_name("torch.float16")
        'float16'
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name in DTYPES:
        return None if dtype is None else name
    close = get_close_matches(name, DTYPES, 1, 0.5)
    raise MethodError(
        f"dtype is one of {', '.join(DTYPES)}; got {printable(name[:80])!r}"
        + (f"; did you mean {close[0]}?" if close else "")
    )
