"""The pictures: heat maps and bars over layers, matrices of adapters, dots, curves, legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sapmerge.display.axis import LayerAxis
from sapmerge.display.colours import Scale
from sapmerge.display.labels import fitted, parted, width_of
from sapmerge.display.markup import Markup, element, join

__all__ = ["bars", "curve", "dots", "heat_map", "legend", "matrix", "row_labels"]

_HOVERED = 6000
"""Up to so many cells, each says its value under the pointer; more are drawn by colour."""

_NAME, _TAIL = 168, 50
"""The pixels of a name beside a picture, and of its end, which is never left out."""

Form = Callable[[float], str]


def heat_map(
    axis: LayerAxis,
    labels: Sequence[str],
    values: Mapping[str, Mapping[str, float]],
    scale: Scale,
) -> Markup:
    """Layers from left to right, adapters from top to bottom.

    Args:
        values: layer -> adapter -> value; what is missing is left hatched.
    """
    tall, wide = row_height(len(labels)), axis.cell
    cells = [
        (name, label, axis.places[name], row * tall, values.get(name, {}).get(label))
        for name in axis.names
        for row, label in enumerate(labels)
    ]
    box = {"width": wide - (wide > 4), "height": tall - 1}
    marks = list[Markup]()
    if len(cells) <= _HOVERED:
        for name, label, x, y, value in cells:
            said = "no such layer" if value is None else scale.form(value)
            css = "none" if value is None else scale.colour(value)
            title = element("title", f"{name}, {label}: {said}")
            marks.append(element("rect", title, x=x, y=y, css=css, **box))
    else:
        paths = dict[str, list[str]]()
        for _, _, x, y, value in cells:
            css = "none" if value is None else scale.colour(value)
            size = f"h{box['width']}v{box['height']}h-{box['width']}z"
            paths.setdefault(css, []).append(f"M{x} {y}{size}")
        marks = [element("path", d="".join(d), css=css) for css, d in sorted(paths.items())]
    return axis.svg(tall * len(labels), marks)


def row_height(count: int) -> int:
    """The height of an adapter's row."""
    return max(11, min(22, 400 // max(1, count)))


def row_labels(labels: Sequence[str]) -> Markup:
    """The names of the adapters beside a heat map, right-aligned; the browser leaves out the middle
    of those for which its column is too narrow.
    """
    style = f"height:{row_height(len(labels))}px;line-height:{row_height(len(labels))}px"
    rows = list[Markup]()
    for label in labels:
        head, tail = parted(label, _TAIL)
        parts = element("span", head, css="begin"), element("span", tail, css="end")
        rows.append(element("div", *parts, title=label, style=style))
    return element("div", *rows, css="labels")


def bars(axis: LayerAxis, values: Mapping[str, float | None], top: float, form: Form) -> Markup:
    """A bar per layer from 0 to `top`, below 0 where values are."""
    height = 44
    low = min([0.0, *(v for v in values.values() if v is not None and math.isfinite(v))])
    span = (top - low) or 1.0
    zero = height * top / span
    marks = [element("path", d=f"M0 {zero:.1f}h{axis.width}", css="grid")]
    for name in axis.names:
        value = values.get(name)
        if value is None or not math.isfinite(value):
            continue
        tall = max(1.0, abs(value) / span * height)
        marks.append(
            element(
                "rect",
                element("title", f"{name}: {form(value)}"),
                x=axis.places[name],
                y=f"{zero - tall if value >= 0 else zero:.1f}",
                width=max(2, axis.cell - 1),
                height=f"{tall:.1f}",
                css="bar",
            )
        )
    return axis.svg(height + 2, marks)


def matrix(
    labels: Sequence[str], values: Mapping[str, Mapping[str, float]], scale: Scale
) -> Markup:
    """Adapters against adapters; the diagonal, which says nothing, is left out."""
    count, names = len(labels), [fitted(label, _NAME) for label in labels]
    widths = [width_of(name) for name in names]
    longest = max(widths, default=0.0)
    left, cell = round(longest) + 12, max(12, min(46, 560 // max(1, count)))
    angle = 48 if cell >= 16 else 78  # steep, where headings lie close to each other
    top = 14 + round(math.sin(math.radians(angle)) * longest)
    marks: list[Markup] = []
    for k, label in enumerate(labels):
        title, middle = element("title", label), k * cell + cell / 2
        name = names[k]
        marks.append(
            element(
                "text", name, title, x=left - 8, y=top + middle + 4, css="label", text_anchor="end"
            )
        )
        at = f"translate({left + middle} {top - 6}) rotate(-{angle})"
        marks.append(element("text", name, title, transform=at, css="label"))
    for i, row in enumerate(labels):
        for j, column in enumerate(labels):
            if i == j:
                continue
            value = values[row][column]
            x, y = left + j * cell, top + i * cell
            title = element("title", f"{row}, {column}: {scale.form(value)}")
            size = {"width": cell - 1, "height": cell - 1}
            marks.append(element("rect", title, x=x, y=y, css=scale.colour(value), **size))
            if cell >= 34:
                ink = f"number {scale.ink(value)}"
                place = {"x": x + cell / 2, "y": y + cell / 2 + 4}
                shown = scale.form(value).replace("%", "")
                marks.append(element("text", shown, css=ink, text_anchor="middle", **place))
    reach = math.cos(math.radians(angle))
    ends = [(k + 0.5) * cell + reach * width for k, width in enumerate(widths)]
    overhang = max(0, round(max(ends, default=0.0)) + 8 - cell * count)
    width, height = left + cell * count + overhang, top + cell * count
    return element("svg", join(marks), width=width, height=height, viewBox=f"0 0 {width} {height}")


def dots(values: Mapping[str, float | None], form: Form, marked: str | None = None) -> Markup:
    """A line per name with its value and a dot.

    Args:
        marked: has a line from top to bottom, to compare the others with; the axis spans the
            values then. None: it begins at 0.
    """
    found = [v for v in values.values() if v is not None and math.isfinite(v)]
    if marked is None:
        found.append(0.0)
    low, high = min(found, default=0.0), max(found, default=1.0)
    span, left, wide, tall = (high - low) or 1.0, 240, 400, 20 if len(values) <= 12 else 14

    def at(value: float) -> float:
        return left + 10 + (value - low) / span * (wide - 20)

    height, marks = tall * len(values), list[Markup]()
    reference = values.get(marked) if marked else None
    if reference is not None and math.isfinite(reference):
        marks.append(element("path", d=f"M{at(reference):.1f} 0v{height}", css="rule"))
    for row, (name, value) in enumerate(values.items()):
        known = value is not None and math.isfinite(value)
        y = row * tall + tall / 2
        ends = {"css": "label", "text_anchor": "end"}
        title = element("title", name)
        marks.append(element("text", fitted(name, _NAME), title, x=_NAME + 2, y=y + 4, **ends))
        shown = form(value) if known and value is not None else "not finite"
        marks.append(element("text", shown, x=left - 6, y=y + 4, **ends))
        marks.append(element("path", d=f"M{left} {y}h{wide}", css="grid"))
        if known and value is not None:
            marks.append(element("circle", cx=f"{at(value):.1f}", cy=y, r=tall / 4, css="bar"))
    width = left + wide
    return element("svg", join(marks), width=width, height=height, viewBox=f"0 0 {width} {height}")


def curve(points: Mapping[float, float], form: Form, unit: str) -> Markup:
    """A line through points; the horizontal axis is logarithmic, as lengths are multiples."""
    known = sorted((x, y) for x, y in points.items() if x > 0 and math.isfinite(y))
    left, wide, tall, bottom = 66, 420, 150, 34
    width, height = left + wide + 20, 12 + tall + bottom
    if not known:
        return element("svg", width=width, height=0)
    across = [math.log(x) for x, _ in known]
    low, high = min(y for _, y in known), max(y for _, y in known)
    reach, span = (across[-1] - across[0]) or 1.0, (high - low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (math.log(x) - across[0]) / reach * wide, 12 + (high - y) / span * tall

    line = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in known)
    marks = [element("path", d=f"M{line}", css="line")]
    for y in (low, high):
        place = at(known[0][0], y)[1]
        marks.append(element("path", d=f"M{left} {place:.1f}h{wide}", css="grid"))
        marks.append(
            element("text", form(y), x=left - 8, y=place + 4, css="tick", text_anchor="end")
        )
    for x, y in known:
        px, py = at(x, y)
        said = element("title", f"{x:.3g}: {form(y)}")
        marks.append(element("circle", said, cx=f"{px:.1f}", cy=f"{py:.1f}", r=4, css="bar"))
        place = {"x": f"{px:.1f}", "y": 12 + tall + 16}
        marks.append(element("text", f"{x:.2g}", css="tick", text_anchor="middle", **place))
    place = {"x": left + wide / 2, "y": height - 3}
    marks.append(element("text", unit, css="tick", text_anchor="middle", **place))
    return element("svg", join(marks), width=width, height=height, viewBox=f"0 0 {width} {height}")


def legend(scale: Scale) -> Markup:
    """The colours and what they stand for."""
    step, count = 9, len(scale.classes)
    marks = [
        element("rect", x=40 + k * step, y=0, width=step, height=10, css=css)
        for k, css in enumerate(scale.classes)
    ]
    for place, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = 40 + place * step * count
        x += {"start": -40, "middle": 0, "end": 40}[anchor]
        shown = scale.form(scale.value(place))
        marks.append(element("text", shown, x=x, y=22, css="tick", text_anchor=anchor))
    width = step * count + 80
    return element(
        "div",
        element("svg", join(marks), width=width, height=26, viewBox=f"0 0 {width} 26"),
        element("span", scale.label),
        css="legend",
    )
