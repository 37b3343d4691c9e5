"""`merge`: check everything, run every pre-pass, then stream the layers into a sink.

check adapters -> prepare the method -> for each layer: read, merge, hand to save_pretrained / apply_to / add_to
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from sapmerge import sinks
from sapmerge.adapter import Adapter, Module
from sapmerge.anchors import Anchors
from sapmerge.anchors.losses import Loss
from sapmerge.compose import prepare
from sapmerge.errors import MethodError, NonFiniteError, SapmergeWarning
from sapmerge.heads import HeadPolicy, Heads, plan_heads
from sapmerge.inputs import Adapters, Base, check_mergeable, load_adapters, resolve_weights
from sapmerge.layer import Dense, Layer, LowRank, Method, Update, absent
from sapmerge.lowrank import truncate
from sapmerge.methods import sap
from sapmerge.models import base_of, find_modules, model_names
from sapmerge.recipe import recipe
from sapmerge.report import AdapterReport, LayerReport, Report, describe

__all__ = ["Merged", "merge"]


def merge(
    adapters: Adapters,
    anchor_loader: Any = None,
    model: Any = None,
    *,
    method: Method | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    scale: float = 1.0,
    rank: int | float | str | None = None,
    loss: Loss | None = None,
    modules_to_save: HeadPolicy = None,
    base_model: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Merged:
    """Merge LoRA adapters into one.

    Args:
        adapters: folders, `Adapter` objects, names of adapters in the PeftModel given as `model`, or
            (config, state_dict) pairs; or a mapping label -> any of these.
        anchor_loader: a re-iterable of batches, for methods that read gradients.
        model: the base model. Without anchors it is only used to check names and shapes; the output spells its modules
            as the model does (without one, as transformers 5 does).
        method: e.g. `ties(density=0.2)`; with anchors `sap()` by default.
        weights: one number per adapter, 1 by default; also a mapping label -> number.
        scale: multiplies the merged update.
        rank: None: exact where the result is low-rank, else the largest rank of the inputs. An int caps the rank, a
            float in (0, 1) is a share of energy to keep, "exact" is the numerical rank.
        loss: (model, batch) -> scalar, for the anchors.
        modules_to_save: what to do with heads and projectors: "mean", "first", "drop", or {module: adapter}.
        base_model: the base that the output is for, when the adapters name different ones.
        device: where to compute; the CPU by default.
        progress: False: no progress bar. None: one if stderr is a terminal.

    Returns:
        A lazy `Merged`: nothing is merged before it is saved, applied, added or reported.

    Raises:
        SapmergeError: anything that is wrong with the input, before any work is done.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["medical", "legal"], method=sm.ties(density=0.2))  # doctest: +SKIP
        >>> merged.save_pretrained("both")  # doctest: +SKIP
    """
    method = _check_method(method, anchor_loader, model)
    _check_numbers(scale, rank)
    opened = load_adapters(adapters, model)
    numbers = resolve_weights(weights, opened)
    base = check_mergeable(opened, base_model)
    heads = plan_heads(opened, numbers, modules_to_save)
    stream = AdapterLayers.of(opened, numbers, torch.device(device or "cpu"))
    if anchor_loader is not None:
        stream = stream.with_anchors(anchor_loader, model, loss)
    elif model is not None:
        find_modules(model, stream.modules)
    with _one_thread() if stream.anchors is None else nullcontext():
        prepared = prepare(method, stream)
    if stream.anchors is not None and not stream.anchors.used:
        warnings.warn(
            f"the anchors were not used: {recipe(method)} reads no gradients and no losses",
            SapmergeWarning,
            stacklevel=2,
        )
    return Merged(
        adapters=tuple(opened),
        weights=tuple(numbers),
        base=base,
        heads=heads,
        method=method,
        scale=float(scale),
        rank=rank,
        stream=stream,
        prepared=prepared,
        names={} if model is None else model_names(model),
        progress=sys.stderr.isatty() if progress is None else progress,
    )


@dataclass(frozen=True)
class AdapterLayers:
    """The layers of a set of adapters, read from them when asked for; adapters sorted by content."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    modules: Mapping[str, Module]
    device: torch.device
    anchors: Anchors | None = None

    @staticmethod
    def of(adapters: Sequence[Adapter], weights: Sequence[float], device: torch.device) -> AdapterLayers:
        """Sort by content, so that no bit of the result depends on the order in which adapters were given."""
        order = sorted(range(len(adapters)), key=lambda k: (adapters[k].digest, weights[k]))
        modules = {name: module for adapter in adapters for name, module in adapter.modules.items()}
        return AdapterLayers(
            tuple(adapters[k] for k in order), tuple(weights[k] for k in order), dict(sorted(modules.items())), device
        )

    def with_anchors(self, loader: Any, model: Any, loss: Loss | None) -> AdapterLayers:
        """The same layers, with gradients on the anchors at hand."""

        def reader(adapter: Adapter) -> Callable[[], Mapping[str, Update]]:
            return lambda: {name: adapter.update(name) for name in adapter.modules}

        readers = [(adapter.label, reader(adapter)) for adapter in self.adapters]
        return replace(self, anchors=Anchors(model, loader, self.modules, readers, loss))

    def __iter__(self) -> Iterator[Layer]:
        for name in self.modules:
            yield self.layer(name)

    def layer(self, name: str, record: Callable[[str, object], None] | None = None) -> Layer:
        """One layer, with an update of rank 0 for every adapter that lacks it."""
        updates = [
            adapter.update(name).to(self.device) if name in adapter.modules else self._absent(name)
            for adapter in self.adapters
        ]
        layer = Layer(
            name=name,
            updates=tuple(updates),
            adapters=tuple(adapter.label for adapter in self.adapters),
            weights=self.weights,
            digests=tuple(adapter.digest for adapter in self.adapters),
            anchors=self.anchors,
        )
        return layer if record is None else replace(layer, record=record)

    def _absent(self, name: str) -> LowRank:
        return absent(self.modules[name].shape, torch.empty(0, device=self.device))


