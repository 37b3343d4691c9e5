"""Names in pictures: how wide they are, and what is left of one that is too wide."""

from __future__ import annotations

from unicodedata import combining, east_asian_width

__all__ = ["fitted", "parted", "width_of"]

_NARROW, _WIDE = frozenset("ijlrtfI.,:;|!'-()[]/ "), frozenset("mwMW@%")


def width_of(text: str) -> float:
    """About how many pixels a text of 11 px takes, in any of the fonts that systems have."""
    return sum(map(_letter, text))


def _letter(letter: str) -> float:
    if letter in _NARROW:
        return 4.2
    if letter in _WIDE:
        return 10.5
    if east_asian_width(letter) in "WF":
        return 11.5
    if combining(letter):
        return 0.0
    return 7.8 if letter.isupper() else 6.8


def fitted(text: str, pixels: float) -> str:
    """The text in at most so many pixels, its middle left out.

    Example:
        >>> from sapmerge.display.labels import fitted
        >>> fitted("hospital-north-radiology-r16-epoch3", 120)
        'hospital...-epoch3'
    """
    if width_of(text) <= pixels:
        return text
    room = pixels - width_of("...")
    _, tail = parted(text, room / 2)
    head = ""
    for letter in text:
        if width_of(head + letter + tail) > room:
            break
        head += letter
    return f"{head}...{tail}"


def parted(text: str, pixels: float) -> tuple[str, str]:
    """The text in two parts, of which the second takes at most so many pixels."""
    at = len(text)
    while at and width_of(text[at - 1 :]) <= pixels:
        at -= 1
    return text[:at], text[at:]
