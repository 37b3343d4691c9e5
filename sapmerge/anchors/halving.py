"""The anchors in two halves: one to decide on, one to check the decision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from sapmerge.anchors.loading import Batches, batch_size
from sapmerge.errors import AnchorError

__all__ = ["Half"]


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
                f"the samples of the only batch cannot be told apart: a tensor {tuple(batch.shape)} in a batch of "
                f"{size}; pass two batches or more"
            )
        return batch[start::2]
    if isinstance(batch, Mapping):
        return {key: _every_other(value, start, size) for key, value in cast("Mapping[str, Any]", batch).items()}
    if isinstance(batch, (tuple, list)):
        items = cast("Sequence[Any]", batch)
        if len(items) == size and not any(isinstance(item, Tensor) for item in items):
            return items[start::2]
        halved = [_every_other(item, start, size) for item in items]
        return halved if isinstance(batch, list) else tuple(halved)
    return batch
