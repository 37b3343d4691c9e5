"""`--html FILE`: the page of pictures, of commands that have a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sapmerge.display.page import Page

__all__ = ["add_page", "save_page"]


def add_page(parser: Any) -> None:
    """The flag."""
    parser.add_argument(
        "--html", metavar="FILE", type=_html, help="write a page of pictures, e.g. report.html"
    )


def save_page(options: argparse.Namespace, plot: Callable[[], Page]) -> None:
    """Write the page if it was asked for."""
    if options.html is not None:
        plot().save(options.html)


def _html(name: str) -> str:
    """The name of a page, refused before any work is done."""
    if not name.lower().endswith((".html", ".htm")):
        raise argparse.ArgumentTypeError(f"{name!r} does not end in .html")
    return name
