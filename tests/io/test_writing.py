"""The writer: right bytes, and an output that is absent, old, or new and whole whatever happens."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from sapmerge.errors import NonFiniteError, OutputError, OutputExistsError, SapmergeWarning
from sapmerge.io import atomic, writing
from sapmerge.io.writing import CheckpointWriter
from tests.io.faults import ELEMENTS, Faults, fail_with, read_version, whole_version, write_version

KILLS = int(os.environ.get("SAPMERGE_KILLS", "40"))
NATIVE = ["native", "fallback"]

TENSORS = {
    "z.f32": torch.randn(3, 5),
    "y.f16": torch.randn(7).half(),
    "x.bf16": torch.randn(1, 3).bfloat16(),
    "w.f64": torch.tensor([5e-324, 1.7e308, -0.0], dtype=torch.float64),
    "v.empty": torch.zeros(0, 4),
    "u.scalar": torch.tensor(2.5),
    "t.bool": torch.tensor([True, False, True]),
    "s.int64": torch.tensor([-(2**63), 2**63 - 1]),
    "r.transposed": torch.arange(12.0).reshape(3, 4).T,
    "q.parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "p.odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "ü 层": torch.ones(1),
}


def write(path: Path, tensors: dict[str, torch.Tensor], *, overwrite: bool = False) -> None:
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.commit(
            config={"r": 4, "base": "é"}, metadata={"note": 'line\n"ü"'}, card="# Card ü\n"
        )


def snapshot(folder: Path) -> dict[str, object]:
    """Everything under a folder: names, modes, contents, inode numbers."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (info.st_mode, info.st_ino, content)
    return found


