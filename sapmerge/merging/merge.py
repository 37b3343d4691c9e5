"""`merge`: check everything, run every pre-pass, then stream the layers into a sink.

check adapters -> prepare the method -> for each layer:
read, merge, hand to save_pretrained / apply_to / add_to
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.core.scalars import plain
from sapmerge.core.torch_state import pinned
from sapmerge.core.undo import Undo
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError
from sapmerge.io.adapter import Adapter
from sapmerge.io.writing import OUTPUT_DTYPES
from sapmerge.losses import Loss
from sapmerge.merging import sinks
from sapmerge.merging.calling import check_cache, check_method, says_what_is_meant
from sapmerge.merging.form import Form, dtype_name
from sapmerge.merging.heads import HeadPolicy
from sapmerge.merging.hub import push_to_hub
from sapmerge.merging.inputs import Adapters, Base, as_given, check_numbers, open_base
from sapmerge.merging.opened import open_merge
from sapmerge.merging.report import LayerReport, Report, notes_of
from sapmerge.merging.reporting import report_of, with_notes
from sapmerge.merging.run import Run
from sapmerge.merging.stream import AdapterLayers
from sapmerge.merging.whole import save_merged
from sapmerge.naming import base_of

__all__ = ["Merged", "merge"]


@says_what_is_meant
@pinned
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
    cache: str | os.PathLike[str] | None = None,
    cache_only: bool = False,
) -> Merged:
    """Merge LoRA adapters into one.

    Args:
        adapters: folders, `Adapter` objects, names of adapters in the PeftModel given as `model`,
            or (config, state_dict) pairs; or a mapping label -> any of these.
        anchor_loader: a re-iterable of batches, for methods that read gradients.
        model: the base model, or the path of its folder (safetensors, read a tensor at a time).
            Without anchors it is only used to check names and shapes and for kinds that need the
            base's weights; the output spells its modules as a loaded model does (without one, as
            the adapters do).
        method: e.g. `ties(density=0.2)`; with anchors `sap()` by default. It may see several layers
            at the same time, in threads: functions of your own should keep nothing of a layer.
        weights: one number per adapter, 1 by default; also a mapping label -> number.
        scale: multiplies the merged update.
        rank: None: exact where the result is low-rank, else the largest rank of the inputs. An int
            caps the rank, a float in (0, 1) is a share of energy to keep, "exact" is the numerical
            rank.
        loss: (model, batch) -> scalar, for the anchors.
        modules_to_save: what to do with heads and projectors: "mean", "first", "drop", or {module:
            adapter}.
        base_model: the base that the output is for, when the adapters name different ones.
        device: where to compute; the CPU by default.
        progress: False: no progress bar. None: one if stderr is a terminal.
        cache: a folder of your own for the anchors' statistics: a merge that was killed goes on
            where it was, and one that differs in the density alone needs no pass at all.
        cache_only: run no model: an error says what the cache lacks (`federated.score` fills it).

    Returns:
        A lazy `Merged`: nothing is merged before it is saved, applied, added or reported.

    Raises:
        SapmergeError: anything that is wrong with the input, before any work is done.

    Example:
        >>> import sapmerge as sm
        >>> merged = sm.merge(["medical", "legal"], method=sm.ties(density=0.2))  # doctest: +SKIP
        >>> merged.save_pretrained("both")  # doctest: +SKIP
    """
    folder = open_base(model)
    if folder is not None and anchor_loader is not None:
        raise MethodError(
            "anchors run through a loaded model; a folder as model= serves names and weights only"
        )
    method = check_method(method, anchor_loader, None if folder is not None else model)
    scale, rank = plain(scale), plain(rank)
    check_numbers(scale, rank)
    check_cache(cache, cache_only, anchor_loader)
    opened = open_merge(
        adapters,
        anchor_loader,
        folder or model,
        weights=as_given(weights),
        loss=loss,
        modules_to_save=modules_to_save,
        base_model=base_model,
        device=device,
        progress=progress,
        cache=cache,
        cache_only=cache_only,
    )
    return Merged(opened.run(method, scale, rank))


class Merged:
    """A merge that is ready to run. Every sink streams the layers once.

    Memory does not grow with the model's depth: what pre-passes read is held for the merge up to
    half a gigabyte, and read again beyond it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._applied = False
        self._report: Report | None = None
        self._notes: dict[str, Any] | None = None

    def __repr__(self) -> str:
        run = self.run
        return (
            f"Merged({len(run.adapters)} adapters, {len(run.stream.modules)} layers, "
            f"{recipe(run.method)})"
        )

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters, in the order in which they were given."""
        return self.run.adapters

    @property
    def weights(self) -> tuple[float, ...]:
        """One number per adapter."""
        return self.run.weights

    @property
    def base(self) -> Base:
        """The base model that the output is for."""
        return self.run.base

    @property
    def stream(self) -> AdapterLayers:
        """The layers, adapters sorted by content."""
        return self.run.stream

    @property
    def method(self) -> Method:
        """The method as it was given."""
        return self.run.method

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The whole call, as it is written into the output's metadata."""
        return self.run.recipe

    def updates(self) -> Iterator[tuple[str, Update]]:
        """(module, merged update) for every layer, exact:
        scale applied, nothing truncated or rounded.
        """
        return self.run.updates()

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        names: str | None = None,
        uniform_rank: bool = True,
        serving: str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        """Write a PEFT checkpoint: `PeftModel.from_pretrained(base, path)`.
        The folder appears whole or not at all.

        Args:
            path: the folder to write.
            overwrite: replace an existing checkpoint.
            names: how modules are spelled: "input" as the adapters do, "transformers 5",
                "transformers 4" (4.51 and before; PEFT reads it in later ones too) or "llava" (the
                original code). By default as the model of the merge does, or "input" without one.
            uniform_rank: give all modules the largest rank, padded with zeros: exact, and what
                engines need that read no `rank_pattern` (llama.cpp, SGLang, TGI).
                False: each its own, in a smaller file.
            serving: the engine that is to load it, too: "vllm", "sglang", "llama.cpp", "tgi" or
                "diffusers". What it cannot serve is refused; see `check`.
            dtype: "float32", "bfloat16" or "float16", for all tensors; by default that of the
                inputs. What rounding costs is part of the energy kept.

        Raises:
            OutputExistsError: `path` exists.
            OutputError: `path` is or holds one of the inputs, or holds more than an adapter.
            NonFiniteError: a merged update is not finite, or overflows the output's dtype.
        """
        form = Form(names, uniform_rank, serving, dtype_name(dtype))
        wanted = None if form.dtype is None else OUTPUT_DTYPES[form.dtype]
        run = self.run if wanted is None else replace(self.run, wanted=wanted)
        finish = partial(self._measure, run=run)
        sinks.save(run, path, overwrite=overwrite, form=form, finish=finish, undo=self._undo())

    push_to_hub = push_to_hub  # uploads what save_pretrained writes

    def apply_to(self, model: Any) -> None:
        """Add the merged update to the weights of `model`, in place, without any loss of rank.

        The old weights are kept in a temporary file (TMPDIR) until all is done,
        so that nothing is half applied.

        Raises:
            ModelMismatchError: the model lacks a module, or a weight of it is tied or computed from
                others; the model is unchanged.
            SapmergeError: anything that fails on the way; the model is as it was.
        """
        anchors, undo = self.run.stream.anchors, self._undo()
        mine = anchors if anchors is not None and base_of(model) is base_of(anchors.model) else None
        if mine is not None:
            self._notes = self._notes or notes_of(mine)  # measured now: the base is about to change
            undo.add(mine.base_is_now)

        def finish(rows: tuple[LayerReport, ...]) -> Report:
            self._report = report = report_of(self.run, rows)
            if mine is not None:
                self._applied = True
                mine.base_is_now()
            return report

        sinks.apply(self.run, model, finish, undo)

    @contextmanager
    def applied(self, model: Any) -> Generator[Report]:
        """Add the merged update to the weights of `model` for the length of a `with` block, and
        take it out again: to evaluate a merge, or several in turn.

        Gives the report, without the anchors' losses. The old weights are kept as in `apply_to`,
        and come back bit by bit.

        Raises:
            ModelMismatchError: as in `apply_to`.

        Example:
            >>> with merged.applied(model) as report:  # doctest: +SKIP
            ...     accuracy = evaluate(model)
        """
        anchors = self.run.stream.anchors
        mine = anchors if anchors is not None and base_of(model) is base_of(anchors.model) else None
        try:
            with sinks.applied(self.run, model) as rows:
                yield report_of(self.run, rows)
        finally:
            if mine is not None:
                mine.base_is_now()  # the same values, written again

    def add_to(self, peft_model: Any, adapter_name: str) -> None:
        """Add the merged adapter to a live PeftModel, under a new name.

        Raises:
            OutputExistsError: the name is taken.
            SapmergeError: anything that fails on the way; the model is as it was.
        """
        sinks.add(self.run, peft_model, adapter_name, self._measure, self._undo())

    def save_merged(
        self,
        base_folder: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
    ) -> None:
        """Write the merged full model: the base's folder with the update added, shard by shard;
        lossless in rank. The folder appears whole or not at all.

        Args:
            base_folder: the base's safetensors, sharded or not; config and tokenizer beside them
                are copied. `sapmerge.json` tells the recipe, the inputs and the sha256 of every
                file.
            path: the folder to write.
            overwrite: replace an earlier merged model.

        Raises:
            ModelMismatchError: the folder is not the adapters' base, or its weights are quantised.
            OutputExistsError: `path` exists.
            OutputError: `path` is or holds the base or one of the inputs, or holds more than a
                merged model.
            NonFiniteError: a merged weight is not finite in the dtype of the base.
        """
        save_merged(self.run, base_folder, path, overwrite=overwrite)

    @property
    @pinned
    def report(self) -> Report:
        """What was done; runs the merge once if no sink has run yet.
        The loss at a merged model is measured now.
        """
        if (report := self._report) is None:
            report = self._measure(tuple(row for _, _, row in self.run.stored()))
        elif self.run.stream.anchors is not None and "anchor loss" not in report.notes:
            self._report = report = with_notes(report, self.run, self._notes, self._applied)
        return report

    def _undo(self) -> Undo:
        """What a sink runs if it fails: the report stays that of the last one that did not."""
        undo, report, applied = Undo(), self._report, self._applied

        def put_back() -> None:
            self._report, self._applied = report, applied

        undo.add(put_back)
        return undo

    def _measure(self, layers: tuple[LayerReport, ...], run: Run | None = None) -> Report:
        """The report with the anchors' losses, before the effect: they run the user's function."""
        rows = report_of(run or self.run, layers)
        self._report = with_notes(rows, self.run, self._notes, self._applied)
        return self._report
