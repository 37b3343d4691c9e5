"""Anchors from folders and tables: every format gives the batches of `from_pairs`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sapmerge import AnchorError
from sapmerge.anchors import from_csv, from_folder, from_pairs, read_folder

Image = pytest.importorskip("PIL.Image")

CAPTIONS = {"b.png": "a bird, flying", "a.jpg": 'a "quoted" ape', "c.PNG": "ein Bär"}


def processor(images: list[Any], text: list[str], **_: Any) -> dict[str, Any]:
    pixels = [torch.tensor(list(image.tobytes())) for image in images]
    return {"pixel_values": torch.stack(pixels), "text": list(text)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (2, 2), (10 * number, 20, 30)).save(tmp_path / name)
    return tmp_path


def as_json(folder: Path, stem: str) -> None:
    (folder / f"{stem}.json").write_text(json.dumps(CAPTIONS))


def as_list(folder: Path, stem: str) -> None:
    rows = [{"image": name, "caption": text, "more": 1} for name, text in CAPTIONS.items()]
    (folder / f"{stem}.json").write_text(json.dumps(rows))


def as_lines(folder: Path, stem: str) -> None:
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items()]
    (folder / f"{stem}.jsonl").write_text("\n".join(rows) + "\n\n")


def as_csv(folder: Path, stem: str) -> None:
    with open(folder / f"{stem}.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("file_name", "text"), *CAPTIONS.items()])


def as_tabs(folder: Path, stem: str) -> None:
    lines = [f"{name}\t{text}\n" for name, text in CAPTIONS.items()]
    (folder / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a["pixel_values"], b["pixel_values"]) and a["text"] == b["text"]
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("stem", ["captions", "metadata"])
@pytest.mark.parametrize("write", [as_json, as_list, as_lines, as_csv, as_tabs])
def test_every_format(folder: Path, write: Callable[[Path, str], None], stem: str) -> None:
    write(folder, stem)
    names = [folder / name for name in CAPTIONS]
    wanted = from_pairs(names, list(CAPTIONS.values()), processor, 2)
    assert len(wanted) == 2
    assert same(from_folder(folder, processor, 2), wanted)


@pytest.mark.parametrize("write", [as_json, as_list, as_lines, as_csv, as_tabs])
@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c", "\x1e"])
def test_separators_of_unicode_are_part_of_a_caption(
    folder: Path,
    write: Callable[[Path, str], None],
    mark: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marked = {name: f"{text[:4]}{mark}{text[4:]}" for name, text in CAPTIONS.items()}
    monkeypatch.setitem(globals(), "CAPTIONS", marked)
    monkeypatch.setattr(json, "dumps", partial(json.dumps, ensure_ascii=False))
    write(folder, "captions")
    assert [pair.text for pair in read_folder(folder)] == list(marked.values())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_end_of_a_line(folder: Path, end: str) -> None:
    lines = end.join(f"{name}\t{text}" for name, text in CAPTIONS.items())
    (folder / "captions.txt").write_bytes(lines.encode())
    assert [(Path(p.image).name, p.text) for p in read_folder(folder)] == list(CAPTIONS.items())


def test_an_empty_caption_beside_an_image(folder: Path) -> None:
    for name, text in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text("" if name == "a.jpg" else text)
    with pytest.raises(AnchorError, match=r"a\.txt.*'a\.jpg' has no text"):
        read_folder(folder)


@pytest.mark.parametrize("damage", ["chunk", "bomb"])
def test_a_damaged_image_is_named(
    folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL raises a SyntaxError for a chunk that it cannot read, and an error of its own for images
    of too many pixels.
    """
    as_json(folder, "captions")
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    else:
        raw = bytearray((folder / "b.png").read_bytes())
        at = raw.index(b"IDAT")
        raw[at - 1], raw[at + 13 : at + 17] = 1, b"\x1e\x13\xc3r"  # a shorter chunk, then no name
        (folder / "b.png").write_bytes(raw)
    with pytest.raises(AnchorError, match=r"b\.png' cannot be read"):
        from_folder(folder, processor)


def test_captions_beside_the_images(folder: Path) -> None:
    for name, text in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
    names = sorted(CAPTIONS)
    wanted = from_pairs([folder / name for name in names], [CAPTIONS[n] for n in names], processor)
    assert same(from_folder(str(folder), processor), wanted)


