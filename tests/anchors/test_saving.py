"""A folder of anchors holds what it was given: the same bytes, texts and weights come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge.anchors import Pair, from_folder, from_pairs, read_folder, write_folder
from tests.anchors.test_folders import processor

Image = pytest.importorskip("PIL.Image")


def image(path: Path, shade: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (2, 2), (shade, 20, 30)).save(path)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> list[Pair]:
    """Two images of one name in two folders, and one whose name differs by its case alone."""
    paths = [
        image(tmp_path / "one" / "a.png", 0),
        image(tmp_path / "two" / "a.png", 10),
        image(tmp_path / "three" / "A.png", 20),
        image(tmp_path / "one" / "b.jpg", 30),
    ]
    texts = ["an ape", 'a "bird"', "ein Bär\u2028auf zwei Zeilen", "a cat"]
    return [Pair(str(path), text) for path, text in zip(paths, texts, strict=True)]


def batches(pairs: list[Pair]) -> list[dict[str, Any]]:
    weights = None if pairs[0].weight is None else [pair.weight or 0.0 for pair in pairs]
    images, texts = [pair.image for pair in pairs], [pair.text for pair in pairs]
    return from_pairs(images, texts, processor, 2, weights)


def check(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert set(one) == set(other)
        assert one["text"] == other["text"]
        for key in set(one) - {"text"}:
            assert torch.equal(one[key], other[key]), key


def test_what_was_chosen_comes_back(pool: list[Pair], tmp_path: Path) -> None:
    chosen = sm.anchors.Chosen((0, 1, 2), (0.2, 0.7, 0.1)).among(pool)
    assert [pair.weight for pair in chosen] == pytest.approx([0.6, 2.1, 0.3])
    out = tmp_path / "anchors"
    write_folder(chosen, out)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["A-3.png", "a-2.png", "a.png", "captions.jsonl"]
    assert (out / "a-2.png").read_bytes() == Path(pool[1].image).read_bytes()
    check(from_folder(out, processor, 2), batches(chosen))
    # weights of a coreset go the same way by batches as by the folder
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [row["weight"] for row in rows] == [pair.weight for pair in chosen]


def test_a_pool_from_a_folder(pool: list[Pair], tmp_path: Path) -> None:
    write_folder(pool, tmp_path / "pool")
    read = read_folder(tmp_path / "pool")
    assert [(pair.text, pair.weight) for pair in read] == [(pair.text, None) for pair in pool]
    write_folder(sm.anchors.at_random(torch.eye(4), 2, seed=1).among(read), tmp_path / "few")
    few = read_folder(tmp_path / "few")
    assert len(few) == 2
    assert [pair.weight for pair in few] == [1.0, 1.0]


def test_images_in_memory(tmp_path: Path) -> None:
    made = [Image.new("L", (2, 2), shade) for shade in (7, 9)]
    pairs = [Pair(one, text) for one, text in zip(made, ("x", "y"), strict=True)]
    write_folder(pairs, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "image-1.png",
        "image-2.png",
    ]
    check(from_folder(tmp_path / "out", processor, 2), batches(pairs))


def test_replacing(pool: list[Pair], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(pool[:2], out)
    with pytest.raises(sm.OutputExistsError):
        write_folder(pool[2:], out)
    write_folder(pool[3:], out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["b.jpg", "captions.jsonl"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(sm.OutputError, match=r"notes\.txt"):
        write_folder(pool[:1], out, overwrite=True)
    assert len(read_folder(out)) == 1


def test_a_pool_is_not_replaced_by_its_anchors(pool: list[Pair], tmp_path: Path) -> None:
    write_folder(pool, tmp_path / "pool")
    read = read_folder(tmp_path / "pool")
    with pytest.raises(sm.OutputError, match="one of the inputs"):
        write_folder(read[:1], tmp_path / "pool", overwrite=True)
    assert len(read_folder(tmp_path / "pool")) == 4


def test_refusals(pool: list[Pair], tmp_path: Path) -> None:
    wrong: list[tuple[list[Pair], str]] = [
        ([], "no pairs"),
        ([Pair(pool[0].image, " ")], "has no text"),
        ([Pair(pool[0].image, "x", 1.0), pool[1]], "1 of 2 pairs have a weight"),
        ([Pair(3, "x")], "would be a int; expected a path or a PIL image"),
    ]
    for pairs, message in wrong:
        with pytest.raises(sm.AnchorError, match=message):
            write_folder(pairs, tmp_path / "out")
    with pytest.raises(sm.AdapterFormatError, match=r"nowhere\.png"):
        write_folder([Pair(tmp_path / "nowhere.png", "x")], tmp_path / "out")
    with pytest.raises(sm.AnchorError, match="row 5 was chosen; the pool has 4"):
        sm.anchors.Chosen((0, 5), (0.5, 0.5)).among(pool)
    assert not (tmp_path / "out").exists()
