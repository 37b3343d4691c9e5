"""`Prune`: scorer -> mask builder -> rescaler, over units, one adapter at a time."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sapmerge.core.layer import Layer, seed_of
from sapmerge.core.linalg import finite
from sapmerge.core.part import part, unprepared
from sapmerge.core.protocols import (
    Coordinates,
    LayerStream,
    MaskBuilder,
    Observation,
    Rescaler,
    Scorer,
    Stats,
    Units,
)
from sapmerge.core.selection import count_true
from sapmerge.core.updates import Update, as_update
from sapmerge.errors import MethodError, NonFiniteError
from sapmerge.parts.rescalers import Keep
from sapmerge.parts.units import Entries

__all__ = ["Prune"]


@part
class Prune:
    """Score the units of every adapter, mask the low ones, rescale what is left.
    Looks at one adapter at a time.

    Args:
        scorer: (values, stats) -> scores.
        mask: (scores) -> bool, or a float multiplier.
        rescaler: (pruned, original) -> update.
        units: what is scored and masked.

    Score by gradients in the first step of a Chain:
    after it the updates are others, and anchors are not at hand.

    Raises:
        NonFiniteError: a score is NaN or infinite.
        MethodError: scores or mask of another shape than the values;
            gradients are read but there are no anchors.

    Example:
        >>> import torch, sapmerge as sm
        >>> layer = sm.Layer("l", (sm.Dense(torch.tensor([[3.0, 1.0]])),))
        >>> sm.Prune(sm.Magnitude(), sm.TopFraction(0.5))(layer).updates[0].dense()
        tensor([[3., 0.]])
    """

    scorer: Scorer
    mask: MaskBuilder
    rescaler: Rescaler = Keep()
    units: Units = Entries()
    fitted: Mapping[str, MaskBuilder] | None = field(default=None, repr=False)
    decided: Mapping[tuple[str, int], _Decision] | None = field(default=None, repr=False)

    def prepare(self, layers: LayerStream) -> Prune:
        """Fit a mask that needs the whole adapter; with gradients, decide every mask,
        so that only masks are kept.
        """
        reads = getattr(self.scorer, "reads_gradients", None)  # a user's function does not say
        if layers.anchors is None or reads is False:
            for layer in layers:  # what cannot work fails here, early
                for k in _present(layer):
                    list(self._scored(layer, k, None, self.units(layer.updates[k])))
                break
            return replace(self, fitted=self._fit(layers))
        decided: dict[tuple[str, int], _Decision] = {}
        for turn, seen in layers.anchors.in_turn(layers, self.units):
            fitted = replace(self, fitted=self._fit(layers, turn, seen))
            for layer in layers:
                for k in _present(layer, turn):
                    masks, notes = fitted._decide(layer, k, seen, self.units(layer.updates[k]))
                    decided[layer.name, k] = _Decision(
                        {name: PackedMask.packed(keep) for name, keep in masks.items()}, notes
                    )
        return replace(self, decided=decided)

    def __call__(self, layer: Layer) -> Layer:
        return layer.with_updates(list(pruned_in_turn((self,), layer)))

    def one(self, layer: Layer, k: int, update: Update) -> tuple[Update, Mapping[str, float]]:
        """What becomes of an update of adapter k, and what a report wants to know about it."""
        coordinates = self.units(update)
        if self.decided is None:
            masks, notes = self._decide(layer, k, None, coordinates)
        else:
            decision = self.decided[layer.name, k]
            masks, notes = (
                {name: mask.unpacked() for name, mask in decision.masks.items()},
                decision.notes,
            )
        kept = {name: _masked(values, masks[name]) for name, values in coordinates.values.items()}
        rescaled = self.rescaler(coordinates.join(kept), update)
        return as_update(rescaled, self.rescaler, layer.name), notes

    def _fit(
        self,
        layers: LayerStream,
        adapters: Container[int] | None = None,
        seen: Observation | None = None,
    ) -> Mapping[str, MaskBuilder] | None:
        fit = getattr(self.mask, "fit", None)
        if fit is None:
            return None

        def scores() -> Iterable[tuple[str, Tensor]]:
            for layer in layers:
                for k in _present(layer, adapters):
                    for _, _, scored in self._scored(layer, k, seen, self.units(layer.updates[k])):
                        yield layer.adapters[k], scored

        return fit(scores)

    def _decide(
        self, layer: Layer, k: int, seen: Observation | None, coordinates: Coordinates
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The masks of one update, and what a report wants to know about them."""
        if self.fitted is None and getattr(self.mask, "needs_fit", hasattr(self.mask, "fit")):
            raise unprepared(self)
        mask = self.mask if self.fitted is None else self.fitted[layer.adapters[k]]
        masks, count, score, overlap = dict[str, Tensor](), _Share(), _Share(), _Share()
        for name, values, scores in self._scored(layer, k, seen, coordinates):
            keep = mask(scores)
            if not isinstance(keep, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MethodError(
                    f"{mask!r} must return a mask, a tensor of the scores' shape; got a "
                    f"{type(keep).__name__}"
                )
            if keep.shape != values.shape:
                raise MethodError(
                    f"{mask!r} made a mask {tuple(keep.shape)} for values {tuple(values.shape)}"
                )
            masks[name] = keep
            count.add(count_true(keep), keep.numel())
            if seen is not None:
                score.add(float(scores[keep != 0].abs().sum()), float(scores.abs().sum()))
                halves = [
                    self.scorer(values, stats_of(layer, k, name, seen, half)) for half in (0, 1)
                ]
                # one anchor, or scores that are all 0: nothing was decided twice
                if torch.equal(*halves):
                    continue
                one, other = (mask(half) != 0 for half in halves)
                overlap.add(float((one & other).sum()), float(one.sum() + other.sum()) / 2)
        notes = {"density": count.value}
        if seen is not None:
            findings = {"score_kept": score, "anchor_stability": overlap}
            notes |= {name: share.value for name, share in findings.items() if share.whole}
            notes["saliency"] = score.whole
        return masks, notes

    def _scored(
        self, layer: Layer, k: int, seen: Observation | None, coordinates: Coordinates
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(part, values, scores) of adapter k."""
        where = f"layer {layer.name!r} of adapter {layer.adapters[k]!r}"
        for name, values in coordinates.values.items():
            before = _version(values)
            scores = self.scorer(values, stats_of(layer, k, name, seen))
            if _version(values) != before:
                raise MethodError(
                    f"{self.scorer!r} changes the values that it scores, which are the adapter's "
                    f"own, in {where}: values.abs() makes others, values.abs_() does not"
                )
            if not isinstance(scores, Tensor) or scores.shape != values.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MethodError(
                    f"{self.scorer!r} must return one score per value, as a tensor: got {got} for "
                    f"{tuple(values.shape)} in {where}"
                )
            if scores.dtype == torch.bool or scores.is_complex():
                raise MethodError(
                    f"{self.scorer!r} must return numbers, the highest of which are kept; got "
                    f"{scores.dtype} in {where}. A rule that says yes or no is a mask builder"
                )
            if not finite(scores):
                raise NonFiniteError(f"{self.scorer!r} gives NaN or infinite scores in {where}")
            yield name, values, scores


def pruned_in_turn(steps: Sequence[Prune], layer: Layer) -> Iterator[Update]:
    """The updates of a layer after some steps, one after the other: who adds them up holds one."""
    recorded = [dict[str, dict[str, float]]() for _ in steps]
    for k, update in enumerate(layer):
        for step, found in zip(steps, recorded, strict=True):
            if not update.absent:
                update, notes = step.one(layer, k, update)
                for key, value in notes.items():
                    found.setdefault(key, {})[layer.adapters[k]] = value
        yield update
    for found in recorded:
        for key, values in found.items():
            layer.record(key, values)


def stats_of(
    layer: Layer, k: int, part: str, seen: Observation | None, half: int | None = None
) -> Stats:
    """What a scorer may know about one part of update k;
    half: None for all anchors, 0 or 1 for one half of them.
    """
    return _Stats(layer.adapters[k], layer.name, part, layer.digests[k], k, seen, half)


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """values * mask. In steps of one dtype, and bytes for bools:
    they are converted five times as fast.
    """
    if mask.dtype != torch.bool:
        return values * mask.to(values.device)
    return mask.view(torch.uint8).to(values).mul_(values)


def _version(values: Tensor) -> int:
    """How often a tensor was written to, as far as torch counts it."""
    return 0 if values.is_inference() else cast("Any", values)._version


def _present(layer: Layer, adapters: Container[int] | None = None) -> list[int]:
    """Those of the adapters, of all by default, that have the layer."""
    return [
        k
        for k, update in enumerate(layer)
        if not update.absent and (adapters is None or k in adapters)
    ]


@dataclass(frozen=True)
class _Stats:
    """`Stats` of one part of one update; half: None for all anchors,
    0 or 1 for one half of them.
    """

    adapter: str
    layer: str
    part: str
    digest: str
    index: int
    seen: Observation | None
    half: int | None

    @property
    def gradient(self) -> Tensor:
        return self.moment("mean")

    def moment(self, statistic: str, at: str = "adapter") -> Tensor:
        return self._of(
            self._observed("gradients").moment(self.layer, self.index, self.part, statistic, at)
        )

    @property
    def activations(self) -> Tensor:
        return self._of(
            self._observed("activations").activations(self.layer, self.index, self.part)
        ).sqrt()

    def _observed(self, what: str) -> Observation:
        if self.seen is None:
            raise MethodError(
                f"the scorer reads {what}, but there are none for layer {self.layer!r} of "
                f"{self.adapter!r}: pass anchors and a model, merge(adapters, anchor_loader, "
                f"model, method=...), and score by {what} in the first Prune of a chain"
            )
        return self.seen

    def _of(self, halves: tuple[Tensor, Tensor]) -> Tensor:
        return (halves[0] + halves[1]) / 2 if self.half is None else halves[self.half]

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(seed, self.digest, self.layer, self.part))


@dataclass(frozen=True)
class PackedMask:
    """A mask as it is kept between the pre-pass and the merge:
    one bit per unit, or a float multiplier as it is.
    """

    data: np.ndarray[tuple[int], np.dtype[np.uint8]] | Tensor
    shape: torch.Size

    @staticmethod
    def packed(keep: Tensor) -> PackedMask:
        if keep.dtype != torch.bool:
            return PackedMask(keep, keep.shape)
        return PackedMask(np.packbits(keep.flatten().cpu().numpy()), keep.shape)

    def unpacked(self) -> Tensor:
        if isinstance(self.data, Tensor):
            return self.data
        bits = np.unpackbits(self.data, count=self.shape.numel())
        return torch.from_numpy(bits).view(self.shape).bool()  # pyright: ignore[reportUnknownMemberType]


@dataclass(frozen=True)
class _Decision:
    masks: Mapping[str, PackedMask]
    notes: Mapping[str, float]


@dataclass
class _Share:
    """A part of a whole, summed up."""

    part: float = 0.0
    whole: float = 0.0

    def add(self, part: float, whole: float) -> None:
        self.part, self.whole = self.part + part, self.whole + whole

    @property
    def value(self) -> float:
        return self.part / self.whole if self.whole else 1.0
