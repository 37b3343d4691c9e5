"""A page for the browser: one file that loads nothing and runs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from sapmerge.display.colours import SHEET
from sapmerge.display.markup import Markup, element, join, text
from sapmerge.errors import OutputError
from sapmerge.io.records import write_file

__all__ = ["Page", "facts", "figure", "numbers", "said", "section", "tracks"]

_STYLE = (
    """
:root{color-scheme:light dark;--ink:#1c2126;--soft:#5a646e;--line:#d9dee3;--paper:#fff;
--card:#f6f8fa;--bar:#2f73b3;--bad:#a3330b}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9da7b1;--line:#363d45;
--paper:#14181c;--card:#1c2127;--bar:#62a8e5;--bad:#ffa07a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 20px 60px;max-width:1140px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:24px;margin:0 0 6px}h2{font-size:18px;margin:38px 0 4px}
h3{font-size:15px;margin:20px 0 4px}p{margin:4px 0 10px;max-width:75ch}
.soft,figcaption,.legend{color:var(--soft);font-size:13px}
.bad{color:var(--bad);font-weight:600}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:10px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;padding-bottom:4px}
figure{margin:8px 0 22px}svg{display:block}
.legend{display:flex;align-items:center;gap:10px;flex-wrap:wrap;margin:6px 0}
table.numbers{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.numbers th,.numbers td{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid
var(--line);white-space:nowrap}
.numbers th{font-weight:600;color:var(--soft)}
.numbers th:first-child,.numbers td:first-child{text-align:left}
.numbers td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:22ch}
table.tracks{border-collapse:collapse}
.tracks th{position:sticky;left:0;z-index:1;background:var(--paper);width:176px;min-width:176px;
padding:0;text-align:right;font-weight:400;font-size:13px;vertical-align:middle}
.tracks th>span{display:block;padding-right:8px;line-height:1.25}
.tracks td{padding:0 0 9px 0;vertical-align:top}.tracks th{padding-bottom:9px}
.labels{width:176px;font-size:11px;white-space:pre}
.labels div{display:flex;justify-content:flex-end;padding-right:8px}
.begin{min-width:0;overflow:hidden;text-overflow:ellipsis}.end{flex:none}
@media (max-width:600px){.tracks th{width:118px;min-width:118px}.labels{width:118px}}
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--ink)}
.tick,.head{fill:var(--soft)}.tick{font-size:10.5px}
.number{font-size:11px}.on{fill:var(--paper)}.off{fill:var(--ink)}
.bar{fill:var(--bar)}.line{fill:none;stroke:var(--bar);stroke-width:2}
.caption{font-size:13px;padding-top:10px}
.matrices{display:flex;flex-wrap:wrap;gap:0 48px}
.grid{fill:none;stroke:var(--line)}.rule{fill:none;stroke:var(--soft)}
.none{fill:url(#none)}
details{margin:10px 0}summary{cursor:pointer;color:var(--soft);font-size:13px}
"""
    + SHEET
)

_HATCHED = Markup(
    '<svg width="0" height="0" aria-hidden="true"><defs><pattern id="none" width="5" height="5" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<path d="M0 0v5" stroke="var(--line)" stroke-width="2"/></pattern></defs></svg>'
)


@dataclass(frozen=True)
class Page:
    """A page of pictures, as one HTML file with inline SVG: no network, no script.

    `page.save("report.html")` writes it, `str(page)` is the file's text; in a notebook the last
    value of a cell is shown.

    Args:
        title: of the page.
        body: its content.
    """

    title: str
    body: Markup = field(repr=False)

    def __str__(self) -> str:
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        head = join(
            [
                Markup('<meta charset="utf-8">'),
                Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
                Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
                element("title", self.title),
                Markup(f"<style>{_STYLE}</style>"),
            ]
        )
        content = join([_HATCHED, element("h1", self.title), self.body])
        return (
            f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{content}</body></html>\n'
        )

    def _repr_html_(self) -> str:
        """For notebooks: in a frame of its own, so that its styles stay inside."""
        page = Markup(escape(str(self)))
        return str(element("iframe", srcdoc=page, width="100%", height=700, style="border:0"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page; one that is there already is replaced.

        Raises:
            OutputError: the name does not end in .html, or the disk refuses.
        """
        name = os.fspath(path)
        if not name.lower().endswith((".html", ".htm")):
            raise OutputError(f"{name!r}: a page is written to a file that ends in .html")
        write_file(name, str(self).encode())


def section(title: str, *content: object) -> Markup:
    """A part of a page."""
    return element("section", element("h2", title), *content)


def figure(caption: object, *pictures: object) -> Markup:
    """Pictures with what they show; wide ones scroll."""
    return element(
        "figure",
        element("figcaption", caption),
        *(element("div", picture, css="scroll") for picture in pictures),
    )


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values."""
    return element(
        "dl",
        *(
            part
            for name, value in pairs.items()
            for part in (element("dt", name), element("dd", value))
        ),
    )


def numbers(
    head: Sequence[str], rows: Iterable[Sequence[object]], fold: str | None = None
) -> Markup:
    """A table; folded under a line to click if `fold` names it."""
    lines = [element("tr", *(element("th", cell) for cell in head))]
    lines += [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    found = element("div", element("table", *lines, css="numbers"), css="scroll")
    return found if fold is None else element("details", element("summary", fold), found)


def tracks(rows: Iterable[tuple[object, object]]) -> Markup:
    """Pictures of the same layers below each other; what they show stays in sight on the left."""
    lines = (element("tr", element("th", head), element("td", cell)) for head, cell in rows)
    return element("div", element("table", *lines, css="tracks"), css="scroll")


def said(*lines: object) -> Markup:
    """What a track shows, in lines."""
    return join(element("span", text(line)) for line in lines)
