"""In which form a merge is written: how modules are spelled, for which engine,
with one rank or several, in which dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sapmerge.errors import MethodError, not_one_of
from sapmerge.io.writing import OUTPUT_DTYPES

__all__ = ["Form", "dtype_name"]


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
    if dtype is None or name in OUTPUT_DTYPES:
        return None if dtype is None else name
    raise MethodError(not_one_of("dtype", name, OUTPUT_DTYPES))
