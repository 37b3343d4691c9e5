"""`Merged.push_to_hub` and `--push-to-hub`, against a Hub that is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import sapmerge as sm
from sapmerge.cli import main

from ..models import files
from .shell import fails


class Hub:
    """Keeps what is uploaded; or refuses."""

    def __init__(self, kept: Path, error: Exception | None = None) -> None:
        self.kept, self.error, self.calls = kept, error, []

    def __call__(self, token: Any = None) -> Hub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, options))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> SimpleNamespace:
        shutil.copytree(folder_path, self.kept / repo_id)
        self.calls.append(("upload", repo_id, options))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_push_to_hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(here / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    merged = sm.merge(["left", "right"], method=sm.mean())
    address = merged.push_to_hub(
        "me/both", private=True, revision="next", token="t", uniform_rank=False
    )
    assert address == "https://hub/me/both/commit/1"
    assert hub.calls == [
        ("token", "t"),
        ("create", "me/both", {"private": True, "exist_ok": True}),
        (
            "upload",
            "me/both",
            {"revision": "next", "commit_message": "Upload a merged adapter"},
        ),
    ]
    merged.save_pretrained("python", uniform_rank=False)
    assert files(here / "hub" / "me" / "both") == files(here / "python")


def test_from_the_shell(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(here / "hub"))
    command = ["merge", "left", "right", "-o", "out", "--method", "mean"]
    assert main([*command, "--push-to-hub", "me/both"]) == 0
    assert "uploaded: https://hub/me/both/commit/1" in capsys.readouterr().out
    assert files(here / "hub" / "me" / "both") == files(here / "out")


def test_what_the_hub_refuses(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("merge", "left", "right", "-o", "out", "--method", "mean", "--push-to-hub")
    assert "is no name of the Hub" in fails(capsys, *command, "a/b/c")  # before any work
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(here, ConnectionError("no route")))
    assert main([*command, "me/both"]) == 2
    error = capsys.readouterr().err
    assert "'me/both' cannot be written on the Hub: no route" in error
    assert (here / "out").is_dir()  # the merge itself is done
    with pytest.raises(sm.OutputError, match="cannot be written on the Hub"):
        sm.merge(["left"], method=sm.mean()).push_to_hub("me/both")
