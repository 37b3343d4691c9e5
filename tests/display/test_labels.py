"""Names in pictures: what is left of long ones fits, and tells them from each other."""

from __future__ import annotations

import pytest

from sapmerge.display.labels import fitted, parted, width_of

NAMES = (
    "hospital-north-radiology-lora-r16-seed42-epoch3-final-v2",
    "W" * 40,
    "i" * 90,
    "医療アダプター" * 5,
    "e\u0301" * 30,
    "art",
    "",
)


@pytest.mark.parametrize("pixels", [40, 100, 168, 400])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_fits_and_has_both_ends(name: str, pixels: float) -> None:
    found = fitted(name, pixels)
    assert width_of(found) <= pixels
    if width_of(name) <= pixels:
        assert found == name
    else:
        head, tail = found.split("...")
        assert name.startswith(head)
        assert name.endswith(tail)
        assert head != "" != tail
        # as much as there is room for: the next letter of the head would be too much
        assert width_of(found) + width_of(name[len(head)]) > pixels


def test_wide_letters_take_more_room() -> None:
    assert width_of("WWWW") > width_of("AAAA") > width_of("aaaa") > width_of("iiii")
    assert width_of("画像") > width_of("ab")
    assert width_of("e\u0301") == width_of("e")


def test_parts() -> None:
    for name in NAMES:
        head, tail = parted(name, 50)
        assert head + tail == name
        assert width_of(tail) <= 50
    assert parted("art", 50) == ("", "art")
