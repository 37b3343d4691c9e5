"""Running commands, in this process and in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub.errors import EntryNotFoundError

from sapmerge.cli import main

ROOT = Path(__file__).parents[2]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """One line on stderr, nothing on stdout, exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), out + err
    assert err.count("\n") == 1, err
    assert err.startswith("sapmerge"), err
    assert "Traceback" not in err
    assert not os.path.exists("out")
    return err


class Terminal:
    """A stream that says whether it is one."""

    def __init__(self, real: object, tty: bool) -> None:
        self.real, self.tty = real, tty

    def isatty(self) -> bool:
        return self.tty

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)


class Hub:
    """Stands in for the Hub: repositories, as folders, and what is asked for."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders, self.asked = folders, []

    def __call__(
        self, repo_id: str, name: str, *, revision: str | None, subfolder: str | None, **_: object
    ) -> str:
        self.asked.append((repo_id, revision, subfolder))
        path = self.folders[repo_id] / (subfolder or "") / name
        if not path.exists():
            raise EntryNotFoundError(name)
        return str(path)


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
