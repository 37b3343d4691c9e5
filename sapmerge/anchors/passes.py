"""Running the anchors: gradients in the coordinates of a unit, and losses, for the pre-pass of a method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sapmerge.adapter import Module
from sapmerge.anchors.gradients import TokenGradient, token_gradient
from sapmerge.anchors.hooks import attached, frozen
from sapmerge.anchors.loading import Batches, batch_size
from sapmerge.anchors.losses import (
    IMAGE_INPUTS,
    TEXT_INPUTS,
    Loss,
    alignment,
    centered_alignment,
    contrastive,
    default_loss,
    embedding,
    loss_name,
)
from sapmerge.bases import Frames
from sapmerge.errors import AnchorError, MethodError, NonFiniteError, SapmergeWarning
from sapmerge.layer import LayerStream, Update
from sapmerge.models import device_of, find_modules
from sapmerge.units import Entries, GradientView, Units

__all__ = ["Anchors"]

_PAIR_LOSSES = (alignment, centered_alignment, contrastive)
_BUDGET = 2 << 30
"""Bytes of gradient statistics that may be held at once; more is computed a group of layers at a time."""

Pull = Callable[[GradientView], Mapping[str, Tensor]]
Halves = dict[str, tuple[Tensor, Tensor]]
Calls = dict[str, list[tuple[Tensor, Tensor]]]


class Anchors:
    """The anchors of one merge: a model, batches, a loss, and the adapters that are put into the model.

    Args:
        model: the base model (or a PeftModel of it, whose own adapters are disabled). It comes back as it was.
        loader: re-iterable batches; dict batches go to `model(**batch)`.
        modules: layer -> Module, of all adapters.
        adapters: per adapter its label and a function that gives its updates, layer -> update.
        loss: (model, batch) -> scalar; None: by what the model is.
        budget: bytes of gradient statistics that may be held at once.

    Raises:
        AnchorError: no batches, batches that change, no loss for this model.
        ModelMismatchError: the model lacks a module.
    """

    def __init__(
        self,
        model: Any,
        loader: Any,
        modules: Mapping[str, Module],
        adapters: Sequence[tuple[str, Callable[[], Mapping[str, Update]]]],
        loss: Loss | None = None,
        budget: int = _BUDGET,
    ) -> None:
        self.targets, self.modules = find_modules(model, modules), modules
        self.model, self.adapters, self.budget = model, adapters, budget
        self.batches = Batches(loader, device_of(model))
        with frozen(model) as base:
            self.loss: Loss = default_loss(base) if loss is None else loss
            for name, module in self.targets.items():
                if not bool(torch.isfinite(cast("Tensor", module.weight)).all()):
                    raise NonFiniteError(f"the base model's weight of {name!r} has NaN or infinite entries")
        self.used = False
        self.loss_at: dict[str, float] = {}

    def observe(self, layers: LayerStream, units: Units) -> _Observation:
        """Gradients in the coordinates of `units`; nothing runs before the first one is asked for."""
        return _Observation(self, layers, units)

    def losses(self, loss: Loss | None = None) -> list[float]:
        """The mean loss on the anchors at base + adapter, for every adapter.

        Args:
            loss: the anchors' own by default.
        """
        return [self.loss_of(updates(), loss, who=label) for label, updates in self.adapters]

    def loss_of(
        self, updates: Mapping[str, Update], loss: Loss | None = None, who: str = "the merged adapter"
    ) -> float:
        """The mean loss on the anchors at base + updates."""
        self.used = True
        total, count = 0.0, 0
        with frozen(self.model) as base, torch.no_grad(), attached(self.targets, self._moved(updates)):
            for batch in self.batches:
                value = self._value(loss or self.loss, base, batch, who)
                total, count = total + float(value) * batch_size(batch), count + batch_size(batch)
        return total / count

    def note_losses(self) -> None:
        """Complete `loss_at` (base and every adapter) for the report."""
        if "base" not in self.loss_at:
            self.loss_at["base"] = self.loss_of({}, who="the base model")
        for label, updates in self.adapters:
            if label not in self.loss_at:
                self.loss_at[label] = self.loss_of(updates(), who=label)

    def summary(self) -> dict[str, object]:
        """What a report says about the anchors."""
        self.note_losses()
        pairs = sum(batch_size(batch) for batch in self.batches)
        return {"anchors": pairs, "loss": loss_name(self.loss), "anchor loss": dict(self.loss_at)}

    def backward(self, adapter: int | None, watched: Mapping[str, Callable[[TokenGradient, int], None]]) -> int:
        """One pass over the anchors, at base + one adapter or at the base.

        Args:
            adapter: its index; None for the base.
            watched: layer -> what to do with its gradient in each batch and with the size of that batch.

        Returns:
            The number of samples.
        """
        self.used = True
        label = "base" if adapter is None else self.adapters[adapter][0]
        updates: Mapping[str, Update] = {} if adapter is None else self.adapters[adapter][1]()
        total, count = 0.0, 0
        with frozen(self.model) as base:
            for batch in self._with_shared_tower(base):
                size = batch_size(batch)
                calls: Calls = {}

                def sink(
                    name: str, x: Tensor, g: Tensor, calls: dict[str, list[tuple[Tensor, Tensor]]] = calls
                ) -> None:
                    calls.setdefault(name, []).append((x, g.detach()))

                with torch.enable_grad(), attached(self.targets, self._moved(updates), dict.fromkeys(watched, sink)):
                    value = self._value(self.loss, base, batch, label)
                    if not value.requires_grad:
                        raise AnchorError(
                            f"the loss {loss_name(self.loss)!r} does not depend on any layer that the adapters change"
                        )
                    value.backward()  # pyright: ignore[reportUnknownMemberType]
                total, count = total + float(value.detach()) * size, count + size
                for name, pairs in calls.items():
                    if not all(bool(torch.isfinite(g).all()) for _, g in pairs):
                        raise NonFiniteError(
                            f"the anchors' gradient is NaN or infinite: adapter {label!r}, layer {name!r}"
                        )
                    watched[name](token_gradient(self.targets[name], pairs, size), size)
        self.loss_at[label] = total / count
        return count

    def _value(self, loss: Loss, base: nn.Module, batch: Any, who: str) -> Tensor:
        value = loss(base, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AnchorError(f"the loss {loss_name(loss)!r} must return one number as a tensor; got {value!r}")
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"the anchor loss {loss_name(loss)!r} is {float(value)} at base + {who!r}")
        return value.reshape(())

    def _moved(self, updates: Mapping[str, Update]) -> dict[str, Update]:
        return {
            name: update.to(cast("Tensor", self.targets[name].weight).device)
            for name, update in updates.items()
            if update.rank
        }

    def _with_shared_tower(self, base: nn.Module) -> Iterator[Any]:
        """The batches; where no adapter touches a tower, its embeddings stand in the batch instead of its inputs."""
        idle = self._idle_towers(base)
        for batch in self.batches:
            for side, inputs in idle.items():
                with torch.no_grad():
                    batch = {**batch, f"{side}_embeds": embedding(base, batch, side)}
                batch = {key: value for key, value in batch.items() if key not in inputs}
            yield batch

    def _idle_towers(self, base: nn.Module) -> dict[str, Sequence[str]]:
        if self.loss not in _PAIR_LOSSES:
            return {}
        idle: dict[str, Sequence[str]] = {}
        for side, inputs in (("image", IMAGE_INPUTS), ("text", TEXT_INPUTS)):
            fired: list[str] = []
            with _noticing(self.targets, fired), torch.no_grad():
                embedding(base, next(iter(self.batches)), side)
            if not fired:
                idle[side] = inputs
        return idle


class _Observation:
    """Gradient statistics, computed a group of layers at a time when the first of the group is asked for."""

    def __init__(self, anchors: Anchors, layers: LayerStream, units: Units) -> None:
        self._anchors, self._layers, self._units = anchors, layers, units
        self._groups: dict[str, int] = {}
        self._held: dict[tuple[int, str, str], dict[tuple[str, int], Halves]] = {}

    def moment(self, layer: str, adapter: int, part: str, statistic: str, at: str) -> tuple[Tensor, Tensor]:
        """See `sapmerge.layer.Observation`."""
        if statistic not in ("mean", "absolute", "square") or at not in ("adapter", "base"):
            raise MethodError(
                "a gradient statistic is 'mean', 'absolute' or 'square', at the 'adapter' or at the 'base'; got "
                f"{statistic!r} at {at!r}"
            )
        if not self._groups:
            self._plan()
        key = (self._groups[layer], statistic, at)
        if key not in self._held:
            if len(set(self._groups.values())) > 1:
                self._held.clear()
            self._held[key] = self._run(key[0], statistic, at)
        return self._held[key][layer, adapter][part]

    def _plan(self) -> None:
        """Split the layers into groups whose statistics fit the budget."""
        group, size = 0, 0
        for layer in self._layers:
            m, n = layer.shape
            entries = isinstance(self._units, Entries)
            need = sum(8 * (m * n if entries else update.rank * (m + n)) for update in layer if update.rank)
            if size and size + need > self._anchors.budget:
                group, size = group + 1, 0
            self._groups[layer.name], size = group, size + need

    def _run(self, group: int, statistic: str, at: str) -> dict[tuple[str, int], Halves]:
        pulls: dict[int, dict[str, tuple[Pull, tuple[Frames, ...]]]] = {}
        for layer in self._layers:
            if self._groups[layer.name] == group:
                for k, update in enumerate(layer):
                    if update.rank:
                        pulls.setdefault(k, {})[layer.name] = (self._units(update).pull, layer.frames)
        sums: dict[tuple[str, int], _Sums] = {
            (name, k): _Sums(pull, frames, statistic)
            for k, layers in pulls.items()
            for name, (pull, frames) in layers.items()
        }
        if at == "base":
            by_layer: dict[str, list[_Sums]] = {}
            for (name, _), found in sums.items():
                by_layer.setdefault(name, []).append(found)
            count = self._anchors.backward(None, {name: _all(found) for name, found in by_layer.items()})
        else:
            count = 0
            for k, layers in pulls.items():
                count = self._anchors.backward(k, {name: sums[name, k].add for name in layers})
        self._warn_of_unused(sorted({name for (name, _), found in sums.items() if not found.seen}))
        return {(name, k): found.halves(count, self._anchors.modules[name].shape) for (name, k), found in sums.items()}

    def _warn_of_unused(self, names: Sequence[str]) -> None:
        if names:
            warnings.warn(
                f"{len(names)} layers take no part in the anchor loss, their scores are 0: {', '.join(names[:3])}"
                + (", ..." if len(names) > 3 else ""),
                SapmergeWarning,
                stacklevel=2,
            )


class _Sums:
    """Sums of a gradient statistic over the samples of even and of odd number."""

    def __init__(self, pull: Pull, frames: tuple[Frames, ...], statistic: str) -> None:
        self._pull, self._frames, self._statistic = pull, frames, statistic
        self._sums: list[dict[str, Tensor]] = [{}, {}]
        self.seen = 0

    def add(self, gradient: TokenGradient, size: int) -> None:
        """One batch. The loss is a mean over the batch, so a sample's own gradient is `size` times its part."""
        gradient = gradient.inside(self._frames)
        if len(gradient.x) == size:
            for start in (0, 1):
                chosen = gradient.samples(slice(start, None, 2))
                if len(chosen.x):
                    chosen = chosen.together() if self._statistic == "mean" else chosen
                    self._accumulate((self.seen + start) % 2, chosen, size)
        elif self._statistic == "mean":
            for half in (0, 1):  # the samples cannot be told apart: both halves are the whole
                self._accumulate(half, gradient.together(), size / 2)
        else:
            raise AnchorError(
                "the scorer reads gradients per sample, but a layer mixes the samples of a batch "
                f"({len(gradient.x)} rows for {size} samples); use batches of one sample, or Taylor()"
            )
        self.seen += size

    def _accumulate(self, half: int, gradient: TokenGradient, factor: float) -> None:
        for name, value in self._pull(gradient).items():
            each = value * factor
            if self._statistic == "absolute":
                each = each.abs()
            elif self._statistic == "square":
                each = each.square()
            total = each.sum(0)
            self._sums[half][name] = self._sums[half][name] + total if name in self._sums[half] else total

    def halves(self, count: int, shape: tuple[int, int]) -> Halves:
        """Two estimates whose mean is the statistic over all `count` samples; zero for a layer without a gradient."""
        if not self.seen:
            nothing = TokenGradient(torch.zeros(1, 1, shape[1]), torch.zeros(1, 1, shape[0]))
            self._accumulate(0, nothing.inside(self._frames), 0.0)
        names = self._sums[0] | self._sums[1]
        if count == 1:  # one sample has no halves
            return {name: (value / count, value / count) for name, value in names.items()}
        zero = {name: torch.zeros_like(value) for name, value in names.items()}
        one, other = (zero | sums for sums in self._sums)
        return {name: (one[name] * (2 / count), other[name] * (2 / count)) for name in names}


def _all(sums: Sequence[_Sums]) -> Callable[[TokenGradient, int], None]:
    def add(gradient: TokenGradient, size: int) -> None:
        for found in sums:
            found.add(gradient, size)

    return add


@contextmanager
def _noticing(targets: Mapping[str, nn.Module], fired: list[str]) -> Generator[None]:
    """Notes which of the modules are run."""

    def note(name: str) -> Callable[..., None]:
        return lambda *_: fired.append(name)  # pyright: ignore[reportUnknownLambdaType]

    handles = [module.register_forward_hook(note(name)) for name, module in targets.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
