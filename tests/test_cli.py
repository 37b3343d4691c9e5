"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sapmerge as sm
from sapmerge import methods
from sapmerge.cli import main

from .conftest import error
from .models import BASE, Block, files, products, save_lora

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(width)])
        self.classifier = nn.Linear(width, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    save_lora(root / "left", 1, Net(), targets=["q", "v"])
    save_lora(root / "right", 2, Net(), targets=["q", "v"], r=2)
    save_lora(root / "same", 7, Net(), targets=["q", "v"])
    for seed, name in ((3, "one"), (4, "two")):
        save_lora(root / name, seed, Net(), targets=["q"], modules_to_save=["classifier"])
    save_lora(root / "wide", 3, Net(16), targets=["q"])
    return root


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the adapters in it."""
    for source in root.iterdir():
        (tmp_path / source.name).symlink_to(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """One line on stderr, nothing on stdout, exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), out + err
    assert err.count("\n") == 1, err
    assert err.startswith("sapmerge"), err
    assert "Traceback" not in err
    assert not os.path.exists("out")
    return err


def test_merge(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "left", "right", "-o", "out", "--method", "mean"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where nobody looks
    for text in (
        "Chain(Mean())",
        "left",
        "right",
        "layers.0.q",
        "energy kept 100.0%",
        "written to out",
        BASE,
    ):
        assert text in out
    left, right = products(here / "left", 2.0), products(here / "right", 4.0)
    merged = sm.Adapter.load("out")
    for name in left:
        assert error(merged.update(name).dense(), (left[name] + right[name]) / 2) < 1e-6


def test_the_same_bytes_as_from_python(here: Path) -> None:
    main(
        [
            "merge",
            "left",
            "right",
            "-o",
            "out",
            "--method",
            "ties",
            "--density",
            "0.3",
            "--weights",
            "1,-0.5",
            "--scale",
            "0.7",
            "--rank",
            "0.95",
            "--quiet",
        ]
    )
    sm.merge(
        ["left", "right"], method=sm.ties(0.3), weights=[1, -0.5], scale=0.7, rank=0.95
    ).save_pretrained("python")
    assert files(here / "out") == files(here / "python")


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_by_its_name(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    factory = getattr(sm, name)
    command = ["merge", "left", "same", "-o", "out", "--rank", "exact", "--method", name]
    if name in methods.anchored.__all__:
        assert "anchors and a model" in fails(capsys, *command)
        return
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "written to out" in out
    assert all(line.startswith("sapmerge: warning: ") for line in err.splitlines())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sm.merge(["left", "same"], method=factory(), rank="exact").save_pretrained("python")
    assert files(here / "out") == files(here / "python")


def test_options_of_methods(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "merge",
            "left",
            "right",
            "-o",
            "a",
            "--method",
            "dare",
            "--seed",
            "3",
            "--density",
            "0.4",
            "--rank",
            "exact",
        ]
    )
    out = capsys.readouterr().out
    assert "Random(seed=3)" in out
    assert "density=0.4" in out
    assert "has no density" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "mean", "--density", "0.5"
    )
    assert "has no seed" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "ties", "--seed", "1"
    )
    assert "--density goes with a method's name" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "ties()", "--density", "0.5"
    )
    assert "write 0.2" in fails(
        capsys, "merge", "left", "-o", "out", "--method", "ties", "--density", "20"
    )


def test_rank_and_labels(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "a=left", "b=right", "-o", "out", "--method", "mean", "--rank", "2"]) == 0
    out, err = capsys.readouterr()
    assert {module.rank for module in sm.Adapter.load("out").modules.values()} == {2}
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("a ", "b "))] == [
        "a",
        "b",
    ]
    assert err.count("\n") <= 1
    assert err == "" or err.startswith("sapmerge: warning: the stored adapter keeps")


def test_a_warning_is_one_line_on_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["merge", "left", "right", "-o", "out", "--method", "ties", "--rank", "1", "--quiet"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sapmerge: warning: the stored adapter keeps ")
    assert err.count("\n") == 1


def test_heads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "one", "two", "-o", "out", "--method", "mean"]
    assert "'classifier' in one, two" in fails(capsys, *command)
    assert main([*command, "--modules-to-save", "classifier=two"]) == 0
    two = sm.Adapter.load("two").saved_tensor("classifier.weight")
    assert torch.equal(sm.Adapter.load("out").saved_tensor("classifier.weight"), two)
    assert main([*command, "--modules-to-save", "drop", "--overwrite"]) == 0
    assert not sm.Adapter.load("out").saved


def test_base_model(here: Path) -> None:
    assert (
        main(
            [
                "merge",
                "left",
                "-o",
                "out",
                "--method",
                "mean",
                "--base-model",
                "other/base",
                "--quiet",
            ]
        )
        == 0
    )
    assert sm.Adapter.load("out").base_model == "other/base"


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


def test_negative_weights_first(here: Path) -> None:
    assert (
        main(
            [
                "merge",
                "left",
                "right",
                "-o",
                "out",
                "--method",
                "task_arithmetic",
                "--weights=-1,1",
                "--quiet",
            ]
        )
        == 0
    )
    left, right = products(here / "left", 2.0), products(here / "right", 4.0)
    for name in left:
        assert error(sm.Adapter.load("out").update(name).dense(), right[name] - left[name]) < 1e-6


