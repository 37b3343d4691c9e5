"""Makes system calls fail, or kill the process, at a chosen moment;
and tells whether a checkpoint folder is whole.

Run as a script it forks writers and kills them (so torch is imported once),
and prints what it found as JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from sapmerge.io import atomic
from sapmerge.io.writing import CONFIG_DIGEST_KEY, CheckpointWriter

OS_CALLS = [
    *("open", "mkdir", "pwrite", "pread", "fsync", "close", "unlink", "rmdir", "rename"),
    *("stat", "lstat", "fstat", "listdir", "scandir"),
]
ELEMENTS = 20_000


class Faults:
    """While active, calls `fault` instead of (or, for close, after) the N-th system
    call of the writer.

    `sticky` repeats the fault at every later call.
    `names` are the calls seen, `fired` the name of the one that failed.
    """

    def __init__(self, at: int, fault: Callable[[], None], *, sticky: bool = False) -> None:
        self.at, self.fault, self.sticky = at, fault, sticky
        self.names: list[str] = []
        self.fired: str | None = None
        self._saved: list[tuple[Any, str, Any]] = []

    def _wrap(self, holder: Any, name: str) -> None:
        real = getattr(holder, name)
        if real is None:
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            faulty = len(self.names) == self.at or (self.sticky and len(self.names) > self.at)
            if not faulty:
                # A kill does not lose what the kernel has, so a real sync would only cost time.
                return None if name == "fsync" else real(*args, **kwargs)
            self.fired = self.fired or name
            if name == "close":  # an error from close(2) leaves the descriptor closed
                real(*args)
            return self.fault()

        self._saved.append((holder, name, real))
        setattr(holder, name, call)

    def __enter__(self) -> Faults:
        for name in OS_CALLS:
            self._wrap(os, name)
        self._wrap(fcntl, "flock")
        self._wrap(atomic, "_renameat2")
        return self

    def __exit__(self, *_: object) -> None:
        for holder, name, real in reversed(self._saved):
            setattr(holder, name, real)


def fail_with(code: int) -> Callable[[], None]:
    def fault() -> None:
        raise OSError(code, os.strerror(code))

    return fault


def kill_self() -> None:
    # signal.raise_signal, since os.kill is one of the calls that are wrapped
    signal.raise_signal(signal.SIGKILL)


def write_version(path: Path, version: int, *, overwrite: bool = True) -> None:
    """Writes a checkpoint in which every file tells the version."""
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        for name in "ab":
            writer.add(name, torch.full((ELEMENTS,), float(version)))
        text = f"version {version}"
        writer.commit(config={"version": version}, metadata={}, card=text)


class MixtureError(Exception):
    """The files read are not of one checkpoint, and the config's digest says so."""


def read_version(path: Path) -> int | None:
    """The version of a checkpoint that is whole; None if there is none.
    Anything else fails an assertion.
    """
    if not path.exists():
        return None
    config = (path / "adapter_config.json").read_bytes()
    # Not safe_open: it opens the path twice, and after a swap in between takes the header and the
    # data of two files.
    data = (path / "adapter_model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header["__metadata__"][CONFIG_DIGEST_KEY] != hashlib.sha256(config).hexdigest():
        raise MixtureError
    tensors = load(data)
    version = json.loads(config)["version"]
    assert sorted(tensors) == ["a", "b"]
    assert all(
        torch.equal(tensor, torch.full((ELEMENTS,), float(version))) for tensor in tensors.values()
    )
    return version


def whole_version(path: Path) -> int | None:
    """As `read_version`, the text files included, for a folder that nobody is writing."""
    version = read_version(path)
    if version is not None:
        assert sorted(os.listdir(path)) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert (path / "README.md").read_text() == f"version {version}"
    return version


def in_child(action: Callable[[], object]) -> int:
    """Forks; the child does `action` and exits 0, or 1 if it raised."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def was_killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"the writer ended with status {status}"
    return status == signal.SIGKILL


def recover(path: Path) -> int | None:
    """What the next writer finds; it sees to the leftovers before it looks at the output."""
    CheckpointWriter(path, overwrite=True)
    return whole_version(path)


def random_kills(path: Path, count: int) -> Counter[str]:
    """Kills a loop of overwrites `count` times; the version never goes back and the
    output is never torn.
    """
    seen: Counter[str] = Counter()
    write_version(path, 0)
    began = time.monotonic()
    write_version(path, 0)
    usual = max(0.02, time.monotonic() - began)  # fork and first write take several times as long
    version, chance = 0, random.Random(0)
    for _ in range(count):
        start = version + 1

        def loop(start: int = start) -> None:
            for number in range(start, start + 10_000):
                write_version(path, number)

        child = in_child(loop)
        time.sleep(chance.uniform(0.0, 4 * usual))
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        absent = whole_version(path) is None
        found = recover(path)
        assert found is not None, f"version {version} was lost"
        assert found >= version, f"version {version} was lost, {found} found"
        seen.update(kills=1, advanced=found > version, absent=absent)
        version = found
    write_version(path, version + 1)
    assert os.listdir(path.parent) == [path.name]
    return seen


def kills_at_calls(path: Path, *, existing: bool) -> Counter[str]:
    """Kills a writer at its N-th system call, N = 1, 2, ... until none is left."""
    seen: Counter[str] = Counter()
    for number in range(1, 1000):
        if existing:
            write_version(path, 1)
        elif path.exists():
            shutil.rmtree(path)

        def write(number: int = number) -> None:
            with Faults(number, kill_self):
                write_version(path, 2)

        killed = was_killed(in_child(write))
        whole_version(path)  # absent or whole, before anything is repaired
        found = recover(path)
        assert found in ((1, 2) if existing else (None, 2)), f"call {number}: found {found}"
        seen[f"{'version 1' if existing else 'absent'} before, version {found} after"] += 1
        write_version(path, 3)
        assert os.listdir(path.parent) == [path.name], f"call {number}: {os.listdir(path.parent)}"
        if not killed:
            assert found == 2
            return seen
    raise AssertionError("the writer never finished")


def race(path: Path, seconds: float) -> Counter[str]:
    """Two writers overwrite one path while a reader opens its files one after the other."""
    seen: Counter[str] = Counter()
    write_version(path, 0)
    end = time.monotonic() + seconds

    def loop(first: int) -> None:
        number = first
        while time.monotonic() < end:
            write_version(path, number)
            number += 2

    children = [in_child(lambda: loop(1)), in_child(lambda: loop(2))]
    while time.monotonic() < end:
        try:
            seen["whole" if read_version(path) is not None else "absent"] += 1
        except MixtureError:
            seen["mixture detected"] += 1
        except FileNotFoundError:  # the folder was replaced between two look-ups
            seen["gone"] += 1
    for child in children:
        assert not was_killed(child)
    assert whole_version(path)
    assert os.listdir(path.parent) == [path.name]
    return seen


def main() -> None:
    task, folder, amount, native = sys.argv[1:]
    torch.set_num_threads(1)
    if native == "fallback":
        atomic._renameat2 = None  # pyright: ignore[reportPrivateUsage]
    path = Path(folder) / "out"
    tasks: dict[str, Callable[[], Counter[str]]] = {
        "random": lambda: random_kills(path, int(amount)),
        "calls": lambda: kills_at_calls(path, existing=False) + kills_at_calls(path, existing=True),
        "race": lambda: race(path, float(amount)),
    }
    with contextlib.redirect_stdout(sys.stderr):
        result = tasks[task]()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
