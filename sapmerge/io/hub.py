"""Files of the Hugging Face Hub: downloads, and a folder that is uploaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, cast

from sapmerge.errors import AdapterFormatError, OutputError
from sapmerge.io.files import shown

__all__ = ["check_name", "downloaded", "upload", "upload_written"]


def downloaded(
    repo_id: str,
    names: Sequence[str],
    *,
    optional: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Download some files of a repository, one by one and by name.

    Args:
        names: files that it must have.
        optional: files that it may have; without `names` at least one of these.

    Returns:
        The folder that they lie in, of one commit.

    Raises:
        AdapterFormatError: it lacks a file, it changed meanwhile, or the Hub refuses or cannot be
            reached.
    """
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    cache = None if cache_dir is None else os.fspath(cache_dir)
    folders, missing = list[str](), AdapterFormatError("")
    for name in (*names, *optional):
        try:
            path = hf_hub_download(
                repo_id, name, revision=revision, subfolder=subfolder, token=token, cache_dir=cache
            )
        except LocalEntryNotFoundError:  # an EntryNotFoundError, too
            missing = AdapterFormatError(
                f"the Hub cannot be reached, and {name} of {shown(repo_id)} is not in the local "
                "cache: download it with a network, or give a folder"
            )
        except EntryNotFoundError:
            missing = AdapterFormatError(
                f"the Hub repository {shown(repo_id)} has no {name}; only safetensors are read"
                if names
                else f"the Hub repository {shown(repo_id)} has none of {', '.join(optional)}: name "
                "the file"
            )
        except (HfHubHTTPError, HFValidationError) as error:
            if names and name not in names:
                continue  # what is needed is there
            raise AdapterFormatError(
                f"the Hub repository {shown(repo_id)} cannot be read"
                f"{f' at {shown(revision)}' if revision else ''}: {error}"
            ) from None
        else:
            folders.append(os.path.dirname(path))
            continue
        if name in names:
            raise missing from None
    if not folders:
        raise missing
    if len(set(folders)) > 1:
        raise AdapterFormatError(
            f"the Hub repository {shown(repo_id)} changed between two downloads; try again"
        )
    return folders[0]


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
