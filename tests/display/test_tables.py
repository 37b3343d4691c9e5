"""Tables of text: as wide as the terminal, coloured on it alone."""

from __future__ import annotations

import io
import os
import re

import pytest

from sapmerge.display.tables import Bad, Look, shortened, table

HEAD = ["layer", "rank", "from"]
ROWS = [["model.layers.10.self_attn.q_proj", 16, "/data/adapters/a-long-name"], ["b", 8, "c"]]


def test_columns_are_aligned() -> None:
    first, *others = table(HEAD, ROWS).splitlines()
    assert first == "layer                             rank                        from"
    assert others[0] == "model.layers.10.self_attn.q_proj    16  /data/adapters/a-long-name"
    assert others[1] == "b                                    8                           c"


@pytest.mark.parametrize("width", [40, 50])
def test_a_narrow_terminal_cuts_words_in_the_middle_and_no_number(width: int) -> None:
    lines = table(HEAD, ROWS, Look(width)).splitlines()
    assert all(len(line) <= width for line in lines)
    assert re.fullmatch(r"model\.l.*\.\.\..*_proj +16  /data.*\.\.\..*-name", lines[1])


def test_what_cannot_be_cut_stays() -> None:
    rows = [[f"{k}{'.0' * 3}", "1234567890123456789012"] for k in range(2)]
    assert table(["a", "b"], rows, Look(12)) == table(["a", "b"], rows)


def test_colours_do_not_move_columns() -> None:
    rows = [["a", Bad("50.0%")], ["b", "100.0%"]]
    plain, coloured = table(["x", "kept"], rows), table(["x", "kept"], rows, Look(None, True))
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert "\x1b[31m 50.0%\x1b[0m" in coloured
    assert "\x1b" not in plain


def test_what_strangers_wrote_does_not_steer_the_terminal() -> None:
    shown = table(["adapter"], [["evil\x1b[2J\nname"]])
    assert shown.splitlines() == ["adapter", r"evil\x1b[2J\nname"]


def test_middles_are_left_out() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abcd...ijk"
    assert shortened("abcdefghijk", 4) == "abcd"


def test_files_and_pipes_are_plain() -> None:
    assert Look.of(io.StringIO()) == Look()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals to open here")
@pytest.mark.parametrize(
    ("variable", "value", "colour"),
    [("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)],
)
def test_a_terminal_says_how_wide_it_is(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, colour: bool
) -> None:
    import fcntl
    import struct
    import termios

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv(variable, value)
    leader, follower = os.openpty()
    try:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 91, 0, 0))
        with os.fdopen(follower, "w") as terminal:
            assert Look.of(terminal) == Look(91, colour)
    finally:
        os.close(leader)