def test_an_existing_output(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["merge", "left", "-o", "kept", "--method", "mean"]
    assert main(command) == 0
    capsys.readouterr()
    before = files(here / "kept")
    assert "kept" in fails(capsys, *command)
    assert files(here / "kept") == before
    assert main([*command, "--overwrite", "--scale", "2"]) == 0
    assert files(here / "kept") != before


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(sm.AdapterFormatError):
        main(["merge", "nowhere", "-o", "out", "--method", "mean", "--debug"])
    with pytest.raises(sm.AdapterFormatError):
        main(["inspect", "nowhere", "--debug"])


MINE = """
import torch, sapmerge as sm

def score(values, stats):
    return values.abs() ** 2

def half(scores):
    return scores > 0.05

def twice(pruned, original):
    return pruned.scaled(2.0)

def flip(layer):
    return layer.with_updates([u.scaled(-1.0) for u in layer])

def first(layer):
    return layer.updates[layer.adapters.index("left")]

class Named:
    @staticmethod
    def first(layer):
        return first(layer)

constant = 3
"""


def test_functions_of_the_user(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my_rules.py").write_text(MINE)
    left = products(here / "left", 2.0)
    for number, method in enumerate(("my_rules:first", "my_rules:Named.first")):
        assert main(["merge", "left", "right", "-o", f"first{number}", "--method", method]) == 0
        merged = sm.Adapter.load(f"first{number}")
        assert all(error(merged.update(name).dense(), left[name]) < 1e-6 for name in left)
    assert "'my_rules:first'" in capsys.readouterr().out
    recipe = (
        "Chain(Prune('my_rules:score', 'my_rules:half', 'my_rules:twice'), 'my_rules:flip', "
        "'my_rules:first')"
    )
    assert (
        main(
            [
                "merge",
                "left",
                "right",
                "-o",
                "all",
                "--method",
                recipe,
                "--rank",
                "exact",
                "--quiet",
            ]
        )
        == 0
    )
    for name, matrix in left.items():
        wanted = torch.where(matrix**2 > 0.05, -2 * matrix, 0.0)
        assert error(sm.Adapter.load("all").update(name).dense(), wanted) < 1e-5
    capsys.readouterr()
    merge = ("merge", "left", "right", "-o", "out", "--method")
    assert "nothing" in fails(capsys, *merge, "my_rules:nothing")
    assert "not a function" in fails(capsys, *merge, "my_rules:constant")
    assert "no_such_module" in fails(capsys, *merge, "no_such_module:f")
    assert "no_such_module" in fails(capsys, *merge, "Chain('no_such_module:f')")
    (here / "broken_rules.py").write_text("def f(:\n")
    assert "broken_rules" in fails(capsys, *merge, "broken_rules:f")
    (here / "raising_rules.py").write_text("raise RuntimeError('on\\nimport')\n")
    assert "on import" in fails(capsys, *merge, "raising_rules:f")


def needy(density: float) -> sm.Method:
    return sm.ties(density)


def test_a_method_without_defaults_says_what_it_takes(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "needy", needy, raising=False)
    monkeypatch.setattr(methods, "__all__", ["needy"])
    command = ("merge", "left", "right", "-o", "out", "--method", "needy")
    assert "'needy' needs density" in fails(capsys, *command)
    assert main([*command, "--density", "0.5", "--rank", "exact"]) == 0


def test_a_recipe(here: Path) -> None:
    recipe = repr(sm.knots(0.4))
    main(["merge", "left", "right", "-o", "out", "--method", recipe, "--rank", "exact", "--quiet"])
    main(
        [
            "merge",
            "left",
            "right",
            "-o",
            "named",
            "--method",
            "knots",
            "--density",
            "0.4",
            "--rank",
            "exact",
            "--quiet",
        ]
    )
    assert files(here / "out") == files(here / "named")


def test_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "left", "right"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{sm.inspect(['left', 'right'])}\n"
    assert err == ""
    assert main(["inspect", "left", "right", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        json.dumps(sm.inspect(["left", "right"]).to_dict())
    )
    assert main(["inspect", "left", "wide"]) == 0
    assert "mergeable: no: module 'layers.0.q'" in capsys.readouterr().out
    assert main(["inspect", "left"]) == 0


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--version"], sm.__version__),
        (["--help"], "inspect"),
        (["merge", "--help"], "knots"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert text in capsys.readouterr().out


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


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


def test_importing_sapmerge_imports_little(tmp_path: Path) -> None:
    code = (
        "import sys, sapmerge, sapmerge.cli\n"
        "heavy = 'peft transformers regex huggingface_hub sklearn matplotlib safetensors "
        "PIL'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


class Terminal:
    def __init__(self, real: object, tty: bool) -> None:
        self.real, self.tty = real, tty

    def isatty(self) -> bool:
        return self.tty

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)


PROGRESS = [(True, None, True), (False, None, False), (True, False, False), (False, True, True)]


@pytest.mark.parametrize(("tty", "asked", "shown"), PROGRESS)
def test_progress(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tty: bool,
    asked: bool | None,
    shown: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr, tty))
    sm.merge(["left"], method=sm.mean(), progress=asked).save_pretrained("out")
    assert ("merging" in capsys.readouterr().err) == shown
