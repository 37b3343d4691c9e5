"""Batches that are the same on every pass, pairs made into batches, and what the losses compute."""

from __future__ import annotations

import random
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import sapmerge as sm
from sapmerge.anchors.loading import Batches, batch_size, from_pairs
from sapmerge.errors import AnchorError
from sapmerge.losses import alignment, centered_alignment, contrastive, language_modeling
from tests.anchors import models

CPU = torch.device("cpu")


def test_loaders_that_are_the_same_on_every_pass() -> None:
    batches = models.pairs((4, 3))
    samples = models.singles(batches)
    loader = DataLoader(
        [{k: v[0] for k, v in sample.items()} for sample in samples], batch_size=4, shuffle=False
    )
    for given in (batches, tuple(batches), loader):
        found = list(Batches(given, CPU))
        assert len(found) == 2
        for batch, wanted in zip(found, batches):
            assert batch.keys() == wanted.keys()
            assert all(torch.equal(batch[key], wanted[key]) for key in wanted)
    assert (
        Batches(batches, CPU).digest
        == Batches(loader, CPU).digest
        != Batches(models.pairs(seed=1), CPU).digest
    )


@pytest.mark.parametrize("kind", ["generator", "iterator", "number"])
def test_a_loader_that_can_be_read_once_is_refused(kind: str) -> None:
    given: Any = {
        "generator": (b for b in models.pairs()),
        "iterator": iter(models.pairs()),
        "number": 3,
    }[kind]
    with pytest.raises(AnchorError, match="must be re-iterable"):
        Batches(given, CPU)


class Changing:
    """A loader that yields other batches from pass number `after` on."""

    def __init__(self, first: list[Any], later: list[Any], after: int) -> None:
        self.first, self.later, self.left = first, later, after

    def __iter__(self) -> Any:
        self.left -= 1
        return iter(self.first if self.left >= 0 else self.later)


@pytest.mark.parametrize(
    "later",
    ["shuffled", "shorter", "longer", "other text", "other number", "other key", "other dtype"],
)
def test_a_loader_that_changes_is_refused(later: str) -> None:
    batches: list[dict[str, Any]] = [
        {**batch, "who": "x", "k": 1} for batch in models.pairs((4, 4))
    ]
    other: list[Any] = {
        "shuffled": batches[::-1],
        "shorter": batches[:1],
        "longer": [*batches, batches[0]],
        "other text": [{**batch, "who": "y"} for batch in batches],
        "other number": [{**batch, "k": 2} for batch in batches],
        "other key": [
            {("z" if key == "who" else key): value for key, value in b.items()} for b in batches
        ],
        "other dtype": [
            {**batch, "pixel_values": batch["pixel_values"].double()} for batch in batches
        ],
    }[later]
    with pytest.raises(AnchorError, match="not the same on every pass"):
        Batches(Changing(batches, other, after=1), CPU)
    late = Batches(Changing(batches, other, after=3), CPU)
    assert len(list(late)) == 2
    with pytest.raises(AnchorError, match="not the same on every pass"):
        list(late)


def test_a_shuffling_loader_is_refused_by_merge() -> None:
    model = models.clip()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    samples = [
        {key: value[0] for key, value in sample.items()}
        for sample in models.singles(models.pairs((8,)))
    ]
    with pytest.raises(AnchorError, match="shuffl"):
        models.merge(adapters, DataLoader(samples, batch_size=4, shuffle=True), model)
    with pytest.raises(AnchorError, match="there are no anchors"):
        models.merge(adapters, [], model)
    with pytest.raises(AnchorError, match="re-iterable"):
        models.merge(adapters, iter(models.pairs()), model)
    with pytest.raises(AnchorError, match=r"dict batches, .* got a tuple"):
        models.merge(adapters, [(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5))], model)


