"""Files where the system can less: Windows, as far as it can be told from elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sapmerge.io import system

ROOT = Path(__file__).parents[2]
needs_posix = pytest.mark.skipif(not system.POSIX, reason="this system has no pread or dir_fd")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc what is open")
def test_everything_is_written_without_posix(tmp_path: Path) -> None:
    """Outputs, overwriting, caches, rounds and values held on disk; nothing is left beside them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.io.without_posix", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "left": [],
        "files": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
    }


@pytest.mark.parametrize("posix", [False, pytest.param(True, marks=needs_posix)])
def test_bytes_at_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, posix: bool) -> None:
    monkeypatch.setattr(system, "POSIX", posix)
    folder = system.Folder(str(tmp_path))
    file = folder.create("file")
    try:
        assert system.write_at(file, memoryview(b"a\nbc"), 2) == 4
        assert system.write_at(file, memoryview(b"xy"), 0) == 2
        assert system.read_at(file, 3, 1) == b"ya\n"
        assert system.read_at(file, 9, 6) == b""
    finally:
        os.close(file)
    folder.rename("file", "moved")
    assert (tmp_path / "moved").read_bytes() == b"xya\nbc"
    assert folder.lstat("moved").st_size == 6
    folder.unlink("moved")
    assert os.listdir(tmp_path) == []
    folder.close()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        system.Folder(str(tmp_path / "file"))
