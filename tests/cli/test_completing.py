"""`sapmerge completion`, run in a shell where there is one."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from sapmerge.cli import main
from sapmerge.method_names import names


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    code = (
        f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _sapmerge; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-c", code, "bash", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "sapmerge", "me") == ["merge", "methods"]
    assert set(completed(script, "sapmerge", "round", "")) >= {"new", "add", "list", "merge"}
    assert completed(script, "sapmerge", "merge", "a", "--loss", "con") == ["contrastive"]
    assert completed(script, "sapmerge", "merge", "a", "--push") == ["--push-to-hub"]
    assert completed(script, "sapmerge", "round", "add", "--cl") == ["--client"]
    assert completed(script, "sapmerge", "merge", "a", "b") == []  # files: the shell's own
    assert completed(script, "sapmerge", "merge", "--method", "") == names()
    assert completed(script, "sapmerge", "convert", "x", "--to", "d") == ["diffusers"]


def test_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    bash = capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.endswith(bash)
    assert main(["completion", "fish"]) == 0
    fish = capsys.readouterr().out.splitlines()
    assert (
        "complete -c sapmerge -n '__fish_seen_subcommand_from convert' -l to "
        "-xa 'peft kohya diffusers mlx torchtune'"
    ) in fish
