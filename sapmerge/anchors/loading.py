"""Anchor batches: made from pairs, moved to the model's device,
and checked to be the same on every pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.anchors.digest import digest
from sapmerge.errors import AnchorError, printable, warn
from sapmerge.losses import WEIGHT

__all__ = ["Batches", "Half", "from_pairs"]

_NO_LIMIT = 1 << 20  # tokenizers that know no longest text say 1e30


@dataclass(frozen=True)
class Half:
    """Every other batch; of a single batch every other sample. A re-iterable loader.

    Args:
        batches: of all anchors.
        number: 0 or 1.

    Raises:
        AnchorError: a single batch of one sample, or one whose samples cannot be told apart.
    """

    batches: Batches
    number: int

    def __iter__(self) -> Iterator[Any]:
        alone = sum(1 for _ in self.batches) == 1
        for number, batch in enumerate(self.batches):
            if alone:
                yield _every_other(batch, self.number, batch_size(batch))
            elif number % 2 == self.number:
                yield batch


def _every_other(batch: Any, start: int, size: int) -> Any:
    if size < 2:
        raise AnchorError("one anchor has no two halves; pass at least two")
    if isinstance(batch, Tensor):
        if batch.ndim == 0 or len(batch) != size:
            raise AnchorError(
                "the samples of the only batch cannot be told apart: a tensor "
                f"{tuple(batch.shape)} in a batch of {size}; pass two batches or more"
            )
        return batch[start::2]
    if isinstance(batch, Mapping):
        return {
            key: _every_other(value, start, size)
            for key, value in cast("Mapping[str, Any]", batch).items()
        }
    if isinstance(batch, (tuple, list)):
        items = cast("Sequence[Any]", batch)
        if len(items) == size and not any(isinstance(item, Tensor) for item in items):
            return items[start::2]
        halved = [_every_other(item, start, size) for item in items]
        return halved if isinstance(batch, list) else tuple(halved)
    return batch


def from_pairs(
    images: Sequence[Any],
    texts: Sequence[str],
    processor: Any,
    batch_size: int = 16,
    weights: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Anchor batches from images and their texts.

    Args:
        images: PIL images or paths, one per text.
        texts: captions; for LLaVA, prompts with the image token.
        processor: a transformers processor: called with `images=`, `text=`, `return_tensors="pt"`,
            `padding=True` (SigLIP's with "max_length", as it was trained). Captions that are longer
            than its tokenizer takes are cut, with a warning.
        batch_size: pairs per batch at most, dealt out evenly;
            contrastive losses take their negatives from the batch.
        weights: how much each pair counts, as `coreset` says; equal by default.

    Returns:
        A list of dict batches: an `anchor_loader` for `merge`.

    Raises:
        AnchorError: no pairs, not as many images as texts or weights, or a file that is no image.

    Example:
        >>> from sapmerge import anchors
        >>> loader = anchors.from_pairs(photos, captions, processor)  # doctest: +SKIP
    """
    if len(images) != len(texts) or not texts:
        raise AnchorError(f"anchors are pairs: got {len(images)} images and {len(texts)} texts")
    if batch_size < 1:
        raise AnchorError(f"batch_size is a number of pairs, at least 1; got {batch_size!r}")
    if weights is not None and len(weights) != len(texts):
        raise AnchorError(f"got {len(weights)} weights for {len(texts)} pairs")
    padding = "max_length" if type(processor).__name__.lower().startswith("siglip") else True
    cut = _cut(texts, processor)
    batches: list[dict[str, Any]] = []
    count = -(-len(texts) // batch_size)
    for number in range(count):
        chosen = slice(number * len(texts) // count, (number + 1) * len(texts) // count)
        made = processor(
            images=[_image(image) for image in images[chosen]],
            text=list(texts[chosen]),
            return_tensors="pt",
            padding=padding,
            **cut,
        )
        batches.append(dict(made))
        if weights is not None:
            batches[-1][WEIGHT] = torch.tensor(weights[chosen], dtype=torch.float32)
    return batches


def _cut(texts: Sequence[str], processor: Any) -> dict[str, Any]:
    """What a processor is told besides, where captions are longer than the text tower has places
    for. Prompts with image tokens are never cut: what is cut off may be the image.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    limit = getattr(tokenizer, "model_max_length", None)
    if tokenizer is None or not isinstance(limit, int) or limit > _NO_LIMIT:
        return {}
    if getattr(processor, "image_token", None) is not None:
        return {}
    rows = tokenizer(list(texts))["input_ids"]
    long = [text for text, row in zip(texts, rows, strict=True) if len(row) > limit]
    if not long:
        return {}
    warn(
        f"{len(long)} of {len(texts)} captions are longer than the {limit} tokens that the "
        f"tokenizer takes, and are cut; the first is {printable(long[0][:60])!r}"
    )
    return {"truncation": True, "max_length": limit}


def _image(image: Any) -> Any:
    """An image in RGB. Anything but a path or a PIL image is left to the processor."""
    if isinstance(image, (str, os.PathLike)):
        from PIL import Image

        try:
            with cast("Any", Image.open(cast("str | os.PathLike[str]", image))) as opened:
                return opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise AnchorError(
                f"the image {str(cast('object', image))!r} cannot be read: {error}"
            ) from None
    return image.convert("RGB") if hasattr(image, "convert") else image


class Batches:
    """The batches of a re-iterable loader, on the model's device; weights of samples have mean 1.

    Raises:
        AnchorError: it is empty, can be iterated only once, or yields other data the second time; a
            batch holds no sample, or tensors that are sparse, quantised or without data; weights
            are no weights.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        if not hasattr(loader, "__iter__") or hasattr(loader, "__next__"):
            raise AnchorError(
                "the anchors must be re-iterable: they are read once per adapter, and "
                f"{type(loader).__name__} can be "
                "read once; pass a list of batches or a DataLoader"
            )
        self._loader, self._device = loader, device
        self._digests, weights = list[str](), list[Tensor | None]()
        for number, batch in enumerate(loader):
            self._digests.append(self._checked(batch, number))
            weights.append(_weights(batch, number))
        if not self._digests:
            raise AnchorError("there are no anchors: the loader yields no batch")
        self._scale = _to_mean_one(weights)
        for _ in self:  # a loader that shuffles shows itself now, not in the scores
            pass

    @staticmethod
    def _checked(batch: Any, number: int) -> str:
        """The digest of a batch that holds samples, all of them in plain tensors."""
        for leaf in _leaves(batch):
            if isinstance(leaf, Tensor) and (
                leaf.is_meta or leaf.is_quantized or leaf.is_nested or leaf.layout != torch.strided
            ):
                kind = (
                    "a meta tensor, without data"
                    if leaf.is_meta
                    else "a sparse, nested or quantised tensor"
                )
                raise AnchorError(
                    f"batch {number} of the anchors holds {kind}; expected plain tensors"
                )
        if batch_size(batch) == 0:
            raise AnchorError(
                f"batch {number} of the anchors is empty: it holds no sample; leave it out"
            )
        return digest(batch, everything=False)

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for number, batch in enumerate(self._loader):
            if (
                number >= len(self._digests)
                or digest(batch, everything=False) != self._digests[number]
            ):
                raise AnchorError(
                    f"the anchors are not the same on every pass: batch {number} changed. Switch "
                    "shuffling and random augmentation off (DataLoader(..., shuffle=False))"
                )
            count += 1
            yield _rescaled(_moved(batch, self._device), self._scale)
        if count != len(self._digests):
            raise AnchorError(
                f"the anchors are not the same on every pass: {len(self._digests)} batches, then "
                f"{count}"
            )

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self._digests)

    @property
    def content(self) -> str:
        """sha256 over the data of all batches, as the loader gives them."""
        return digest(self._digests)

    @property
    def digest(self) -> str:
        """sha256 over all batches, and the state of objects in them."""
        return digest(list(self._loader))


def _weights(batch: Any, number: int) -> Tensor | None:
    """The weights of a batch's samples, if it has them.

    Raises:
        AnchorError: they are not one finite number per sample, at least 0.
    """
    if not isinstance(batch, Mapping) or WEIGHT not in batch:
        return None
    found, size = cast("Any", batch[WEIGHT]), batch_size(cast("Any", batch))
    right = isinstance(found, Tensor) and found.shape == (size,) and found.is_floating_point()
    if not right or not bool(torch.isfinite(found).all() and (found >= 0).all()):
        raise AnchorError(
            f"{WEIGHT!r} of batch {number} of the anchors must be a tensor of {size} finite "
            "numbers, at least 0: one per sample"
        )
    return found


def _to_mean_one(weights: Sequence[Tensor | None]) -> float:
    """What weights are multiplied by, so that 1 is an ordinary sample; 1 if there are none."""
    given = [each for each in weights if each is not None]
    if given and len(given) < len(weights):
        raise AnchorError(f"some batches of the anchors have {WEIGHT!r} and others do not")
    total = sum(float(each.double().sum()) for each in given)
    if given and total == 0:
        raise AnchorError(f"all of {WEIGHT!r} are 0")
    return sum(map(len, given)) / total if given else 1.0


def _rescaled(batch: Any, scale: float) -> Any:
    """A batch with its weights in the unit of an ordinary sample."""
    return batch if scale == 1 else {**batch, WEIGHT: batch[WEIGHT] * scale}


def batch_size(batch: Any) -> int:
    """The length of the first dimension of the input ids, or else of a batch's first tensor;
    1 if there is none.
    """
    ids = cast("Mapping[str, Any]", batch).get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.ndim:  # there may be more images than texts, or fewer
        return len(ids)
    return next((len(leaf) for leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for key, value in cast("Mapping[str, Any]", batch).items():
            yield key
            yield from _leaves(value)
    elif isinstance(batch, (tuple, list)):
        for value in cast("Sequence[Any]", batch):
            yield from _leaves(value)
    else:
        yield batch


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.clone().to(device) if batch.is_inference() else batch.to(device)
    if isinstance(batch, Mapping):
        return {
            key: _moved(value, device) for key, value in cast("Mapping[str, Any]", batch).items()
        }
    if isinstance(batch, (tuple, list)):
        moved = [_moved(value, device) for value in cast("Sequence[Any]", batch)]
        if hasattr(cast("Any", batch), "_fields"):  # a namedtuple
            return type(cast("Any", batch))(*moved)
        return moved if isinstance(batch, list) else tuple(moved)
    return batch
