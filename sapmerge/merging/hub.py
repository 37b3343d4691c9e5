"""A merge on the Hub."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["push_to_hub"]


class _Saves(Protocol):
    """What `Merged` does."""

    def save_pretrained(
        self,
        path: str,
        *,
        overwrite: bool = False,
        names: str | None = None,
        uniform_rank: bool = True,
        serving: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None: ...


def push_to_hub(
    self: _Saves,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    names: str | None = None,
    uniform_rank: bool = True,
    serving: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> str:
    """Upload to the Hugging Face Hub what `save_pretrained` writes, as one commit.

    Args:
        repo_id: "user/name"; the repository is made if there is none.
        revision: a branch that is there; by default the main one.
        private: of a repository that is made; by default as the Hub has it for the user.
        token: as in `huggingface_hub`; by default that of `hf auth login`.
        names, uniform_rank, serving, dtype: as for `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        OutputError: no such name, or the Hub refuses or cannot be reached.

    Example:
        >>> merged.push_to_hub("somebody/both", private=True)  # doctest: +SKIP
    """
    from sapmerge.io.hub import upload_written

    form: dict[str, Any] = {
        "names": names, "uniform_rank": uniform_rank, "serving": serving, "dtype": dtype
    }  # fmt: skip
    return upload_written(
        lambda folder: self.save_pretrained(folder, **form),
        repo_id,
        revision=revision,
        private=private,
        token=token,
    )
