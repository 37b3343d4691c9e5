"""Uploading a folder to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any, cast

from sapmerge.errors import OutputError
from sapmerge.io.files import shown

__all__ = ["check_name", "upload", "upload_written"]


def check_name(repo_id: str) -> None:
    """Refuse what is no name of a repository, before any work.

    Raises:
        OutputError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise OutputError(f"{shown(repo_id)} is no name of the Hub (user/name): {error}") from None


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str = "Upload a merged adapter",
) -> str:
    """Upload a folder as one commit; the repository is made if there is none.

    Returns:
        The address of the commit.

    Raises:
        OutputError: the Hub refuses, or cannot be reached; it says why.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    check_name(repo_id)
    api = cast("Any", huggingface_hub).HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=os.fspath(folder),
            revision=revision,
            commit_message=message,
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        text = " ".join(str(error).split())
        raise OutputError(
            f"{shown(repo_id)} cannot be written on the Hub: {text[:500]}. `hf auth login` logs in"
        ) from None
    return str(getattr(done, "commit_url", done))


def upload_written(write: Callable[[str], object], repo_id: str, **options: Any) -> str:
    """Upload what a function writes into a folder of ours; see `upload`."""
    check_name(repo_id)
    with tempfile.TemporaryDirectory() as root:
        folder = os.path.join(root, "adapter")
        write(folder)
        return upload(folder, repo_id, **options)
