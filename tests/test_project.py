"""The project's habits agree with each other: versions, pins, supported Pythons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import sapmerge

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere_and_dated() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == sapmerge.__version__
    dated = f"## {sapmerge.__version__} - {citation['date-released']}\n"
    assert dated in read("CHANGELOG.md")


def test_the_hooks_have_the_pinned_ruff() -> None:
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert f'"ruff=={hooks[0]["rev"].removeprefix("v")}"' in PYPROJECT
    local = {hook["id"] for hook in hooks[1]["hooks"]}
    assert local == {"pyright", "lint-imports"}  # of the environment, so of the extra `dev`
    assert re.search(r'"pyright==[\d.]+", "import-linter==', PYPROJECT)


def test_every_extra_is_explained() -> None:
    listed = re.search(r"optional-dependencies\]\n(.*?)\n\n", PYPROJECT, re.DOTALL)
    assert listed is not None
    rows = re.findall(r"^\| (`.*?`) \|", read("docs/install.md"), re.MULTILINE)
    explained = re.findall(r"`(\w+)`", " ".join(rows))
    assert sorted(explained) == sorted(re.findall(r"^(\w+) = ", listed[1], re.MULTILINE))


def test_every_supported_python_is_tested() -> None:
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]
    listed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert matrix["python"] == listed
    assert f'requires-python = ">={listed[0]}"' in PYPROJECT
    assert len(matrix["os"]) == 3


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_github_can_read_its_files(path: Path) -> None:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        assert found["permissions"] == {"contents": "read"}
    elif path.stem != "config":
        ids = [field["id"] for field in found["body"] if "id" in field]
        assert {"name", "description", "body"} <= found.keys()
        assert len(ids) == len(set(ids))
