"""No code, no network, no foreign file: every event of the interpreter while the whole
corpus is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# The first word of an event, and what may follow it. Everything that is watched and not allowed is
# a finding.
WATCHED = (
    "open",
    "import",
    "exec",
    "compile",
    "socket",
    "subprocess",
    "ctypes",
    "pickle",
    "shutil",
    "tempfile",
    "os",
)
ALLOWED = {"os.stat", "os.fspath"}


def watch() -> None:
    """Read every case of the corpus and print the events that are not the opening of the files that
    were asked for.
    """
    import torch

    torch.set_num_threads(1)
    from tests.corpus.cases import CASES
    from tests.corpus.runner import _act, _warm_up, build

    allowed: set[str] = set()
    found: list[tuple[str, str, str]] = []
    seen = [0]
    watching = [False]
    name = [""]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching[0] or event.split(".")[0] not in WATCHED or event in ALLOWED:
            return
        seen[0] += 1
        of_path = event in ("open", "os.listdir") and isinstance(arguments[0], str)
        path = os.path.realpath(arguments[0]) if of_path else ""
        if path not in allowed:
            found.append((name[0], event, str(arguments[:2])[:200]))

    def read(case: Any, target: Path) -> None:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                updates = _act(case, target)
                if "46,000" not in case.name:  # as many openings of one file
                    updates()
            except Exception:
                pass

    with tempfile.TemporaryDirectory() as place:
        # Once unwatched: what Python imports for the first adapter of its kind is not a stranger's
        # doing.
        _warm_up(CASES[0])
        "".encode("cp437")  # names in old zip archives
        first = {(case.action, case.verdict): case for case in CASES}
        for case in first.values():
            read(case, build(case, Path(place)))
        sys.addaudithook(hook)
        for case in CASES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target = build(case, Path(place))
            # config.json tells the original code of LLaVA.
            files = ["adapter_config.json", "adapter_model.safetensors", "config.json"]
            files += ["adapter_model.bin"] if case.action == "pickle" else []
            folders = [target / "a", target / "b"] if case.action == "merge" else [target]
            allowed.clear()
            if "\0" not in str(target):
                allowed.update(
                    os.path.realpath(folder / file) for folder in folders for file in files
                )
                allowed.update(map(os.path.realpath, folders))  # listed: what is not read is named
            name[0] = f"{case.group}: {case.name}"
            modules = set(sys.modules)
            watching[0] = True
            read(case, target)
            watching[0] = False
            if set(sys.modules) - modules:
                found.append((name[0], "modules", str(sorted(set(sys.modules) - modules))))
        canary = (Path(place) / "CANARY").exists()
    print(json.dumps({"found": found, "events": seen[0], "canary": canary}))


@pytest.mark.skipif(sys.platform != "linux", reason="the corpus has cases of Linux")
def test_only_the_files_that_were_asked_for_are_opened() -> None:
    environment: Mapping[str, str] = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["found"] == []
    assert result["events"] > 500
    assert not result["canary"]


if __name__ == "__main__":
    watch()
