"""`sapmerge inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sapmerge as sm
from sapmerge.cli import main


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
