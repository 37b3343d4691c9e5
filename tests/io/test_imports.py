"""Everything imports where Python lacks POSIX: no `fcntl`, no flags of open(2), no calls at
offsets.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "sapmerge"

MISSING = "O_NOFOLLOW O_DIRECTORY O_NONBLOCK O_CLOEXEC pread pwrite fchmod geteuid"

CODE = """
import importlib, os, sys, torch, peft
sys.modules["fcntl"] = None
for name in sys.argv[1].split():
    if hasattr(os, name):
        delattr(os, name)
for name in sys.argv[2:]:
    importlib.import_module(name)
print("imported", len(sys.argv) - 2)
"""


def test_every_module_imports_without_posix() -> None:
    names = [
        ".".join(("sapmerge", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    command = [sys.executable, "-c", CODE, MISSING, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["imported", str(len(names))]
