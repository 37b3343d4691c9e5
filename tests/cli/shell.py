"""Running commands, in this process and in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