def test_batch_sizes_and_structures() -> None:
    Pair = namedtuple("Pair", "image text")
    ids, pixels = torch.zeros(3, 5, dtype=torch.long), torch.zeros(7, 3, 8, 8)
    assert batch_size({"pixel_values": pixels, "input_ids": ids}) == 3  # more images than texts
    assert batch_size((pixels, ids)) == 7
    assert batch_size({"flag": torch.tensor(1.0), "x": [pixels]}) == 7
    assert batch_size({"text": "no tensor"}) == 1
    (batch,) = Batches([Pair(pixels, {"ids": [ids, "name", None]})], CPU)
    assert isinstance(batch, Pair)
    assert torch.equal(batch.text["ids"][0], ids)
    assert batch.text["ids"][1:] == ["name", None]
    for dtype in (torch.bfloat16, torch.bool, torch.int8):
        assert (
            len(
                list(
                    Batches(
                        [{"x": torch.ones(2, 2, dtype=dtype), "y": torch.tensor(1, dtype=dtype)}],
                        CPU,
                    )
                )
            )
            == 1
        )


class FakeProcessor:
    """Remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        self.calls.append(inputs)
        count = len(inputs["images"])
        return {
            "pixel_values": torch.zeros(count, 3, 8, 8),
            "input_ids": torch.ones(count, 4, dtype=torch.long),
        }


def test_pairs_for_any_processor(tmp_path: Path) -> None:
    from PIL import Image

    paths = []
    for k in range(5):
        Image.new("L" if k % 2 else "RGBA", (6, 6), k).save(tmp_path / f"{k}.png")
        paths.append(tmp_path / f"{k}.png")
    images = [paths[0], str(paths[1]), *(Image.open(path) for path in paths[2:])]
    processor = FakeProcessor()
    batches = from_pairs(images, ("a", "b", "c", "d", "e"), processor, batch_size=2)
    assert [batch_size(batch) for batch in batches] == [1, 2, 2]
    assert [call["text"] for call in processor.calls] == [["a"], ["b", "c"], ["d", "e"]]
    assert all(
        call["return_tensors"] == "pt" and call["padding"] is True for call in processor.calls
    )
    modes = [image.mode for call in processor.calls for image in call["images"]]
    assert modes == ["RGB"] * 5
    assert len(list(Batches(batches, CPU))) == 3


def test_pairs_for_siglip_are_padded_as_in_training() -> None:
    class SiglipProcessor(FakeProcessor):
        pass

    processor = SiglipProcessor()
    from_pairs([torch.zeros(3, 8, 8)], ["a"], processor)
    assert processor.calls[0]["padding"] == "max_length"


@pytest.mark.parametrize(
    ("images", "texts", "size", "message"),
    [
        ([1], [], 16, "1 images and 0 texts"),
        ([], [], 16, "0 images"),
        ([1], ["a"], 0, "batch_size"),
        (["no.png"], ["a"], 1, "no.png"),
    ],
)
def test_pairs_that_are_none(images: Any, texts: Any, size: int, message: str) -> None:
    with pytest.raises(AnchorError, match=message):
        from_pairs(images, texts, FakeProcessor(), batch_size=size)


def clip_processor(folder: Path, size: int = 8) -> Any:
    """A CLIPProcessor of transformers, from a vocabulary of letters."""
    import json

    from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters)][:46]
    vocabulary = {word: k for k, word in enumerate(words)} | {
        "<|startoftext|>": 48,
        "<|endoftext|>": 49,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )
    crop = {"height": size, "width": size}
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop)
    return CLIPProcessor(images, tokenizer)


def test_captions_that_are_too_long_are_cut(tmp_path: Path) -> None:
    """As transformers cuts them: the end of the text stays, which CLIP reads the embedding from."""
    from PIL import Image

    processor, images = clip_processor(tmp_path), [Image.new("RGB", (8, 8))] * 3
    texts = ["a b", "a b c d e f g h i j k l m n", "c"]
    with pytest.warns(sm.SapmergeWarning, match=r"1 of 3 captions.*12 tokens.*'a b c d e"):
        (batch,) = from_pairs(images, texts, processor)
    rows = [processor.tokenizer(text)["input_ids"] for text in texts]
    assert len(rows[1]) == 16
    rows[1] = [*rows[1][:11], rows[1][-1]]
    found = [
        ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    assert found == rows


def test_pairs_for_a_processor_of_transformers(tmp_path: Path) -> None:
    from PIL import Image

    processor = clip_processor(tmp_path)
    random.seed(0)
    images = [
        Image.frombytes("RGB", (10, 9), bytes(random.randrange(256) for _ in range(270)))
        for _ in range(5)
    ]
    images[0].save(tmp_path / "first.png")
    loader = from_pairs(
        [tmp_path / "first.png", *images[1:]],
        ["a b", "c", "d e f", "g", "h i"],
        processor,
        batch_size=3,
    )
    whole = from_pairs(images, ["a b", "c", "d e f", "g", "h i"], processor, batch_size=3)
    assert Batches(loader, CPU).digest == Batches(whole, CPU).digest
    assert loader[1]["pixel_values"].shape == (3, 3, 8, 8)
    model = models.clip()
    adapters, _ = models.adapters(model, [models.BOTH_TARGETS] * 2)
    report = models.merge(adapters, loader, model).report
    assert report.notes["anchors"] == 5
    assert report.notes["loss"] == "alignment"


def test_image_text_losses() -> None:
    image, text = (torch.randn(5, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    batch = {"image_embeds": image, "text_embeds": text}
    cosine = functional.cosine_similarity(image, text)
    assert float(alignment(nn.Module(), batch)) == pytest.approx(float(1 - cosine.mean()), rel=1e-6)
    unit = [functional.normalize(side, dim=-1) for side in (image, text)]
    centered = functional.cosine_similarity(*(side - side.mean(0) for side in unit))
    assert float(centered_alignment(nn.Module(), batch)) == pytest.approx(
        float(1 - centered.mean()), rel=1e-6
    )
    for scale in (None, 2.0):
        model = nn.Module()
        if scale is not None:
            model.logit_scale = nn.Parameter(torch.tensor(scale))
        logits = (unit[0] @ unit[1].T) * (1 / 0.07 if scale is None else torch.tensor(scale).exp())
        wanted = (
            -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
        )
        assert float(contrastive(model, batch)) == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(AnchorError, match="need images"):
        alignment(models.clip(), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_the_models_own_loss() -> None:
    """Labels are the input ids without padding and image tokens, unless the batch has its own."""
    model = models.llava()
    for batch in models.prompts():
        ids = batch["input_ids"]
        labels = ids.masked_fill((batch["attention_mask"] == 0) | (ids == models.IMAGE_TOKEN), -100)
        assert int((labels != -100).sum()) == 7 * len(ids)
        logits = model(**batch).logits[:, :-1]
        wanted = functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        assert float(language_modeling(model, batch)) == pytest.approx(float(wanted), rel=1e-5)
        assert torch.equal(batch["input_ids"], ids)
        assert "labels" not in batch
        own = labels.clone()
        own[:, :8] = -100
        wanted = functional.cross_entropy(
            logits.flatten(0, 1), own[:, 1:].flatten(), ignore_index=-100
        )
        assert float(language_modeling(model, {**batch, "labels": own})) == pytest.approx(
            float(wanted), rel=1e-5
        )
    with pytest.raises(AnchorError, match="returns no loss"):
        language_modeling(models.clip(), models.pairs()[0])
    with pytest.raises(AnchorError, match="dict batches"):
        language_modeling(model, (torch.ones(1),))  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [False, True])
def test_llava_with_labels_of_its_own(labels: bool) -> None:
    model, loader = models.llava(), models.prompts()
    if labels:
        for batch in loader:
            batch["labels"] = batch["input_ids"].clone()
            batch["labels"][:, :6] = -100
    adapters, _ = models.adapters(model, [r".*language_model.*q_proj"] * 2)
    loss = models.merge(adapters, loader, model).report.notes["anchor loss"]["base model"]
    with torch.no_grad():
        values = [float(language_modeling(model, batch)) for batch in loader]
    assert loss == pytest.approx((3 * values[0] + 2 * values[1]) / 5, rel=1e-6)


def test_a_users_loss_is_named() -> None:
    class Mine:
        def __call__(self, model: Any, batch: Any) -> Tensor:
            return alignment(model, batch)

    model, loader = models.clip(), models.pairs()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS] * 2)
    assert models.merge(adapters, loader, model, loss=Mine()).report.notes["loss"] == "Mine"
    assert (
        models.merge(adapters, loader, model, loss=sm.contrastive).report.notes["loss"]
        == "contrastive"
    )