@pytest.fixture(params=NATIVE)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with renameat2(2), once as on a system without it."""
    if request.param == "fallback":
        monkeypatch.setattr(atomic, "_renameat2", None)
    return request.param


# ----------------------------------------------------------------------------------------
# the bytes


def test_reads_back_in_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "out", TENSORS)
    loaded = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (tmp_path / "out" / "README.md").read_text("utf-8") == "# Card ü\n"
    config = (tmp_path / "out" / "adapter_config.json").read_bytes()
    assert config == b'{\n  "base": "\\u00e9",\n  "r": 4\n}\n'
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    raw = {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        for name, tensor in TENSORS.items()
    }
    lines = [f"{name} {hashlib.sha256(raw[name]).hexdigest()}" for name in sorted(raw)]
    assert metadata == {
        "format": "pt",
        "note": 'line\n"ü"',
        "sapmerge.config_sha256": hashlib.sha256(config).hexdigest(),
        "sapmerge.tensors_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def test_layout_is_that_of_the_format(tmp_path: Path) -> None:
    write(tmp_path / "out", TENSORS)
    data = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end
        assert start % TENSORS[name].element_size() == 0
        end = stop
    assert len(data) == 8 + length + end


def test_tensor_bytes_equal_those_of_safetensors(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3) for name in ("b", "c", "a", "a.b")}
    write(tmp_path / "out", tensors)
    ours, theirs = (tmp_path / "out" / "adapter_model.safetensors").read_bytes(), save(tensors)
    assert (
        ours[8 + int.from_bytes(ours[:8], "little") :]
        == theirs[8 + int.from_bytes(theirs[:8], "little") :]
    )


def test_bytes_do_not_depend_on_the_order_of_calls(tmp_path: Path) -> None:
    write(tmp_path / "one", TENSORS)
    write(tmp_path / "two", dict(reversed(TENSORS.items())))
    for name in os.listdir(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    write(tmp_path / "out", {})
    assert load_file(tmp_path / "out" / "adapter_model.safetensors") == {}


def test_peft_loads_it(tmp_path: Path) -> None:
    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(5, 3)

    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["fc"]).to_dict()
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    prefix = "base_model.model.fc.lora_"
    factors = {f"{prefix}A.weight": torch.randn(2, 5), f"{prefix}B.weight": torch.randn(3, 2)}
    with CheckpointWriter(tmp_path / "out") as writer:
        for name, tensor in factors.items():
            writer.add(name, tensor)
        writer.commit(config=json.loads(json.dumps(config, default=str)), metadata={}, card="")
    layer = peft.PeftModel.from_pretrained(Base(), str(tmp_path / "out")).base_model.model.fc
    expected = factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
    torch.testing.assert_close(layer.get_delta_weight("default"), expected)


def test_short_writes_and_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7001], offset))
    monkeypatch.setattr(
        os, "pread", lambda file, size, offset: pread(file, min(size, 6007), offset)
    )
    write_version(tmp_path / "out", 1)
    assert whole_version(tmp_path / "out") == 1


# ----------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_non_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, dtype=dtype)
    tensor[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"'x\.lora_A' has 1 NaN or infinite values of 6"):
        write(tmp_path / "out", {"x.lora_A": tensor})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "__metadata__", "bad \ud800"])
def test_bad_tensor_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="name"):
        write(tmp_path / "out", {name: torch.ones(1)})
    assert os.listdir(tmp_path) == []


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_MAX_HEADER", 1000)

    def commit(**changes: object) -> None:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.commit(**{"config": {}, "metadata": {}, "card": "", **changes})  # pyright: ignore

    for changes, message in [
        ({"config": {"a": float("nan")}}, "not JSON"),
        ({"config": {"a": {1, 2}}}, "not JSON"),
        ({"metadata": {"a": 1}}, "metadata 'a' is not UTF-8 text"),
        ({"card": "\ud800"}, "README.md is not UTF-8 text"),
        ({"metadata": {"a": "x" * 1000}}, "above the format's limit"),
    ]:
        with pytest.raises(OutputError, match=message):
            commit(**changes)
        assert os.listdir(tmp_path) == []


def test_misuse(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out")
    with pytest.raises(OutputError, match="with block"):
        writer.add("a", torch.ones(1))
    with writer:
        writer.add("a", torch.ones(1))
        with pytest.raises(OutputError, match="'a' was added twice"):
            writer.add("a", torch.ones(1))
        with pytest.raises(OutputError, match=r"'b' has the unsupported dtype torch\.complex64"):
            writer.add("b", torch.ones(1, dtype=torch.complex64))
        writer.commit(config={}, metadata={}, card="")
        with pytest.raises(OutputError, match="commit once"):
            writer.commit(config={}, metadata={}, card="")
    assert os.listdir(tmp_path) == ["out"]


def test_not_committed_leaves_no_trace(tmp_path: Path) -> None:
    write_version(tmp_path / "out", 1)
    before = snapshot(tmp_path)

    def interrupted() -> None:
        with CheckpointWriter(tmp_path / "out", overwrite=True) as writer:
            writer.add("a", torch.ones(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with CheckpointWriter(tmp_path / "out", overwrite=True) as writer:
        writer.add("a", torch.ones(1))
    assert snapshot(tmp_path) == before


def test_refused_targets(tmp_path: Path) -> None:
    write_version(tmp_path / "out", 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for name, overwrite, message in [
        ("out", False, "overwrite=True"),
        ("empty", False, "overwrite=True"),
        ("file", True, "not a folder"),
        ("home", True, "no adapter_config.json"),
        ("link", True, "symbolic link"),
        ("dangling", True, "symbolic link"),
        ("missing/out", True, "missing' does not exist"),
        ("file/out", True, "does not exist"),
        ("a\0b", True, "NUL"),
        ("x" * 256, True, "cannot"),
    ]:
        expected = OutputExistsError if "overwrite" in message else OutputError
        with pytest.raises(expected, match=message):
            CheckpointWriter(tmp_path / name, overwrite=overwrite)
        assert snapshot(tmp_path) == before
    with pytest.raises(OutputError, match="root folder"):
        CheckpointWriter("/", overwrite=True)
    write(tmp_path / "empty", {}, overwrite=True)


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    write(Path("out"), {})
    with pytest.raises(OutputExistsError):
        CheckpointWriter(".")
    with CheckpointWriter("../sibling/") as writer:
        monkeypatch.chdir("/")  # the place is fixed when the writer is made
        writer.commit(config={}, metadata={}, card="")
    assert sorted(os.listdir(tmp_path)) == ["cwd", "sibling"]
    assert os.listdir(tmp_path / "cwd") == ["out"]


# ----------------------------------------------------------------------------------------
# the swap


def test_overwrite_swaps_the_folder_whole(tmp_path: Path, system: str) -> None:
    write_version(tmp_path / "out", 1)
    (tmp_path / "out" / "adapter_model.bin").write_text("stale")
    write_version(tmp_path / "out", 2)
    assert whole_version(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "name",
    [
        "second/adapter_config.json",
        "tokenizer.json",
        "README.md/x",
        ".hidden",
        "training_args.bin",
        "link",
    ],
)
def test_what_is_not_of_an_adapter_is_not_deleted(tmp_path: Path, name: str) -> None:
    write_version(tmp_path / "out", 1)
    foreign = tmp_path / "out" / name
    if name.startswith("README"):
        (tmp_path / "out" / "README.md").unlink()
    foreign.parent.mkdir(exist_ok=True)
    if name == "link":
        foreign.symlink_to("nowhere")
    else:
        foreign.write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=rf"more than an adapter: '{name.split('/')[0]}'"):
        write_version(tmp_path / "out", 2)
    assert snapshot(tmp_path) == before


def test_a_file_that_is_put_there_at_the_last_moment_is_kept(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(tmp_path / "out", 1)
    real, looks = atomic.StagedFolder._target_exists, list[bool]()

    def look(self: atomic.StagedFolder) -> bool:
        looks.append(real(self))
        if len(looks) == 2:  # after the last look, before the swap
            (tmp_path / "out" / "notes.txt").write_text("mine")
        return looks[-1]

    monkeypatch.setattr(atomic.StagedFolder, "_target_exists", look)
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write_version(tmp_path / "out", 2)
    assert looks == [True, True]
    assert read_version(tmp_path / "out") == 1
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_a_warning_after_the_swap_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(tmp_path / "out", 1)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_version(tmp_path / "out", 2)
    assert whole_version(tmp_path / "out") == 2
    assert "could not be removed" in caplog.text


def test_what_the_check_refuses_is_not_put_in_place(tmp_path: Path) -> None:
    def refuse(folder: str) -> None:
        assert sorted(os.listdir(folder)) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        raise NonFiniteError("no")

    with pytest.raises(NonFiniteError), CheckpointWriter(tmp_path / "out") as writer:
        writer.commit(config={}, metadata={}, card="", check=refuse)
    assert os.listdir(tmp_path) == []


def test_withdrawing(tmp_path: Path, system: str) -> None:
    """A new output goes, one that replaced another stays, and so does one of somebody else."""

    def written(version: int) -> CheckpointWriter:
        with CheckpointWriter(tmp_path / "out", overwrite=True) as writer:
            writer.add("a", torch.full((ELEMENTS,), float(version)))
            writer.add("b", torch.full((ELEMENTS,), float(version)))
            writer.commit(config={"version": version}, metadata={}, card=f"version {version}")
        return writer

    first = written(1)
    first.withdraw()
    assert os.listdir(tmp_path) == []
    first.withdraw()
    first, second = written(1), written(2)
    first.withdraw()
    second.withdraw()
    assert whole_version(tmp_path / "out") == 2
    assert os.listdir(tmp_path) == ["out"]


def test_output_that_appears_meanwhile(tmp_path: Path, system: str) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        write_version(tmp_path / "out", 1, overwrite=False)
        with pytest.raises(OutputExistsError):
            writer.commit(config={}, metadata={}, card="")
    assert whole_version(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_output_that_appears_at_the_last_moment(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = atomic.StagedFolder._target_exists, []

    def look(self: atomic.StagedFolder) -> bool:
        found = real(self)
        looks.append(found)
        if len(looks) == 2:  # after the last look, before the rename
            monkeypatch.undo()
            write_version(tmp_path / "out", 1)
        return found

    monkeypatch.setattr(atomic.StagedFolder, "_target_exists", look)
    with pytest.raises(OutputExistsError):
        write_version(tmp_path / "out", 2, overwrite=False)
    assert looks == [False, False]
    assert whole_version(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_symlinks_inside_the_old_output_are_not_followed(tmp_path: Path, system: str) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    write_version(tmp_path / "out", 1)
    (tmp_path / "out" / "adapter_config.json").unlink()
    (tmp_path / "out" / "adapter_config.json").symlink_to("../precious/file")
    (tmp_path / "out" / "adapter_model.bin").symlink_to("../precious")
    before = snapshot(tmp_path / "precious")
    write_version(tmp_path / "out", 2)
    assert whole_version(tmp_path / "out") == 2
    assert snapshot(tmp_path / "precious") == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_parent_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_version(tmp_path / "link" / "out", 1)
    assert whole_version(tmp_path / "real" / "out") == 1


def test_files_planted_in_the_temporary_folder_are_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with CheckpointWriter(tmp_path / "out") as writer:
        (temporary,) = tmp_path.glob(".out.*")
        (temporary / "adapter_config.json").symlink_to(tmp_path / "precious")
        with pytest.raises(OutputError, match="EEXIST"):
            writer.commit(config={}, metadata={}, card="")
    assert (tmp_path / "precious").read_text() == "mine"
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_version(tmp_path / "out", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o777 & ~mask
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o7777 == 0o666 & ~mask


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path: Path) -> None:
    with Faults(0, lambda: None) as calls:
        write_version(tmp_path / "out", 1)
    changes = [name for name in calls.names if name in ("pwrite", "fsync", "_renameat2", "rename")]
    scratch, model = ["pwrite"] * 2, ["pwrite"] * 3 + ["fsync"]
    texts, folder = ["pwrite", "fsync"] * 2, ["fsync"]
    assert changes == [*scratch, *model, *texts, *folder, "_renameat2", "fsync"]


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for version in range(3):
        write_version(tmp_path / "out", version)
    with pytest.raises(OutputError), Faults(20, fail_with(errno.EIO)):
        write_version(tmp_path / "out", 3)
    assert sorted(os.listdir("/proc/self/fd")) == before


# ----------------------------------------------------------------------------------------
# leftovers


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_of_the_dead_are_swept_and_of_the_living_kept(tmp_path: Path) -> None:
    def leftover(process: int, name: str = "o.t") -> Path:
        folder = tmp_path / f".{name}.sapmerge-{process}-0123abcd.tmp"
        (folder / "deep").mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        return folder

    dead = dead_process()
    # our own id, but nobody holds the lock: an earlier life
    swept = [
        leftover(dead),
        leftover(os.getpid()),
    ]
    kept = [
        leftover(os.getppid()),
        leftover(dead, "other"),
        leftover(dead, "o.ter"),
        leftover(dead, "out"),
    ]
    with CheckpointWriter(tmp_path / "o.t") as writer:
        running = set(tmp_path.glob(".o.t.*")) - {*swept, *kept}
        # another writer of this process must not sweep the one that runs
        CheckpointWriter(tmp_path / "o.t")
        assert len(running) == 1
        assert all(path.exists() for path in running)
        writer.commit(config={}, metadata={}, card="")
    assert not any(path.exists() for path in swept)
    assert all(path.exists() for path in kept)


def test_planted_leftover_that_is_a_symlink_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / f".out.sapmerge-{dead_process()}-0123abcd.tmp").symlink_to("precious")
    write_version(tmp_path / "out", 1)
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_old_output_left_aside_is_put_back(tmp_path: Path) -> None:
    write_version(tmp_path / "out", 1)
    aside = tmp_path / f".out.sapmerge-{dead_process()}-0123abcd.old"
    (tmp_path / "out").rename(aside)
    with pytest.raises(OutputExistsError):
        CheckpointWriter(tmp_path / "out")
    assert whole_version(tmp_path / "out") == 1
    assert os.listdir(tmp_path) == ["out"]


# ----------------------------------------------------------------------------------------
# faults


def run_faults(folder: Path, code: int, *, existing: bool, sticky: bool = False) -> int:
    """Fails the N-th call, N = 1, 2, ... until none is left; returns how many faults that were."""
    path = folder / "out"
    for number in range(1, 1000):
        if existing:
            write_version(path, 1)
        elif path.exists():
            shutil.rmtree(path)
        before, message = snapshot(folder), ""
        faults = Faults(number, fail_with(code), sticky=sticky)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SapmergeWarning)
            try:
                with faults:
                    write_version(path, 2, overwrite=existing)
            except OutputError as error:
                message = str(error)
                assert repr(str(path)) in message
        where = f"call {number} ({faults.fired})"
        if message and not sticky:
            assert snapshot(folder) == before, where
        elif message:  # nothing could be removed or put back any more: the next writer does it
            CheckpointWriter(path, overwrite=True)
            if "in place, but perhaps not on disk" in message:
                assert (whole_version(path), os.listdir(folder)) == (2, ["out"]), where
            else:
                assert snapshot(folder) == before, where
        else:  # the fault came after the swap, or in something that does not matter
            assert whole_version(path) == 2, where
            assert caught or os.listdir(folder) == ["out"], where
            CheckpointWriter(path, overwrite=True)
            assert os.listdir(folder) == ["out"], where
        if faults.fired is None:
            return number - 1
    raise AssertionError("the writer never finished")


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "overwrite"])
@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EFBIG],
    ids=lambda code: errno.errorcode[code],
)
def test_every_call_fails_once(tmp_path: Path, system: str, code: int, existing: bool) -> None:
    assert run_faults(tmp_path, code, existing=existing) > 40


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "overwrite"])
def test_every_call_fails_from_a_moment_on(tmp_path: Path, system: str, existing: bool) -> None:
    assert run_faults(tmp_path, errno.EIO, existing=existing, sticky=True) > 40


def test_message_names_path_operation_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointWriter(tmp_path / "out") as writer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OutputError) as caught:
            writer.add("x.lora_A.weight", torch.ones(ELEMENTS))
    path = str(tmp_path / "out")
    expected = f"{path!r}: cannot write tensor 'x.lora_A.weight': No space left on device (ENOSPC)"
    assert str(caught.value) == expected


# ----------------------------------------------------------------------------------------
# kills


def run_script(task: str, folder: Path, amount: float, system: str) -> dict[str, int]:
    tests = Path(__file__).parents[1]
    search = os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(tests / "io" / "faults.py"), task, str(folder), str(amount), system],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("system", NATIVE)
def test_random_kills(tmp_path: Path, system: str) -> None:
    seen = run_script("random", tmp_path, KILLS if system == "native" else KILLS // 2, system)
    assert seen["advanced"] > 0
    assert system == "fallback" or seen["absent"] == 0


@pytest.mark.parametrize("system", NATIVE)
def test_kill_at_every_call(tmp_path: Path, system: str) -> None:
    seen = run_script("calls", tmp_path, 0, system)
    assert seen["absent before, version None after"] > 30
    assert seen["absent before, version 2 after"] > 3
    assert seen["version 1 before, version 1 after"] > 30
    assert seen["version 1 before, version 2 after"] > 10


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    seen = run_script("race", tmp_path, 1.0, "native")
    assert seen["whole"] > 10
    assert "absent" not in seen
