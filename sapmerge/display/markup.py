"""HTML and SVG as text. Whatever is put into it is escaped here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from sapmerge.errors import printable

__all__ = ["Markup", "element", "join", "text"]


class Markup(str):
    """Text that is markup already; everything else is escaped when it is put into an element."""


def text(value: object) -> Markup:
    """A value as text of a page: what comes from files is no markup, and no control character."""
    if isinstance(value, Markup):
        return value
    return Markup(escape(printable(str(value)), quote=True))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other, each escaped if it is no markup."""
    return Markup("".join(text(part) for part in parts))


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """An element. Attributes that are None are left out; `css` is the class, and an underscore in
    a name stands for a hyphen.

    Example:
        >>> from sapmerge.display.markup import element
        >>> element("p", "a < b", css="note")
        '<p class="note">a &lt; b</p>'
    """
    written = "".join(
        f' {"class" if name == "css" else name.replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{written}>{join(content)}</{tag}>")
