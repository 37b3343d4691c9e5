"""Whatever is given to `merge`, an error is one of ours,
and the order of what is given decides on nothing.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge.cli import main
from tests.trust.helpers import Small, batches, loss, same, state, tensors_of, write_adapter


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]


HUGE = 10**5000


@pytest.mark.parametrize(
    "wrong",
    [
        *({"cache": value} for value in (5, b"folder", True)),
        *({"scale": value} for value in (10**400, HUGE, "1", None, True, [1], float("nan"), 1j)),
        *(
            {"weights": value}
            for value in ([10**400, 1, 1], [HUGE, 1, 1], 5, "abc", [1, 2], {1: 1, "a": 2}, {})
        ),
        {"weights": [None] * 3},
        *(
            {"weights": value}
            for value in (
                [1e308] * 3,
                [1e308, -1e308, 1.0],
                [2e38] * 3,
                {"a": 1e39, "b": 1, "c": 1},
            )
        ),
        *(
            {"adapters": value}
            for value in (None, 5, [], {}, [None], [1.5], [(1, 2, 3)], "abc", [b"\xff\x00"])
        ),
        *({"device": value} for value in ([1], "meta", "no such", True, 99, object(), 1.5, "")),
        *(
            {"rank": value}
            for value in (0, HUGE - HUGE, -HUGE, "most", 1.0, True, [1], float("nan"))
        ),
    ],
    ids=lambda value: str(type(next(iter(value.values())))) + next(iter(value)),
)
def test_wrong_arguments(paths: list[Path], wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"adapters": paths, "method": sm.mean(), **wrong}
    with pytest.raises(sm.SapmergeError):
        sm.merge(arguments.pop("adapters"), **arguments)


def test_weights_that_overflow_are_not_said_to_sum_to_zero(paths: list[Path]) -> None:
    with pytest.raises(sm.MethodError, match="too large"):
        sm.merge(paths, method=sm.mean(), weights=[1e308] * 3)


@pytest.mark.parametrize("wrong", [5, None, "a\0b", b"a\0b", ["out"], 1.5])
def test_wrong_paths(paths: list[Path], tmp_path: Path, wrong: Any) -> None:
    merged = sm.merge(paths, method=sm.mean())
    with pytest.raises(sm.OutputError):
        merged.save_pretrained(wrong)
    with pytest.raises(sm.SapmergeError):
        merged.save_merged(paths[0], wrong)
    for action in (
        lambda: merged.save_merged(wrong, tmp_path / "out"),
        lambda: sm.Adapter.load(wrong),
        lambda: sm.verify(wrong),
        lambda: sm.reproduce(wrong, paths),
    ):
        with pytest.raises(sm.SapmergeError):
            action()


def test_a_path_of_bytes_is_one(paths: list[Path], tmp_path: Path) -> None:
    sm.merge(paths, method=sm.mean()).save_pretrained(os.fsencode(tmp_path / "out"))
    assert sm.verify(os.fsencode(tmp_path / "out"), paths) == []


@pytest.mark.parametrize("wrong", ["a", Path("a"), b"a", 5])
def test_inputs_are_a_list(paths: list[Path], tmp_path: Path, wrong: Any) -> None:
    sm.merge(paths, method=sm.mean()).save_pretrained(tmp_path / "out")
    for check in (sm.verify, sm.reproduce):
        with pytest.raises(sm.MethodError, match="list of folders"):
            check(tmp_path / "out", wrong)


@pytest.mark.parametrize("wrong", [None, "model", 5, [Small()]])
def test_what_is_no_model_is_refused(paths: list[Path], wrong: Any) -> None:
    merged = sm.merge(paths, method=sm.mean())
    with pytest.raises(sm.ModelMismatchError, match="torch module"):
        merged.apply_to(wrong)
    with pytest.raises(sm.ModelMismatchError, match="PeftModel"):
        merged.add_to(wrong, "merged")


def test_device_0_is_not_the_cpu(paths: list[Path]) -> None:
    if torch.cuda.is_available():
        assert sm.merge(paths, method=sm.mean(), device=0).stream.device == torch.device("cuda", 0)
    else:
        with pytest.raises(sm.MethodError, match="device=0 cannot be used"):
            sm.merge(paths, method=sm.mean(), device=0)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(0, 8), "batch 1 of the anchors is empty"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "empty"),
        (torch.eye(8).to_sparse(), "sparse"),
        ({"x": torch.zeros(2, 8), "more": [torch.eye(3).to_sparse_csr()]}, "sparse"),
        (torch.zeros(2, 8, device="meta"), "meta"),
        ((torch.zeros(2, 8), torch.zeros(2, device="meta")), "meta"),
        (torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(1, 8)]), "nested"),
        (torch.quantize_per_tensor(torch.zeros(2, 8), 0.1, 0, torch.qint8), "quantised"),
    ],
    ids=[
        "no samples",
        "no ids",
        "sparse",
        "sparse inside",
        "meta",
        "meta inside",
        "nested",
        "quantised",
    ],
)
def test_odd_batches(paths: list[Path], batch: Any, words: str) -> None:
    with pytest.raises(sm.AnchorError, match=words):
        sm.merge(paths, [torch.ones(2, 8), batch], Small(), loss=loss)


@pytest.mark.parametrize(
    "value",
    [None, 1.0, torch.ones(3), torch.ones((), dtype=torch.complex64), torch.tensor(3), "1"],
    ids=lambda value: str(value)[:20],
)
def test_odd_losses(paths: list[Path], value: Any) -> None:
    model = Small()
    before = state(model)
    with pytest.raises(sm.AnchorError, match="the loss"):
        sm.merge(paths, batches(), model, loss=lambda m, b: value, method=sm.sap_original())
    assert same(before, state(model))


@pytest.mark.parametrize("name", ["mean", "ties", "dare", "knots"])
def test_one_adapter_twice_in_any_order(tmp_path: Path, paths: list[Path], name: str) -> None:
    written = set[tuple[bytes, bytes]]()
    for number, order in enumerate(itertools.permutations([(0, 1.0), (0, 2.0), (1, 0.5)])):
        merged = sm.merge(
            [paths[k] for k, _ in order],
            method=getattr(sm, name)(),
            weights=[weight for _, weight in order],
            rank="exact",
        )
        merged.save_pretrained(out := tmp_path / f"out{number}")
        written.add((tensors_of(out), (out / "README.md").read_bytes()))
    assert len(written) == 1


def test_twins_in_any_order(tmp_path: Path, paths: list[Path]) -> None:
    """The same update under two names, and in files of other bytes."""
    twin = shutil.copytree(paths[0], tmp_path / "twin")
    other = shutil.copytree(paths[0], tmp_path / "elsewhere" / "a")
    (other / "adapter_config.json").write_text((other / "adapter_config.json").read_text() + " ")
    assert len({sm.Adapter.load(path).digest for path in (paths[0], twin, other)}) == 1
    written = set[bytes]()
    for number, order in enumerate(itertools.permutations([paths[0], twin, other, paths[1]])):
        sm.merge(list(order), method=sm.ties(0.5), rank="exact").save_pretrained(
            tmp_path / f"out{number}"
        )
        written.add(tensors_of(tmp_path / f"out{number}"))
    assert len(written) == 1


def test_what_strangers_call_their_folders_does_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["\x1b]0;owned\x07\x1b[2J\nfake", "b\x9b31m\u202e"]
    inputs = [write_adapter(tmp_path / name, seed) for seed, name in enumerate(names)]
    assert (
        main(["merge", *map(str, inputs), "-o", str(tmp_path / "o\x1b[2Jut"), "--method", "mean"])
        == 0
    )
    assert main(["inspect", *map(str, inputs)]) == 0
    assert main(["verify", str(tmp_path / "o\x1b[2Jut"), "--inputs", *map(str, inputs)]) == 0
    assert main(["verify", str(inputs[0])]) == 2
    assert (
        main(
            [
                "merge",
                str(tmp_path / "no\x1b[1m\nsuch"),
                "-o",
                str(tmp_path / "x"),
                "--method",
                "mean",
            ]
        )
        == 2
    )
    said = "".join(capsys.readouterr())
    assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert "\nfake" not in said
    assert "\nsuch" not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_letters_is_no_error(tmp_path: Path, encoding: str) -> None:
    inputs = [
        str(write_adapter(tmp_path / name, seed, base_model_name_or_path="модель/😀"))
        for seed, name in enumerate("ab")
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sapmerge",
            "merge",
            *inputs,
            "-o",
            str(tmp_path / "o"),
            "--method",
            "mean",
        ],
        capture_output=True,
        env={
            "PYTHONIOENCODING": encoding,
            "PYTHONPATH": ":".join(sys.path),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u043c" in done.stdout


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path, paths: list[Path]) -> None:
    command = [sys.executable, "-m", "sapmerge", "inspect", "--json", *map(str, paths * 40)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_what_exists_is_a_folder_whatever_is_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_adapter(Path("lr=0.1/a"), 1)
    write_adapter(Path("0.1/a"), 2, rank=3)
    assert main(["inspect", "lr=0.1/a"]) == 0
    assert " 2 " in capsys.readouterr().out  # the rank
    assert main(["inspect", "mine=0.1/a"]) == 0
    assert "mine" in capsys.readouterr().out


def test_stdout_may_be_closed(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["inspect", str(paths[0])]) == 0
