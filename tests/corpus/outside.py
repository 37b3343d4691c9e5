"""Pickles, and what a file system can hold in place of a file."""

# ruff: noqa: E501  a case per line

from __future__ import annotations

import copy
import io
import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .build import (
    CANARY,
    CONFIG,
    PICKLE,
    PREFIX,
    QA,
    WEIGHTS,
    Build,
    Case,
    accept,
    files,
    good_tensors,
    refuse,
    stored,
    warn,
    write,
)


class Bomb:
    """Leaves a canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.canary}'",)


class Opener(Bomb):
    def __reduce__(self) -> tuple[object, ...]:
        return io.open, (str(self.canary), "w")


def good() -> dict[str, Any]:
    import torch

    return {
        name: torch.from_numpy(np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).copy())
        for name, tensor in good_tensors().items()
    }


def archive(
    content: Callable[[Path], object], change: Callable[[bytes], bytes] = bytes, **options: Any
) -> Build:
    """A folder with adapter_model.bin as torch.save writes it."""

    def build(folder: Path) -> None:
        import torch

        write(folder, weights=...)
        stream = io.BytesIO()
        torch.save(content(folder.parent / CANARY), stream, **options)
        (folder / PICKLE).write_bytes(change(stream.getvalue()))

    return build


def plain(content: Callable[[Path], object]) -> Build:
    def build(folder: Path) -> None:
        write(folder, weights=...)
        (folder / PICKLE).write_bytes(pickle.dumps(content(folder.parent / CANARY)))

    return build


def zipped(names: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Build:
    def build(folder: Path) -> None:
        write(folder, weights=...)
        with zipfile.ZipFile(folder / PICKLE, "w", compression) as target:
            for name, data in names.items():
                target.writestr(name, data)

    return build


def repacked(data: bytes) -> bytes:
    """The same archive, with compressed members."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    return stream.getvalue()


