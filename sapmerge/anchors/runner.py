"""Running the anchors through a model with an adapter in it:
forward and backward passes, and the mean loss.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from sapmerge.anchors.cache import Resume, kept_losses
from sapmerge.anchors.freezing import BaseWeights, frozen
from sapmerge.anchors.gradients import Call, TokenGradient, token_gradient
from sapmerge.anchors.hooks import Seen, Watch, attached, check_base, seeing
from sapmerge.anchors.loading import Batches, Half, batch_size
from sapmerge.anchors.passes import Passes
from sapmerge.anchors.prefix import Prefix
from sapmerge.anchors.shard import Shard, ShardDone
from sapmerge.anchors.towers import embedded, stand_in
from sapmerge.core.linalg import finite, wide
from sapmerge.core.updates import Update
from sapmerge.errors import AnchorError, NonFiniteError
from sapmerge.io.modules import Module
from sapmerge.losses import (
    PAIR_LOSSES,
    Loss,
    alignment,
    is_outputs_only,
    loss_for,
    loss_name,
    once_embedded,
)
from sapmerge.models import device_of, exclusive, find_sites

__all__ = ["Load", "Runner"]

Load: TypeAlias = Callable[[], Mapping[str, Update]]
"""Gives the updates of one adapter, layer -> update."""

_BUDGET = 2 << 30
_HALF_SCALES = (2.0**14, 2.0**8, 2.0**3, 1.0)
"""What the loss is multiplied by in a float16 model,
where gradients below 6e-8 are 0 and above 65504 infinite.
"""


@dataclass
class _Flag:
    up: bool = False


class Runner:
    """A model, batches, a loss, and the adapters that are put into the model.

    Args:
        model: the base model (or a PeftModel of it, whose own adapters are disabled). It comes back
            as it was.
        loader: re-iterable batches; dict batches go to `model(**batch)`.
        modules: layer -> Module, of all adapters.
        adapters: per adapter its label and a function that gives its updates, layer -> update.
        loss: (model, batch) -> scalar; None: by what the model is.
        budget: bytes of gradient statistics that may be held at once; more is computed a group of
            layers at a time. Half as much may be held of outputs that are the same for every
            adapter (`Prefix`).

    Raises:
        AnchorError: no batches, batches that change, no loss for this model.
        ModelMismatchError: the model lacks a module.
        NonFiniteError: the model's weights are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        loader: Any,
        modules: Mapping[str, Module],
        adapters: Sequence[tuple[str, Load]],
        loss: Loss | None = None,
        budget: int = _BUDGET,
    ) -> None:
        self.sites, self.modules = find_sites(model, modules), modules
        self.targets = {name: site.module for name, site in self.sites.items()}
        self.model, self.adapters, self.budget = model, adapters, budget
        self.batches = Batches(loader, device_of(model))
        self._base = BaseWeights()  # shared by copies
        with frozen(model) as base:
            self.loss: Loss = loss_for(base, loss)
            check_base(base, self.sites)
            self._base.note(base)
        self._used = _Flag()  # shared by copies
        self.cache_only, self.shard, self.passes = False, Shard(), Passes()
        self.unused = set[str]()
        self.resume: Resume | None = None
        self._known: dict[Load | None, float] = {}  # who gives an adapter -> its loss
        self._prefix = Prefix(self.targets.values(), budget // 2)

    def resume_in(self, folder: str | os.PathLike[str], digests: Sequence[str]) -> None:
        """Keep the statistics of every adapter in a folder,
        and take from there what an earlier run has left.

        Args:
            folder: of the cache.
            digests: of the adapters' content.
        """
        with frozen(self.model) as base:
            self.resume = Resume(folder, digests, base, self.batches.digest, self.loss)

    def base_is_now(self) -> None:
        """The base model's weights were changed by the merge itself, or put back."""
        with exclusive(self.model) as base:
            self._base.note(base)

    def note_loss(self, adapter: int, loss: float) -> None:
        """The anchors' loss at base + adapter, known from an earlier run."""
        self._used.up = True
        self._known[self._key(adapter)] = loss

    @property
    def used(self) -> bool:
        """Whether anything was asked of the anchors."""
        return self._used.up

    def loss_of(
        self,
        updates: Mapping[str, Update],
        loss: Loss | None = None,
        who: str = "the merged adapter",
    ) -> float:
        """The mean loss on the anchors at base + updates."""
        self._used.up = True
        losses = (loss or self.loss,)
        keys, (value,) = kept_losses(self.resume, updates, losses)
        return self._measured(updates, losses, keys, who)[0] if value is None else value

    def _measured(
        self,
        updates: Mapping[str, Update],
        losses: Sequence[Loss],
        keys: Sequence[str],
        who: str,
    ) -> list[float]:
        """One loss of any kind, or several of image-text pairs, from one pass."""
        self._allow(f"the loss {loss_name(losses[0])!r} at {who}")
        if self.shard.skipped and who == "the merged adapter":
            raise ShardDone
        totals, count = [0.0] * len(losses), 0
        with (
            self._running(losses[0]) as base,
            torch.no_grad(),
            attached(self.sites, self._moved(updates), who),
        ):
            for batch, size in self._batches(base, losses[0], f"loss at {who}"):
                if len(losses) > 1:
                    self._prefix.start()
                    batch = once_embedded(base, batch)
                for number, loss in enumerate(losses):
                    totals[number] += float(self._value(loss, base, batch, who)) * size
                count += size
        if self.resume is not None:
            for key, total in zip(keys, totals, strict=True):
                self.resume.put_loss(key, total / count)
        return [total / count for total in totals]

    def mine(self, adapter: int) -> bool:
        """Whether this process runs what belongs to one adapter; noted if not."""
        if self.shard.count == 1 or adapter % self.shard.count == self.shard.number:
            return True
        self.shard.skipped = True
        return False

    def _allow(self, what: str) -> None:
        if self.cache_only:
            raise AnchorError(
                f"cache_only: the cache lacks {what}; run sapmerge.federated.score on all adapters "
                "with the same "
                "anchors, model, loss and method, or merge without cache_only"
            )

    def scaled(self, factors: Mapping[str, Sequence[float]]) -> Self:
        """The same at base + multiplied adapters: layer -> one factor per adapter;
        other layers stay as they are.
        """

        def times(load: Load, k: int) -> Load:
            return lambda: {
                name: update.scaled(factors[name][k])
                if name in factors and factors[name][k] != 1
                else update
                for name, update in load().items()
            }

        other = copy.copy(self)
        changed = {k for row in factors.values() for k, factor in enumerate(row) if factor != 1}
        other.adapters = [
            (label, times(load, k) if k in changed else load)
            for k, (label, load) in enumerate(self.adapters)
        ]
        other.resume = None if self.resume is None else self.resume.scaled(factors, changed)
        return other

    def half(self, number: int) -> Self:
        """The same with every other batch, from that number (0 or 1) on;
        of a single batch, with every other sample.
        """
        self._used.up = True
        half = copy.copy(self)
        half.batches = Batches(Half(self.batches, number), device_of(self.model))
        half._known, half.resume = {}, None  # a cache is of all anchors
        half._prefix = Prefix(self.targets.values(), self.budget // 2)
        return half

    def at(self, updates: Mapping[str, Update], loss: Loss | None = None) -> Self:
        """The same with one adapter, which has these updates, and perhaps another loss."""
        here = copy.copy(self)
        here.adapters, here.loss = [("the merged adapter", lambda: updates)], loss or self.loss
        here._known, here.resume = {}, None
        return here

    def backward(
        self, adapter: int | None, watched: Mapping[str, Callable[[TokenGradient, int], None]]
    ) -> int:
        """One pass over the anchors, at base + one adapter or at the base.

        Args:
            adapter: its index; None for the base.
            watched: layer -> what to do with its gradient in each batch and with the
                size of that batch.

        Returns:
            The number of samples.

        Raises:
            NonFiniteError: the loss, a gradient or the output of an adapted layer is.
        """
        self._used.up = True
        who, updates = self._place(adapter)
        self._allow(f"gradients at {who}")
        moved, total, count = self._moved(updates), 0.0, 0
        with self._running(self.loss) as base, torch.enable_grad():
            scales = (
                _HALF_SCALES if any(p.dtype == torch.float16 for p in base.parameters()) else (1.0,)
            )
            for batch, size in self._batches(base, self.loss, f"gradients at {who}"):

                def run(
                    scale: float,
                    hold: bool,
                    base: nn.Module = base,
                    batch: Any = batch,
                    size: int = size,
                ) -> tuple[float, Watch]:
                    watch = Watch(
                        dict.fromkeys(watched, self._sink(watched, size, scale, who)), hold
                    )
                    with attached(self.sites, moved, who, watch):
                        value = self._value(self.loss, base, batch, who)
                        everything = len(watched) == len(updates or self.targets)
                        # of some layers it need not depend on any
                        if not watch.backward(wide(value) * scale) and everything:
                            raise AnchorError(
                                f"the loss {loss_name(self.loss)!r} depends on no layer that the "
                                "adapters change (or "
                                "the model uses reentrant checkpointing: use_reentrant=False)"
                            )
                    return float(value.detach()), watch

                value, watch = run(scales[0], len(scales) > 1)
                for scale in scales[1:]:
                    if not watch.finite():
                        value, watch = run(scale, True)
                watch.deliver()
                total, count = total + value * size, count + size
        self._known[self._key(adapter)] = total / count
        return count

    def forward(self, adapter: int, watched: Mapping[str, Seen]) -> int:
        """One pass without gradients, at base + adapter: layer -> what to do with its inputs.
        The number of samples.
        """
        self._used.up = True
        (who, updates), count = self._place(adapter), 0
        self._allow(f"the inputs of the layers at {who}")
        with (
            self._running(self.loss) as base,
            torch.no_grad(),
            attached(self.sites, self._moved(updates), who),
        ):
            for batch, size in self._batches(base, self.loss, f"inputs at {who}"):
                with seeing(self.sites, watched, size, count):
                    self._value(self.loss, base, batch, who)
                count += size
        return count

    def _sink(
        self,
        watched: Mapping[str, Callable[[TokenGradient, int], None]],
        size: int,
        scale: float,
        who: str,
    ) -> Callable[[str, list[Call]], None]:
        def sink(name: str, calls: list[Call]) -> None:
            if not all(finite(g) for _, g in calls):
                raise NonFiniteError(
                    f"the anchors' gradient of layer {name!r} is NaN or infinite in {who}"
                )
            watched[name](token_gradient(self.targets[name], calls, size, scale), size)

        return sink

    def _place(self, adapter: int | None) -> tuple[str, Mapping[str, Update]]:
        if adapter is None:
            return "the base model", {}
        label, updates = self.adapters[adapter]
        return f"adapter {label!r}", updates()

    def _key(self, adapter: int | None) -> Load | None:
        return None if adapter is None else self.adapters[adapter][1]

    def loss_at(self, adapter: int | None, loss: Loss | None = None) -> float:
        """The mean loss at base + one adapter, or at the base for None;
        the anchors' own loss is measured once.
        """
        self._used.up = True
        loss, key = loss or self.loss, self._key(adapter)
        if loss is self.loss and key in self._known:
            return self._known[key]
        who, updates = self._place(adapter)
        # the report will ask for the anchors' own
        own = self.loss is alignment and loss is not alignment and loss in PAIR_LOSSES
        losses = (loss, alignment) if own else (loss,)
        keys, (value, *more) = kept_losses(self.resume, updates, losses)
        if value is None:
            if adapter is not None and not self.mine(adapter):
                return 0.0
            value, *more = self._measured(updates, losses, keys, who)
        known = more[0] if own else value if loss is self.loss else None
        if known is not None:
            self._known[key] = known
        return value

    @contextmanager
    def _running(self, loss: Loss) -> Generator[nn.Module]:
        with frozen(self.model) as base:
            self._base.check(base)
            self._prefix.check(base)
            with self._prefix.reused(base) if is_outputs_only(loss) else nullcontext():
                yield base

    def _value(self, loss: Loss, base: nn.Module, batch: Any, who: str) -> Tensor:
        self._prefix.start()
        value = cast("object", loss(base, batch))
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            shown = (
                f"a {value.dtype} tensor {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise AnchorError(
                f"the loss {loss_name(loss)!r} must return one number as a tensor; got {shown}"
            )
        if not finite(value):
            raise NonFiniteError(f"the anchor loss {loss_name(loss)!r} is {float(value)} in {who}")
        return value.reshape(())

    def _moved(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        return {
            name: update.to(self.sites[name].weight.device)
            for name, update in updates.items()
            if not update.absent
        }

    def _batches(self, base: nn.Module, loss: Loss, what: str) -> Iterator[tuple[Any, int]]:
        """Batches and their sizes; the embeddings of a tower that no adapter touches stand in
        for its inputs.
        """
        alike = loss in PAIR_LOSSES
        if self._prefix.embedded is None and alike:
            self._prefix.embedded = embedded(base, self.targets.values(), self._tried)
        for number, batch in enumerate(self.passes.over(self.batches, len(self.batches), what)):
            size = batch_size(batch)
            self._prefix.on(number)
            yield (stand_in(batch, number, self._prefix.embedded or {}) if alike else batch), size

    def _tried(self) -> Iterator[Any]:
        """The batches. Of the first, outputs are kept:
        if an adapted layer is reached, it was not run for nothing.
        """
        for number, batch in enumerate(self.batches):
            self._prefix.on(0 if number == 0 else None)
            yield batch
