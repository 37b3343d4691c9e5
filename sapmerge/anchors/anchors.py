"""The anchors of one merge: what the pre-pass of a part may ask."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from sapmerge.anchors.digest import digest_of_weights
from sapmerge.anchors.inputs import stream_grams
from sapmerge.anchors.loading import batch_size
from sapmerge.anchors.runner import Runner
from sapmerge.anchors.statistics import GradientStatistics, in_turn, slopes_along
from sapmerge.core.layer import Layer
from sapmerge.core.protocols import LayerStream, Units
from sapmerge.core.updates import Update
from sapmerge.errors import SapmergeWarning
from sapmerge.losses import PAIR_LOSSES, Loss
from sapmerge.models import exclusive

__all__ = ["Anchors"]


class Anchors(Runner):
    """An `AnchorPass` over real anchors: the runner's passes, asked for gradients,
    losses and Gram matrices.

    Args:
        model: the base model (or a PeftModel of it, whose own adapters are disabled). It comes back
            as it was.
        loader: re-iterable batches; dict batches go to `model(**batch)`.
        modules: layer -> Module, of all adapters.
        adapters: per adapter its label and a function that gives its updates, layer -> update.
        loss: (model, batch) -> scalar; None: by what the model is.
        budget: bytes of gradient statistics that may be held at once;
            more is computed a group of layers at a time.

    Raises:
        AnchorError: no batches, batches that change, no loss for this model.
        ModelMismatchError: the model lacks a module.
        NonFiniteError: the model's weights are NaN or infinite.
    """

    @property
    def model_digest(self) -> str:
        """sha256 of the base model's weights.

        Raises:
            AnchorError: they are not those that the merge began with any more.
        """
        with exclusive(self.model) as base:
            self._base.check(base)
            return digest_of_weights(base)

    def observe(self, layers: LayerStream, units: Units) -> GradientStatistics:
        """Gradients in the coordinates of `units`; nothing runs before the first
        one is asked for.
        """
        return GradientStatistics(self, layers, units)

    def in_turn(
        self, layers: LayerStream, units: Units
    ) -> Iterator[tuple[Sequence[int], GradientStatistics]]:
        """See `AnchorPass`."""
        return in_turn(self, layers, units)

    @property
    def pairs(self) -> bool:
        """See `AnchorPass`."""
        if self.loss not in PAIR_LOSSES:
            return False
        sizes = [batch_size(batch) for batch in self.batches]
        if min(sizes) < 2 <= max(sizes):
            message = (
                f"batch {sizes.index(1)} of the anchors holds one pair, so none are "
                "compared; deal them evenly"
            )
            warnings.warn(message, SapmergeWarning, stacklevel=2)
        return min(sizes) > 1

    def losses(self, loss: Loss | None = None) -> list[float]:
        """The mean loss on the anchors at base + adapter, for every adapter.

        Args:
            loss: the anchors' own by default.
        """
        return [self.loss_at(k, loss or self.loss) for k in range(len(self.adapters))]

    def slopes(
        self,
        updates: Mapping[str, Update],
        directions: Mapping[str, Sequence[Update]],
        loss: Loss | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        """The mean loss at base + updates, and its derivatives <G, D> along directions:
        layer -> (K,), float64.
        """
        return slopes_along(self.at(updates, loss), directions)

    def grams(self, layers: LayerStream, fold: Callable[[Layer, int, Tensor], None]) -> None:
        """See `AnchorPass`: the Gram matrices of the layers' inputs, streamed within the budget."""
        stream_grams(self, layers, fold)

    def halves(self) -> tuple[Anchors, Anchors]:
        """The same with every other batch, and with the rest;
        of a single batch, with every other sample.
        """
        return self.half(0), self.half(1)