def short_storage(data: bytes) -> bytes:
    """The same archive, with a storage that is shorter than its tensor."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w") as target:
        for info in source.infolist():
            body = source.read(info)
            target.writestr(info.filename, body[:8] if "/data/0" in info.filename else body)
    return stream.getvalue()


def doubled(data: bytes) -> bytes:
    """The same archive, with a directory that lists every member nine times."""
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as target:
        for info in list(target.infolist()):
            for letter in "abcdefgh":
                other = copy.copy(info)
                other.filename += letter
                target.filelist.append(other)
        target._didModify = True  # type: ignore[attr-defined]
    return stream.getvalue()


def expanded(_: Path) -> object:
    import torch

    return good() | {QA: torch.ones(1).expand(2**17, 2**17)}


def sparse(_: Path) -> object:
    import torch

    indices = torch.tensor([[0, 10**6], [0, 10**6]])
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return good() | {
            QA: torch.sparse_coo_tensor(indices, torch.ones(2), (4, 16), check_invariants=False)
        }


def allowed(name: str, build: Build, *words: str) -> Case:
    return refuse("pickle", name, build, PICKLE, *words, action="pickle")


def placed(name: str, make: Callable[[Path], object]) -> Build:
    """The good adapter with something else in the place of one of its files."""

    def build(folder: Path) -> None:
        write(folder)
        (folder / name).unlink()
        make(folder / name)

    return build


def linked(name: str, target: str) -> Build:
    return placed(name, lambda path: path.symlink_to(target))


def moved(folder: Path) -> None:
    """Both files are links to regular files, as in the cache of the Hub."""
    write(folder / "blobs")
    for name in (CONFIG, WEIGHTS):
        (folder / name).symlink_to(Path("blobs") / name)


def chained(folder: Path) -> None:
    moved(folder)
    (folder / "linked").symlink_to(".")


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has to be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def unreadable(folder: Path) -> None:
    write(folder)
    (folder / WEIGHTS).chmod(0)


def system(name: str, build: Build, *words: str, **options: Any) -> Case:
    return refuse("file system", name, build, *words, **options)


def neighbours(folder: Path) -> None:
    """Files that no loader of an adapter has business with."""
    write(folder)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb(folder.parent / CANARY)))
    (folder / "modeling.py").write_text(f"open({str(folder.parent / CANARY)!r}, 'w')")
    (folder / "README.md").write_text("# Run `pip install helper` first")


def both(folder: Path) -> None:
    write(folder)
    (folder / PICKLE).write_bytes(pickle.dumps(Bomb(folder.parent / CANARY)))


def index_only(folder: Path) -> None:
    write(folder, weights=...)
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')


ROOT = os.getuid() == 0 if hasattr(os, "getuid") else False
CASES = [
    refuse("pickle", "a good one, not allowed", archive(lambda _: good()), PICKLE, "allow_pickle_weights=True"),
    refuse("pickle", "code, not allowed", archive(lambda canary: good() | {"x": Bomb(canary)}), PICKLE),
    refuse("pickle", "not a file at all", lambda folder: (write(folder, weights=...), (folder / PICKLE).mkdir())[0], PICKLE),
    allowed("code in a plain pickle", plain(Bomb), "torch.save"),
    allowed("code in an archive", archive(Bomb), "tensors"),
    allowed("code beside the tensors", archive(lambda canary: good() | {"x": Bomb(canary)}), "tensors"),
    allowed("code that opens a file", archive(lambda canary: good() | {"x": Opener(canary)}), "tensors"),
    allowed("code in the legacy format", archive(lambda canary: good() | {"x": Bomb(canary)}, _use_new_zipfile_serialization=False), "torch.save"),
    allowed("the legacy format", archive(lambda _: good(), _use_new_zipfile_serialization=False), "torch.save"),
    allowed("empty", archive(lambda _: good(), lambda _: b""), "torch.save"),
    allowed("truncated", archive(lambda _: good(), lambda data: data[: len(data) // 2]), "archive"),
    allowed("truncated by 40 bytes", archive(lambda _: good(), lambda data: data[:-40]), "archive"),
    allowed("a list", archive(lambda _: [1, 2]), "list"),
    allowed("an empty mapping", archive(lambda _: {}), "no LoRA tensor"),
    allowed("a text beside the tensors", archive(lambda _: good() | {"note": "text"}), "note"),
    allowed("a number beside the tensors", archive(lambda _: good() | {"epoch": 3}), "epoch"),
    allowed("a name that is a number", archive(lambda _: good() | {3: good()[QA]}), "3"),
    allowed("a nested state dict", archive(lambda _: {"state_dict": good()}), "state_dict"),
    allowed("a norm of the base", archive(lambda _: good() | {PREFIX + "model.norm.weight": good()[QA][0]}), "norm.weight"),
    allowed("NaN", archive(lambda _: good() | {QA: good()[QA] * float("nan")}), QA, "NaN"),
    allowed("integers", archive(lambda _: good() | {QA: good()[QA].long()}), QA),
    allowed("an empty tensor", archive(lambda _: good() | {QA: good()[QA][:0]}), QA, "empty"),
    allowed("two members over the same bytes", archive(lambda _: good(), doubled), "unpacks to more"),
    allowed("a sparse tensor out of range", archive(sparse)),
    allowed("2^34 numbers of stride 0", archive(expanded), "bytes"),
    allowed("a storage that is too short", archive(lambda _: good(), short_storage)),
    allowed("compressed members", archive(lambda _: good(), repacked), "compressed"),
    allowed("a zip bomb", zipped({"archive/data.pkl": bytes(50_000_000)}), "zip bomb"),
    allowed("a zip without a pickle", zipped({"a.txt": b"a"}, zipfile.ZIP_STORED)),
    allowed("safetensors under the name of a pickle", lambda folder: (write(folder, weights=...), (folder / PICKLE).write_bytes(stored(good_tensors())))[0], "torch.save"),
    warn("pickle", "a good one, allowed", archive(lambda _: good()), PICKLE, action="pickle", truth="good"),
    warn("pickle", "both formats", both, PICKLE, "ignored"),
    accept("pickle", "pickles with other names", neighbours),
    system("no folder", lambda folder: None, "local only", target="missing"),
    system("no folder, two names like a repository", lambda folder: None, "local only", target="adapters/medical"),
    system("another case of the folder's name", files(), "local only", target="../Folder"),
    system("an empty folder", lambda folder: None, CONFIG),
    system("the config itself", files(), "expected the folder", target=CONFIG),
    system("the weights themselves", files(), "expected the folder", target=WEIGHTS),
    system("no config", files(...), CONFIG),
    system("no weights", files(None, ...), WEIGHTS, "nothing is downloaded"),
    system("only an index of shards", index_only, WEIGHTS),
    *(
        system(f"{short} is {what}", placed(name, make), name, word)
        for short, name in (("config", CONFIG), ("weights", WEIGHTS))
        for what, make, word in (
            ("a FIFO", os.mkfifo, "FIFO"),
            ("a folder", Path.mkdir, "folder"),
            ("a socket", a_socket, "socket"),
        )
    ),
    *(
        system(f"{short} links to {what}", linked(name, target or name), name)
        for short, name in (("config", CONFIG), ("weights", WEIGHTS))
        for what, target in (
            ("/dev/zero", "/dev/zero"),
            ("/dev/null", "/dev/null"),
            ("itself", ""),
            ("nothing", "/nowhere/at/all"),
            ("a folder", "."),
        )
    ),
    system("weights link to a text", linked(WEIGHTS, "/etc/passwd"), WEIGHTS),
    system("config links to a text", linked(CONFIG, "/etc/passwd"), CONFIG),
    system("a folder that links to itself", lambda folder: (folder / "loop").symlink_to("loop"), "local only", target="loop"),
    system("a name with a zero byte", lambda folder: None, "local only", target="a\0b"),
    system("a name with terminal escapes", lambda folder: None, "\\x1b[2J", target="\x1b[2J"),
    system("a name of 5,000 letters", lambda folder: None, "local only", target="x" * 5000),
    *([] if ROOT else [system("weights nobody may read", unreadable, WEIGHTS)]),
    accept("file system", "links to regular files", moved),
    accept("file system", "a link to the folder", chained, target="linked"),
    accept("file system", "a folder with odd letters", lambda folder: write(folder / "a b\u00e9\n"), target="a b\u00e9\n"),
    accept("file system", "a path with dots", files(), target="../folder/."),
    accept("file system", "hard links", lambda folder: (write(folder / "x"), [os.link(folder / "x" / name, folder / name) for name in (CONFIG, WEIGHTS)])[0]),
    accept("file system", "files that nobody may write", lambda folder: (write(folder), (folder / WEIGHTS).chmod(0o400))[0]),
]  # fmt: skip
