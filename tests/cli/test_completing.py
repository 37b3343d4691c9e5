"""`sapmerge completion`, run in the shells that there are."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sapmerge.cli import main
from sapmerge.cli.choices import SPELLINGS
from sapmerge.method_names import names

Completed = Callable[[str], list[str]]
"""What a shell offers for the last word of a line; files are not what is tested."""

ZSHRC = """
autoload -Uz compinit
compinit -u -D
{setup}
insert_all() {{ compstate[insert]=all }}
complete_all() {{
    comppostfuncs=(insert_all)
    _main_complete
}}
zle -C all complete-word complete_all
zle-line-init() {{
    local line
    while IFS= read -r line; do
        BUFFER=$line
        CURSOR=$#BUFFER
        zle all
        print -r -- "$BUFFER" >> answers
    done < asked
    exit
}}
zle -N zle-line-init
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def bash(script: str, folder: Path) -> Completed:
    def completed(line: str) -> list[str]:
        words = line.replace("=", " = ").split(" ")  # as bash does
        code = (
            f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _sapmerge; '
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "--norc", "-c", code, "bash", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.splitlines() if done.stdout.strip() else []

    return completed


def fish(script: str, folder: Path) -> Completed:
    (folder / "script.fish").write_text(script)

    def completed(line: str) -> list[str]:
        code = f"source script.fish; complete -C '{line}'"
        command = ["fish", "--no-config", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        assert done.stderr == ""
        return [answer.partition("\t")[0] for answer in done.stdout.splitlines()]

    return completed


def zsh(script: str, folder: Path, setup: str = "source ./script.zsh") -> Completed:
    """A zsh on a terminal of its own, which inserts all that it would list."""
    (folder / "script.zsh").write_text(script)
    (folder / ".zshrc").write_text(ZSHRC.format(setup=setup))

    def completed(line: str) -> list[str]:
        (folder / "asked").write_text(f"{line}\n")
        (folder / "answers").unlink(missing_ok=True)
        main_end, end = os.openpty()
        try:
            subprocess.run(
                ["zsh", "-d", "-i"],
                stdin=end, stdout=end, stderr=end, cwd=folder, timeout=60, start_new_session=True,
                env={**os.environ, "ZDOTDIR": str(folder), "TERM": "xterm"},
            )  # fmt: skip
        finally:
            os.close(end)
            os.close(main_end)
        begun, _, last = line.rpartition(" ")
        answer = (folder / "answers").read_text().rstrip("\n")
        assert answer.startswith(begun)
        found = answer[len(begun) :].split()
        return [] if found == [last] else found  # nothing to add

    return completed


SHELLS = {"bash": bash, "fish": fish, "zsh": zsh}


@pytest.fixture(params=list(SHELLS))
def completed(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Completed:
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param}")
    (tmp_path / "folder").mkdir()
    return SHELLS[request.param](script(request.param, capsys), tmp_path)


def test_commands_flags_and_choices(completed: Completed) -> None:
    for line, wanted in (
        ("sapmerge me", {"merge", "methods"}),
        ("sapmerge --v", {"--version"}),
        ("sapmerge round ad", {"add"}),
        ("sapmerge round --he", {"--help"}),
        ("sapmerge cache m", {"merge"}),
        ("sapmerge merge a --loss con", {"contrastive"}),
        ("sapmerge merge a --push", {"--push-to-hub"}),
        ("sapmerge merge --save-dtype float", {"float32", "float16"}),
        ("sapmerge convert x --to d", {"diffusers"}),
        ("sapmerge round add r --cl", {"--client"}),
        ("sapmerge completion f", {"fish"}),
        ("sapmerge methods tie", {"ties"}),
        ("sapmerge merge a --method tie", {"ties"}),
    ):
        assert set(completed(line)) == wanted, line


def test_commands_are_told_by_their_place(completed: Completed) -> None:
    """Not by a word that stands anywhere: folders may be called as commands are."""
    assert set(completed("sapmerge round merge r --m")) == {"--method", "--modules-to-save"}
    assert set(completed("sapmerge inspect merge anchors round --j")) == {"--json"}
    assert set(completed("sapmerge inspect methods --me")) == set()
    assert set(completed("sapmerge cache merge k --j")) == {"--json"}


def test_all_methods(completed: Completed) -> None:
    assert set(completed("sapmerge merge --method ")) == set(names())


def test_files_where_nothing_else_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shell in ("fish", "zsh"):
        if shutil.which(shell) is not None:
            completed = SHELLS[shell](script(shell, capsys), tmp_path)
            (tmp_path / "folder").mkdir(exist_ok=True)
            for line in ("sapmerge merge fol", "sapmerge merge a -o fol", "sapmerge check fol"):
                assert completed(line) == ["folder/"], (shell, line)
    if shutil.which("bash") is not None:  # files are what bash has where there is no answer
        completed = bash(script("bash", capsys), tmp_path)
        assert completed("sapmerge merge a fol") == completed("sapmerge merge -o fol") == []
        assert "complete -o default" in script("bash", capsys)


def test_values_with_a_space_and_after_an_equals_sign(completed: Completed) -> None:
    assert [one for one in SPELLINGS if " " in one] == ["transformers 5", "transformers 4"]
    found = " ".join(completed("sapmerge merge a --names transf"))
    for quote in ("\\", "'", '"'):
        found = found.replace(quote, "")
    assert sorted(found.split()) == ["4", "5", "transformers", "transformers"]
    found = completed("sapmerge merge a --loss=con")
    assert found in (["contrastive"], ["--loss=contrastive"])


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_without_completion_and_from_fpath(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluated where nobody has run compinit; and as a file in a folder of functions."""
    text = script("zsh", capsys)
    bare = "unfunction compdef compinit; source ./script.zsh; autoload -Uz compinit"
    assert zsh(text, tmp_path, bare)("sapmerge insp") == ["inspect"]
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions" / "_sapmerge").write_text(text)
    setup = "fpath=($PWD/functions $fpath); compinit -u -D"
    completed = zsh("", tmp_path, setup)
    assert completed("sapmerge insp") == ["inspect"]
    assert completed("sapmerge round ad") == ["add"]