def test_images_in_subfolders_are_not_skipped_in_silence(folder: Path) -> None:
    for name, text in CAPTIONS.items():
        (folder / f"{Path(name).stem}.txt").write_text(text, encoding="utf-8")
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.md").write_text("no image")
    (folder / ".cache").mkdir()
    Image.new("RGB", (2, 2)).save(folder / ".cache" / "thumb.png")
    assert [Path(pair.image).name for pair in read_folder(folder)] == sorted(CAPTIONS)
    (folder / "more").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "more" / "d.png")
    with pytest.raises(AnchorError, match=r"the subfolder 'more' holds images, such as 'd.png'"):
        read_folder(folder)
    as_json(folder, "captions")  # a table says which images are meant
    assert len(read_folder(folder)) == len(CAPTIONS)


def test_a_table_elsewhere(folder: Path) -> None:
    """Its images lie where it says, seen from its own folder."""
    (folder / "tables").mkdir()
    rows = ["path,title", *(f'../{name},"{text}"' for name, text in (("b.png", "one, two"),))]
    (folder / "tables" / "some.csv").write_text("\n".join(rows))
    wanted = from_pairs([folder / "b.png"], ["one, two"], processor)
    assert same(from_csv(folder / "tables" / "some.csv", processor), wanted)


WRONG: list[tuple[str, str, str]] = [
    ("captions.json", "[", "are not JSON"),
    ("captions.json", "3", "expected file -> caption, or a list"),
    ("captions.json", '{"a.jpg": "x"}', "2 images have no caption in captions.json, the first"),
    ("captions.json", '{"a.jpg": "x", "b.png": "y", "c.PNG": " "}', "'c.PNG' has no text"),
    ("captions.json", '{"a.jpg": "x", "b.png": "", "c.PNG": "z"}', "'b.png' has no text"),
    ("captions.jsonl", '{"file_name": "d.png", "text": "x"}', "3 images have no caption"),
    ("captions.jsonl", '{"file_name": "a.jpg"}', "entry 1: expected file_name and text"),
    ("captions.jsonl", '{"file_name": 3, "text": "x"}', "entry 1: expected file_name and text"),
    ("captions.csv", "name,words\na.jpg,x\n", "it has .'name', 'words'"),
    ("captions.txt", "a.jpg x\n", "line 1: expected file, tab, caption"),
    ("captions.csv", "", "no image and no captions"),
]


@pytest.mark.parametrize(("name", "text", "message"), WRONG)
def test_what_is_wrong_is_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(AnchorError, match=message):
        from_folder(folder, processor)


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match=r"no captions: expected captions\.json"):
        from_folder(folder, processor)
    with pytest.raises(AnchorError, match="nowhere"):
        from_folder(tmp_path / "nowhere", processor)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "captions.json").write_text('{"d.png": "w"}')
    with pytest.raises(AnchorError, match=r"there is no image .*d\.png"):
        from_folder(tmp_path / "other", processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AnchorError, match="no image and no captions"):
        from_folder(tmp_path / "empty", processor)
    with pytest.raises(AnchorError, match="cannot be read"):
        from_csv(tmp_path / "none.csv", processor)
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(AnchorError, match=r"a.jpg' cannot be read"):
        from_folder(folder, processor)


def as_weighted(folder: Path, write: str, weights: list[Any]) -> None:
    rows = [
        {"file_name": name, "text": text, "weight": weight}
        for (name, text), weight in zip(CAPTIONS.items(), weights, strict=True)
    ]
    if write == "jsonl":
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif write == "json":
        (folder / "captions.json").write_text(json.dumps(rows))
    else:
        with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "weight"])
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("write", ["json", "jsonl", "csv"])
def test_weights_in_a_table(folder: Path, write: str) -> None:
    weights = [0.5, 2, 0.1]
    as_weighted(folder, write, weights)
    names = [folder / name for name in CAPTIONS]
    wanted = from_pairs(names, list(CAPTIONS.values()), processor, 2, weights)
    found = from_folder(folder, processor, 2)
    assert same(found, wanted)
    for batch, other in zip(found, wanted, strict=True):
        assert torch.equal(batch["anchor_weight"], other["anchor_weight"])
    assert [pair.weight for pair in read_folder(folder)] == weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2, "heavy"], "weight of 'c.PNG' is 'heavy', not a number"),
        ([1, True, 2], "weight of 'a.jpg' is True"),
        ([1, None, 2], "2 of 3 pairs have a weight; all or none"),
        ([1, -1, 2], "at least 0"),
        ([1, 1e400, 2], "finite"),
        ([0, 0, 0], "not all of them 0"),
    ],
)
def test_weights_that_are_none(folder: Path, weights: list[Any], message: str) -> None:
    as_weighted(folder, "jsonl", weights)
    with pytest.raises(AnchorError, match=message):
        from_folder(folder, processor)


def test_a_folder_without_weights_has_none(folder: Path) -> None:
    as_lines(folder, "captions")
    assert "anchor_weight" not in from_folder(folder, processor)[0]