@dataclass(eq=False)
class Merged:
    """A merge that is ready to run. Every sink streams the layers once; memory does not grow with the model's depth."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    base: Base
    heads: Heads
    method: Method
    scale: float
    rank: int | float | str | None
    stream: AdapterLayers
    prepared: Method = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    progress: bool = field(repr=False, default=False)
    _applied: bool = field(repr=False, default=False)
    _report: Report | None = field(repr=False, default=None)
    _stored: dict[str, Update] = field(repr=False, default_factory=dict[str, Update])

    def updates(self) -> Iterator[tuple[str, Update]]:
        """(module, merged update) for every layer, exact: scale applied, nothing truncated or rounded."""
        for layer, update, _ in self._merged():
            yield layer.name, update

    def save_pretrained(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a PEFT checkpoint: `PeftModel.from_pretrained(base, path)`. The folder appears whole or not at all.

        Args:
            path: the folder to write.
            overwrite: replace an existing checkpoint.

        Raises:
            OutputExistsError: `path` exists.
            NonFiniteError: a merged update is not finite, or overflows the output's dtype.
        """
        self._report = self._report_of(sinks.save(self, path, overwrite=overwrite))

    def apply_to(self, model: Any) -> None:
        """Add the merged update to the weights of `model`, in place, without any loss of rank.

        Raises:
            ModelMismatchError: the model lacks a module; the model is unchanged.
            SapmergeError: anything that fails on the way; the model is as it was.
        """
        anchors = self.stream.anchors
        if anchors is not None:
            anchors.summary()  # measures the base and the adapters on it, before the base changes
        rows = sinks.apply(self, model)
        self._applied = self._applied or (anchors is not None and base_of(model) is base_of(anchors.model))
        self._report = self._report_of(rows)

    def add_to(self, peft_model: Any, adapter_name: str) -> None:
        """Add the merged adapter to a live PeftModel, under a new name.

        Raises:
            OutputExistsError: the name is taken.
        """
        self._report = self._report_of(sinks.add(self, peft_model, adapter_name))

    @property
    def report(self) -> Report:
        """What was done; runs the merge once if no sink has run yet."""
        if self._report is None:
            self._report = self._report_of(tuple(row for _, _, row in self.stored()))
        return self._report

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The whole call, as it is written into the output's metadata."""
        return {
            "method": recipe(self.method),
            "weights": {a.label: weight for a, weight in zip(self.adapters, self.weights, strict=True)},
            "scale": self.scale,
            "rank": self.rank,
            "base_model": self.base.name,
        }

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the output: that of the inputs, or the narrowest that holds all of them."""
        dtypes = [module.dtype for adapter in self.adapters for module in adapter.modules.values()]
        out = dtypes[0]
        for dtype in dtypes[1:]:
            out = torch.promote_types(out, dtype)
        return out

    def stored(self, lossless: bool = False) -> Iterator[tuple[Module, Update, LayerReport]]:
        """For every layer its module, the update as a sink stores it, and its report.

        Args:
            lossless: give the update as it is; otherwise factors of the rank that was asked for.
        """
        default = max((module.rank for adapter in self.adapters for module in adapter.modules.values()), default=1)
        for layer, update, notes in self._merged():
            with _one_thread():
                kept, energy = (update, 1.0) if lossless else truncate(update, self.rank, default)
                row = describe(layer, update, kept.rank, energy, notes)
            if self.stream.anchors is not None and isinstance(kept, LowRank):
                self._stored[layer.name] = kept
            yield self.stream.modules[layer.name], kept, row

    def _merged(self) -> Iterator[tuple[Layer, Update, dict[str, Any]]]:
        for name in _with_progress(self.stream.modules, self.progress):
            notes: dict[str, Any] = {}
            with _one_thread():
                layer = self.stream.layer(name, notes.__setitem__)
                update = self.prepared(layer)
                if not isinstance(update, (LowRank, Dense)):  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise MethodError(
                        f"a method returns an update, LowRank(B, A) or Dense(matrix); {self.method!r} returned a "
                        f"{type(update).__name__} for layer {name!r}"
                    )
                if self.scale != 1.0:
                    update = update.scaled(self.scale)
                if update.shape != layer.shape:
                    raise MethodError(f"{self.method!r} made an update {update.shape} for layer {name!r} {layer.shape}")
                if not math.isfinite(update.norm()):
                    raise NonFiniteError(f"the merged update of layer {name!r} is NaN or infinite: {self.method!r}")
            yield layer, update, notes

    def _report_of(self, layers: tuple[LayerReport, ...]) -> Report:
        energies = {label: sum(layer.energies[label] for layer in layers) for label in (a.label for a in self.adapters)}
        total = sum(energies.values())
        report = Report(
            method=recipe(self.method),
            base_model=self.base.name,
            scale=self.scale,
            rank=self.rank,
            adapters=tuple(
                AdapterReport(
                    label=adapter.label,
                    source=adapter.source,
                    digest=adapter.digest,
                    weight=weight,
                    layers=len(adapter.modules),
                    ranks=_span([module.rank for module in adapter.modules.values()]),
                    energy_share=energies[adapter.label] / total if total else 0.0,
                )
                for adapter, weight in zip(self.adapters, self.weights, strict=True)
            ),
            layers=layers,
            modules_to_save=self.heads.modules,
            dropped_modules=self.heads.dropped,
            notes=self._anchor_notes(layers),
        )
        if report.energy_kept < 0.9:
            warnings.warn(
                f"the stored adapter keeps {report.energy_kept:.0%} of the merged update's energy: the result is not "
                "low-rank. Use apply_to(model), which is lossless, or a larger rank, e.g. rank=0.95",
                SapmergeWarning,
                stacklevel=3,
            )
        return report

    def _anchor_notes(self, layers: Sequence[LayerReport]) -> dict[str, Any]:
        anchors = self.stream.anchors
        if anchors is None:
            return {}
        notes: dict[str, Any] = anchors.summary()
        if self._applied:
            notes["anchor loss"]["merged"] = anchors.loss_of({})
        elif len(self._stored) == len(layers):
            notes["anchor loss"]["merged"] = anchors.loss_of(self._stored)
        return notes


def _check_method(method: Method | None, anchor_loader: Any, model: Any) -> Method:
    if anchor_loader is not None and model is None:
        raise MethodError("anchors need a model: merge(adapters, anchor_loader, model)")
    if method is None and anchor_loader is not None:
        return sap()
    if method is None:
        raise MethodError(
            "without anchors a method must be given: merge(adapters, method=sm.mean()), or sm.ties(density=0.2), "
            "sm.knots(), sm.task_arithmetic(), ..."
        )
    if isinstance(method, str):
        raise MethodError(f"method={method!r} is text; pass a method, e.g. sm.ties(), or sm.parse({method!r})")
    if not callable(method):
        raise MethodError(f"a method maps a Layer to one update; {method!r} cannot be called")
    return method


def _check_numbers(scale: float, rank: int | float | str | None) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(f"scale must be a finite number; got {scale!r}")
    fine = rank is None or rank == "exact"
    if isinstance(rank, int) and not isinstance(rank, bool):
        fine = rank >= 1
    elif isinstance(rank, float):
        fine = 0 < rank < 1
    if not fine or isinstance(rank, bool):
        raise MethodError(f"rank is None, a number >= 1, a share of energy in (0, 1), or 'exact'; got {rank!r}")


@contextmanager
def _one_thread() -> Generator[None]:
    """Small-matrix algebra on one thread: sums in one order, so the bits do not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _with_progress(names: Mapping[str, Module], show: bool) -> Iterator[str]:
    if not show:
        yield from names
        return
    from tqdm import tqdm

    yield from tqdm(names, desc="merging", unit="layer", leave=False)


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return str(low) if low == high else f"{low}-{high}"
