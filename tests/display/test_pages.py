"""Pages of pictures: well-formed, self-contained, with the report's own numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import sapmerge as sm
from sapmerge.display.labels import parted, width_of
from sapmerge.display.page import Page
from sapmerge.merging.inspection import AdapterSummary
from sapmerge.merging.report import AdapterReport, LayerReport, Report

HOSTILE = "<script>alert(1)</script>\"'&\x1b[2J<img src=x onerror=y>"


class Reader(HTMLParser):
    """Elements, their attributes and texts; every element is closed in turn."""

    VOID = ("meta",)

    def __init__(self, page: Page) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(str(page))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def titles(self) -> list[str]:
        """What the pointer shows."""
        return [text for tag, text in self.texts if tag == "title"]


def report(
    adapters: int = 2, names: tuple[str, ...] = ("h.0.q", "h.1.q", "h.2.q"), **changes: object
) -> Report:
    labels = [f"client-{k}" for k in range(adapters)]
    layers = tuple(
        LayerReport(
            name,
            (8, 8),
            tuple(labels[: adapters - n % 2]),
            4,
            1.0 - n / 100,
            1.0 + n,
            0.25,
            0.5,
            {label: float((k + 1) * (n + 1)) for k, label in enumerate(labels)},
        )
        for n, name in enumerate(names)
    )
    members = tuple(
        AdapterReport(
            label, "/secret/place", f"{k:064x}", 1.0, len(names), "4", 0.5, 1.0, None, 1.0
        )
        for k, label in enumerate(labels)
    )
    pairs = {a: {b: 1.0 if a == b else -0.5 for b in labels} for a in labels}
    made = Report("mean()", "base", 1.0, None, members, layers, (), (), {}, pairs, pairs)
    return replace(made, **changes)


def cells(page: Page) -> Iterator[tuple[str, str]]:
    """(class, what the pointer shows) of every rectangle."""
    for svg in re.findall(r"<svg.*?</svg>", str(page), re.DOTALL):
        for rect in ElementTree.fromstring(svg).iter("rect"):
            title = rect.find("title")
            if title is not None:
                yield rect.get("class", ""), title.text or ""


def shade(css: str) -> int:
    assert css.startswith("s")
    return int(css[1:])


def test_the_energies_of_a_merge_are_the_cells_of_its_map() -> None:
    found = report()
    shown = {said: css for css, said in cells(found.plot())}
    for layer in found.layers:
        for adapter in found.adapters:
            if adapter.label in layer.adapters:
                assert (
                    f"{layer.name}, {adapter.label}: {layer.energies[adapter.label]:.3g}" in shown
                )
            else:
                assert shown[f"{layer.name}, {adapter.label}: no such layer"] == "none"
    assert shade(shown["h.2.q, client-1: 6"]) == 15  # the largest has the strongest colour
    # colours go by square roots: a quarter of the largest energy is in the middle
    assert shade(shown["h.0.q, client-0: 1"]) == round(15 * (1 / 6) ** 0.5)


def test_one_loud_adapter_does_not_blank_the_others() -> None:
    found = report()
    loud = tuple(
        replace(layer, energies={"client-0": 1.0 + n, "client-1": 1e6})
        for n, layer in enumerate(found.layers)
    )
    shown = {said: css for css, said in cells(replace(found, layers=loud).plot())}
    assert shade(shown["h.2.q, client-1: 1e+06"]) == 15
    assert shade(shown["h.0.q, client-0: 1"]) == 0
    assert "energy (w‖D‖)², logarithmic" in str(replace(found, layers=loud).plot())


def test_signs_are_two_colours_and_agreement_is_the_same_in_both_matrices() -> None:
    labels = ("a", "b", "c")
    cosine = {x: dict.fromkeys(labels, 1.0) for x in labels}
    cosine["a"] |= {"b": 0.8, "c": -0.8}
    conflict = {x: dict.fromkeys(labels, 0.5) for x in labels}
    conflict["a"] |= {"b": 0.1, "c": 0.9}
    page = report(adapters=3, cosine=cosine, sign_conflict=conflict).plot()
    shown = {said: css for css, said in cells(page)}
    assert shown["a, b: +0.80"] == "d2"  # of 17, from +1, the largest, to -1
    assert shown["a, c: -0.80"] == "d14"
    assert shown["a, b: 10.0%"] == "d0"
    assert shown["a, c: 90.0%"] == "d16"
    assert shown["b, c: 50.0%"] == "d8"


def test_what_the_anchors_said_is_shown() -> None:
    found = report()
    decided = {
        "agreement": {"client-0": 0.75, "client-1": 0.25},
        "losses_by_length": {0.5: 2.0, 1.0: 1.0, 2.0: 1.5},
        "energy_factor": 1.25,
    }
    layers = tuple(
        replace(
            layer,
            notes={
                **decided,
                "density": {"client-0": 0.1 * (n + 1), "client-1": 0.5},
                "anchor_stability": {"client-0": 0.9, "client-1": 0.1 * (n + 1)},
                "saliency": {"client-0": 3.0 - n, "client-1": 1.0},
            },
        )
        for n, layer in enumerate(found.layers)
    )
    losses = {"base model": 2.0, "client-0": 1.5, "client-1": None, "merged adapter": 1.0}
    page = replace(found, layers=layers, notes={"anchors": 16, "anchor loss": losses}).plot()
    texts, titles = {text for _, text in Reader(page).texts}, Reader(page).titles()
    assert {"2.0000", "1.5000", "not finite", "1.0000", "75.0%", "25.0%", "1.25", "16"} <= texts
    assert {"Loss over length", "Mask stability", "Saliency", "Weight by agreement"} <= texts
    assert {"0.5: 2", "1: 1", "2: 1.5"} <= set(titles)
    assert "h.1.q, client-0: 20.0%" in titles
    assert "h.2.q, client-1: 30.0%" in titles
    assert "h.0.q, client-0: 3" in titles


@pytest.mark.parametrize("adapters", [1, 2, 50])
@pytest.mark.parametrize("layers", [1, 3, 300])
def test_every_size_is_well_formed(adapters: int, layers: int) -> None:
    names = tuple(f"model.layers.{n // 7}.part_{n % 7}.proj" for n in range(layers))
    page = report(adapters, names).plot()
    assert len(str(page)) < 3_000_000
    svgs = re.findall(r"<svg.*?</svg>", str(page), re.DOTALL)
    for svg in svgs:
        ElementTree.fromstring(svg)
    Reader(page)
    wide = [int(width) for width in re.findall(r'<svg width="(\d+)"', str(page))]
    assert max(wide) < 1000  # one screen


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    seen = Reader(report().plot()).seen
    tags = {tag for tag, _ in seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "a", "use", "image"}
    for tag, attributes in seen:
        assert not any(name.startswith("on") for name in attributes), tag
        assert "href" not in attributes
        assert "src" not in attributes
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", str(report().plot()))
    assert "default-src 'none'" in str(report().plot())


def test_names_from_files_are_no_markup() -> None:
    """A page with hostile names has the elements of one with plain names."""
    found = report()
    hostile = replace(
        found,
        method=HOSTILE,
        base_model=HOSTILE,
        adapters=tuple(replace(a, label=a.label + HOSTILE) for a in found.adapters),
        layers=tuple(
            replace(
                layer,
                name=layer.name + HOSTILE,
                adapters=tuple(label + HOSTILE for label in layer.adapters),
                energies={label + HOSTILE: e for label, e in layer.energies.items()},
            )
            for layer in found.layers
        ),
        modules_to_save=(HOSTILE,),
        dropped_modules=(HOSTILE,),
        notes={HOSTILE: HOSTILE},
        cosine={
            a + HOSTILE: {b + HOSTILE: v for b, v in row.items()} for a, row in found.cosine.items()
        },
    )
    plain = replace(found, modules_to_save=("m",), dropped_modules=("m",), notes={"n": "n"})
    ours, theirs = Reader(plain.plot()), Reader(hostile.plot())
    assert [tag for tag, _ in ours.seen] == [tag for tag, _ in theirs.seen]
    assert [list(a) for _, a in ours.seen] == [list(a) for _, a in theirs.seen]
    assert "\x1b" not in str(hostile.plot())
    assert any("<script>alert(1)</script>\"'&\\x1b[2J" in text for _, text in theirs.texts)


@pytest.mark.parametrize("count", [2, 50])
def test_long_names_are_told_in_full_and_shown_with_both_ends(count: int) -> None:
    """Beside a heat map the browser leaves out the middle; elsewhere what is left has room."""
    layer = "base.vision_tower.encoder.layers.0.a_projection_with_a_very_long_name_of_its_own"
    found = report(count, (layer,))
    labels = [f"{'of-the-northern-consortium-' * 2}site-{k:02d}" for k in range(count)]
    renamed = dict(zip((a.label for a in found.adapters), labels))
    new = {
        "adapters": tuple(replace(a, label=renamed[a.label]) for a in found.adapters),
        "layers": tuple(
            replace(
                one,
                adapters=tuple(labels),
                energies={renamed[a]: energy for a, energy in one.energies.items()},
            )
            for one in found.layers
        ),
        "cosine": {a: dict.fromkeys(labels, 0.5) for a in labels},
        "sign_conflict": {a: dict.fromkeys(labels, 0.5) for a in labels},
        "notes": {"anchor loss": {"base model": 2.0, **dict.fromkeys(labels, 1.0)}},
    }
    page = Reader(replace(found, **new).plot())
    told = {attributes["title"] for tag, attributes in page.seen if attributes.get("title")}
    assert set(labels) <= told
    assert set(labels) <= set(page.titles())
    pictured = [text for tag, text in page.texts if tag == "text"]
    assert all(any(text.endswith(label[-7:]) for text in pictured) for label in labels)
    assert max(width_of(text) for text in pictured) <= 214
    assert not set(labels) & set(pictured)  # they are too long
    spans = [text for tag, text in page.texts if tag == "span"]
    for label in labels:
        head, tail = parted(label, 50)
        assert spans[spans.index(tail) - 1] == head


def test_a_hostile_adapter_file(tmp_path: Path) -> None:
    """From the files on: base and module names. A label may not even have such letters."""
    name = "layers.0.<b>q"
    state = {f"base_model.model.{name}.lora_{p}.weight": torch.ones(2, 2) for p in "AB"}
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": [name],
        "base_model_name_or_path": "<script>alert(1)</script>",
    }
    found = sm.inspect({"one": (config, state), "two": (config, state)})
    page = str(found.plot()) + str(sm.merge([(config, state)], method=sm.mean()).report.plot())
    assert "&lt;b&gt;q" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>" not in page
    assert "<script" not in page


def test_a_refused_adapter_is_on_the_page() -> None:
    refused = AdapterSummary("x", "/place", None, "LOHA", 0, "4", "-", "-", "-", None, (), "LoHa")
    page = str(sm.Inspection((refused,), (), "LoHa", {}, {}).plot())
    assert "<strong>x</strong> is refused: LoHa" in page
    assert "/place" not in page


def test_no_local_paths() -> None:
    assert "/secret" not in str(report().plot())


def test_a_page_is_a_file(tmp_path: Path) -> None:
    page = report().plot()
    page.save(tmp_path / "report.html")
    page.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == str(page)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(sm.OutputError, match=r"ends in \.html"):
        page.save(tmp_path / "adapter_model.safetensors")
    with pytest.raises(sm.OutputError):
        page.save(tmp_path / "nowhere" / "report.html")


def test_a_page_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report().plot().save("here.html")
    assert (tmp_path / "here.html").exists()


def test_a_notebook_shows_it_in_a_frame() -> None:
    page = report().plot()
    (frame,) = re.findall(r'srcdoc="([^"]*)"', page._repr_html_())
    assert unescape(frame) == str(page)
