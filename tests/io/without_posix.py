"""A Python that can what it can on Windows, as far as files go; a script for `test_system.py`.

    python -m tests.io.without_posix FOLDER

`os` loses what Windows lacks, and refuses what Windows refuses: to open a folder, to put
something in the place of what exists, to move or remove what is open (a folder with an open file
in it, too), and to write to a file that was not opened as a binary one. Then everything that
writes is used once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

BINARY = 1 << 30
TEXT = set[int]()  # descriptors of text files, in which "\n" would be written as "\r\n"


def refuse(number: int, path: object) -> None:
    raise OSError(number, os.strerror(number), str(path))


def is_open(path: str) -> bool:
    """Whether this process has the file open or mapped, or a file below the folder."""
    real = os.path.realpath(path)
    held = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    with open("/proc/self/maps") as maps:
        held += [line.split(maxsplit=5)[-1].rstrip("\n") for line in maps if "/" in line]
    return any(one == real or one.startswith(real + os.sep) for one in held)


def like_windows() -> None:
    """Change `os`, before the library is imported."""
    real = {name: getattr(os, name) for name in ("open", "write", "rename", "replace", "unlink")}

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        assert dir_fd is None, "no dir_fd on Windows"
        if os.path.isdir(path):
            refuse(errno.EACCES, path)
        file = real["open"](path, flags & ~BINARY, mode)
        (TEXT.discard if flags & BINARY else TEXT.add)(file)
        return file

    def write(file: int, data: Any) -> int:
        assert file not in TEXT, "opened without O_BINARY"
        return real["write"](file, data)

    def rename(source: Any, target: Any, **at: Any) -> None:
        assert not at, "no dir_fd on Windows"
        if os.path.lexists(target):
            refuse(errno.EEXIST, target)
        if is_open(source):
            refuse(errno.EACCES, source)
        real["rename"](source, target)

    def replace(source: Any, target: Any, **at: Any) -> None:
        assert not at, "no dir_fd on Windows"
        if os.path.isdir(target) or is_open(source) or is_open(target):
            refuse(errno.EACCES, target)
        real["replace"](source, target)

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        assert dir_fd is None, "no dir_fd on Windows"
        if is_open(path):
            refuse(errno.EACCES, path)
        real["unlink"](path)

    def kill(process: int, number: int) -> None:
        raise AssertionError("os.kill ends a process on Windows")

    for name, function in (
        ("open", opened),
        ("write", write),
        ("rename", rename),
        ("replace", replace),
        ("unlink", unlink),
        ("remove", unlink),
        ("kill", kill),
    ):
        setattr(os, name, function)
    for name in ("pread", "pwrite", "preadv", "pwritev", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK",
                 "O_CLOEXEC", "fork", "getuid", "geteuid"):  # fmt: skip
        delattr(os, name)
    os.O_BINARY = BINARY  # type: ignore[attr-defined]
    os.supports_dir_fd = set()
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    tempfile._bin_openflags |= BINARY  # type: ignore[attr-defined]
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    sys.modules["resource"] = None  # type: ignore[assignment]


def main(folder: Path) -> None:
    import torch  # uses what it likes of the real system
    import transformers  # noqa: F401
    from safetensors.torch import load_file, save_file

    like_windows()
    import sapmerge as sm
    from sapmerge.cli import main as shell
    from sapmerge.io.cache import Cache
    from sapmerge.io.held_values import HeldValues
    from tests.trust.helpers import write_adapter

    os.chdir(folder)
    for seed in range(3):
        write_adapter(folder / f"a{seed}", seed, {"fc.q": (12, 10), "fc.v": (9, 12)}, rank=3)
    inputs = ["a0", "a1", "a2"]
    merged = sm.merge(inputs, method=sm.mean())
    merged.save_pretrained("out")
    merged.save_pretrained("out", overwrite=True)
    sm.merge(inputs, method=sm.ties(0.5)).save_pretrained("out", overwrite=True)
    sm.Adapter.load("out")
    try:
        merged.save_pretrained("out")
    except sm.OutputExistsError:
        pass
    else:
        raise AssertionError("replaced")
    assert shell(["verify", "out"]) == 0
    assert shell(["merge", *inputs, "-o", "more/deep", "--method", "mean", "--quiet"]) == 0
    cache = Cache(folder / "cache")
    cache.put("key", {"x": torch.ones(2)}, {"n": 1})
    cache.put("key", {"x": torch.ones(2)}, {"n": 2})
    assert cache.get("key") is not None
    held, weight = HeldValues(in_memory=0), torch.arange(6.0)
    held.keep(weight)
    weight.zero_()
    held.put_back()
    held.close()
    assert weight.tolist() == list(range(6))
    assert shell(["round", "new", "round", "--manifest", "a0"]) == 0
    for name in inputs:
        assert shell(["round", "add", "round", name, "--client", name]) == 0
    assert shell(["round", "merge", "round", "-o", "global", "--method", "mean"]) == 0
    assert shell(["round", "remove", "round", "a1"]) == 0
    sm.routed({name: name for name in inputs}).save_pretrained("routed")
    asked = ["--method", "mean", "--quiet", "--html", "report.html"]
    assert shell(["merge", *inputs, "-o", "shown", *asked]) == 0
    assert shell(["inspect", *inputs, "--html", "inputs.html"]) == 0
    weights = {"fc.q.weight": torch.zeros(12, 10), "fc.v.weight": torch.zeros(9, 12)}
    (folder / "base").mkdir()
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    (folder / "base" / "config.json").write_text("{}", encoding="utf-8")
    merged.save_merged("base", "whole")
    merged.save_merged("base", "whole", overwrite=True)
    for name, update in merged.updates():
        stored = load_file(folder / "whole" / "model.safetensors")[f"{name}.weight"]
        torch.testing.assert_close(stored, update.dense().float())
    left = [name for name in os.listdir(folder) if name.startswith(".")]
    print(json.dumps({"left": left, "files": sorted(os.listdir("out"))}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
