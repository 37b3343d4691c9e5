"""What all commands share: errors of one line, help, what is imported."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sapmerge as sm
from sapmerge.cli import main
from sapmerge.cli.commands import parser

from .shell import fails, python


def test_errors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = ("merge", "left", "right", "-o", "out", "--method")
    assert "'nowhere'" in fails(capsys, "merge", "nowhere", "-o", "out", "--method", "mean")
    assert "there is no method 'tise'" in fails(capsys, *merge, "tise")
    assert "not Python syntax" in fails(capsys, *merge, "Chain(")
    assert "'eval'" in fails(capsys, *merge, "eval('1')")
    assert "got 1" in fails(capsys, *merge, "mean", "--weights", "1")
    assert "--weights takes numbers" in fails(capsys, *merge, "mean", "--weights", "1,x")
    assert "'layers.0.q'" in fails(capsys, "merge", "left", "wide", "-o", "out", "--method", "mean")
    assert "rank" in fails(capsys, *merge, "mean", "--rank", "0")
    assert "'many'" in fails(capsys, *merge, "mean", "--rank", "many")
    assert "finite" in fails(capsys, *merge, "mean", "--scale", "nan")
    assert "--method" in fails(capsys, "merge", "left", "-o", "out")
    assert "density" in fails(capsys, *merge, "ties", "--density", "much")
    assert "nowhere" in fails(capsys, "inspect", "nowhere")
    assert "COMMAND" in fails(capsys)
    assert "'mrege'" in fails(capsys, "mrege")


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(sm.AdapterFormatError):
        main(["merge", "nowhere", "-o", "out", "--method", "mean", "--debug"])
    with pytest.raises(sm.AdapterFormatError):
        main(["inspect", "nowhere", "--debug"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--version"], sm.__version__),
        (["--help"], "inspect"),
        (["merge", "--help"], "example: sapmerge merge"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def test_what_prints_a_result_prints_it_as_data() -> None:
    """Every command but `completion`, which prints a script."""
    commands = dict(leaves(parser(), ()))
    assert len(commands) > 15
    without = {name for name, one in commands.items() if "--json" not in one.format_help()}
    assert without == {"completion"}
    long = {name for name, one in commands.items() if "--quiet" in one.format_help()}
    assert long == {"merge", "compare", "anchors", "score", "demo"}


def leaves(
    of: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All commands that run something, by name."""
    below = [a for a in of._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield " ".join(path), of
    for action in below:
        for name, one in action.choices.items():
            yield from leaves(one, (*path, name))


def test_as_a_module(here: Path) -> None:
    done = python(
        "-m", "sapmerge", "merge", "left", "right", "-o", "out", "--method", "mean", cwd=here
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "written to out" in done.stdout
    failed = python(
        "-m", "sapmerge", "merge", "left", "right", "-o", "out", "--method", "mean", cwd=here
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1
    debug = python(
        "-m", "sapmerge", "merge", "nowhere", "-o", "new", "--method", "mean", "--debug", cwd=here
    )
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "AdapterFormatError" in debug.stderr


@pytest.mark.parametrize(
    "command",
    ["--help", "merge --help", "round add --help", "methods", "methods ties --json", "--version"],
)
def test_help_does_not_wait_for_torch(command: str, tmp_path: Path) -> None:
    """Two seconds, when a shell's user only asks what there is."""
    code = (
        "import atexit, sys\n"
        "from sapmerge.cli import main\n"
        "slow = 'torch numpy peft safetensors yaml'.split()\n"
        "atexit.register(lambda: print([n for n in slow if n in sys.modules], file=sys.stderr))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = python("-c", code, *command.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_importing_sapmerge_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys, sapmerge, sapmerge.cli\n"
        "heavy = 'torch numpy peft transformers regex huggingface_hub sklearn matplotlib "
        "safetensors PIL'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.skipif(os.name == "nt", reason="closes file descriptors of POSIX shells")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_process_without_stdout_or_stderr_merges(here: Path, closed: str) -> None:
    """A service may have neither: sys.stdout is None there, and so it is under pythonw."""
    line = f"{sys.executable} -m sapmerge merge left right -o out --method mean {closed}"
    env = {**os.environ, "PYTHONPATH": str(Path(sm.__file__).parents[1])}
    found = subprocess.run(line, shell=True, capture_output=True, cwd=here, env=env, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    got, wanted = sm.Adapter.load(here / "out"), sm.merge(["left", "right"], method=sm.mean())
    for name, update in wanted.updates():
        assert torch.allclose(got.update(name).dense(), update.dense(), atol=1e-6)


def test_a_merge_without_stderr(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = dict(sm.merge(["left", "right"], method=sm.mean()).updates())
    monkeypatch.setattr(sys, "stderr", None)
    for name, update in sm.merge(["left", "right"], method=sm.mean()).updates():
        assert torch.equal(update.dense(), wanted[name].dense())
