"""Where a merge goes: a PEFT checkpoint, the weights of a model,
or a new adapter of a live PeftModel.

Nothing may raise after the effect: whatever can fail comes before it, the report too (`finish`),
and an error or Ctrl-C on the way out takes the effect back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from sapmerge.core.linalg import finite
from sapmerge.core.torch_state import pinned
from sapmerge.core.undo import Undo, restoring
from sapmerge.core.updates import Update
from sapmerge.errors import (
    MethodError,
    ModelMismatchError,
    NonFiniteError,
    OutputExistsError,
)
from sapmerge.io.folder import check_readable
from sapmerge.io.held_values import HeldValues
from sapmerge.io.modules import Module
from sapmerge.io.outputs import check_apart
from sapmerge.io.writing import CheckpointWriter
from sapmerge.merging.anchored import anchored
from sapmerge.merging.bundles import Bundle, Bundler
from sapmerge.merging.card import card_of
from sapmerge.merging.form import Form
from sapmerge.merging.live import activate, ask, delete, live_parameters, names_in, own_heads
from sapmerge.merging.report import LayerReport, Report
from sapmerge.merging.run import Run
from sapmerge.merging.serving import served_form, served_rank, zeros_for
from sapmerge.merging.spelling import spelling_of, written_names
from sapmerge.merging.targets import check_parameters, check_separate
from sapmerge.merging.texts import config_of, metadata_of
from sapmerge.merging.vector_output import for_checkpoint, for_live_model
from sapmerge.merging.vectors import apply_vectors, check_vectors, rows_before
from sapmerge.models import (
    ModelWeights,
    exclusive,
    find_modules,
    find_saved,
    find_sites,
    tensor_name,
)

__all__ = ["add", "applied", "apply", "save", "save_together"]

PREFIX = "base_model.model."
_USUAL = Form()
Finish: TypeAlias = Callable[[tuple[LayerReport, ...]], Report]
"""What is made of the reports of all layers before the effect; it may raise."""


def save(
    run: Run,
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    finish: Finish,
    undo: Undo,
    form: Form = _USUAL,
) -> None:
    """Write a checkpoint folder, streaming the layers;
    the config is built from scratch, scaling is exactly 1.

    Args:
        finish: runs before the folder is put in its place.
        undo: what takes back the caller's part of it.
    """
    form = served_form(run, form)
    names = written_names(run.adapters, form.names, run.own_names)  # refuses before any work
    zeros_for(run, form, names)
    check_apart(path, (adapter.folder for adapter in run.adapters))
    writer = CheckpointWriter(path, overwrite=overwrite)
    try:
        undo.add(writer.withdraw)
        _filled(run, writer, form, finish)
    except BaseException:
        try:
            undo.run()
        finally:
            undo.run()
        raise


@pinned
def _filled(run: Run, writer: CheckpointWriter, form: Form, finish: Finish) -> None:
    with writer:
        checkpoint = _Checkpoint(run, writer, form)
        for module, update, row in run.stored():
            checkpoint.add(module, update, row)
        checkpoint.finish(finish)


@pinned
def save_together(runs: Mapping[str, Run]) -> None:
    """Write several checkpoints (path -> run) side by side, layer by layer:
    what they share is read once.
    """
    with ExitStack() as stack:
        making = [
            (_Checkpoint(run, stack.enter_context(CheckpointWriter(path))), run.stored())
            for path, run in runs.items()
        ]
        for name in sorted({name for run in runs.values() for name in run.stream.modules}):
            for checkpoint, layers in making:
                if name in checkpoint.run.stream.modules:
                    checkpoint.add(*next(layers))
        for checkpoint, _ in making:
            checkpoint.finish()


class _Checkpoint:
    """One checkpoint that is being written: its layers in order, then the rest."""

    def __init__(self, run: Run, writer: CheckpointWriter, form: Form = _USUAL) -> None:
        self.run, self._writer, self._adapted = run, writer, run.stream.modules
        self._form, self._names = form, written_names(run.adapters, form.names, run.own_names)
        self._factors: dict[str, tuple[int, int]] = {}  # tensor -> where its rank is, and the rank
        self._beside = for_checkpoint(run.vectors, self._adapted, run.dtype)
        self._bundler = Bundler(self._adapted, self._names, run.dtype)
        self._rows, self._ranks, self._parameters = (
            list[LayerReport](),
            dict[str, int](),
            list[str](),
        )

    def add(self, module: Module, update: Update, row: LayerReport) -> None:
        """One layer, as `Run.stored` gives it."""
        self._write(self._bundler.add(module, update))
        self._rows.append(row)

    def finish(self, finish: Finish | None = None) -> None:
        """The heads, the config and the card; then the folder is in its place.
        What is written can be read.
        """
        self._write(self._bundler.finish())
        run, names = self.run, self._names
        for name, read in run.heads.tensors().items():
            self._put(tensor_name(name, names), read())
        for key, tensor in self._beside.tensors(self._adapted, names).items():
            self._put(key, tensor)
        if self._form.uniform_rank:
            rank = served_rank(self._form.serving, max(self._ranks.values()))
            self._widen(rank)
            self._fill(rank)
        config = config_of(run, self._ranks, self._parameters, names) | self._beside.config(
            self._adapted, names
        )
        form = self._form.recorded(spelling_of(run.adapters, self._form.names, run.own_names))
        rows = tuple(self._rows)
        report = None if finish is None else finish(rows)
        said = None if report is None else anchored(run.stream.anchors, report)
        self._writer.commit(
            config=config,
            metadata=metadata_of(run, form, said),
            card=card_of(run, rows, report, said, form),
            check=check_readable,
        )

    def _put(self, key: str, tensor: Tensor) -> None:
        """A tensor that is no factor: as it is, or in the dtype that is wanted."""
        wanted = self.run.wanted
        if wanted is not None and tensor.is_floating_point():
            tensor, given = tensor.to(wanted), tensor
            if not finite(tensor) and finite(given):
                raise NonFiniteError(f"the merged tensor {key!r} overflows the output's {wanted}")
        self._writer.add(PREFIX + key, tensor)

    def _write(self, bundle: Bundle) -> None:
        rank = next(iter(bundle.ranks.values()), 1)
        for key, tensor in bundle.tensors.items():
            self._writer.add(PREFIX + key, tensor)
            self._factors[PREFIX + key] = int(".lora_B" in key or ".lora_embedding_B" in key), rank
        self._ranks |= bundle.ranks
        self._parameters += bundle.parameters

    def _widen(self, wanted: int) -> None:
        """One rank for all modules: what engines without patterns need, and exact."""
        for key, (dim, rank) in self._factors.items():
            if rank != wanted:
                self._writer.widen(key, dim, rank, wanted)
        self._ranks = dict.fromkeys(self._ranks, wanted)

    def _fill(self, rank: int) -> None:
        """Zeros for modules that an engine stacks with others."""
        for name, (m, n) in zeros_for(self.run, self._form, self._names).items():
            dtype = self.run.dtype
            self._writer.add(f"{PREFIX}{name}.lora_A.weight", torch.zeros(rank, n, dtype=dtype))
            self._writer.add(f"{PREFIX}{name}.lora_B.weight", torch.zeros(m, rank, dtype=dtype))
            self._ranks[name] = rank


def apply(run: Run, model: Any, finish: Finish, undo: Undo) -> None:
    """Add the updates to the weights, in place; on any error the weights are what they were.

    Args:
        finish: runs when all is written.
        undo: what takes back the caller's part of it.
    """
    held = HeldValues()
    undo.add(held.put_back)
    _alone(model, undo, lambda base: finish(_added(run, model, base, held)))


def _alone(model: Any, undo: Undo, work: Callable[[nn.Module], object]) -> None:
    """Work on a model that no other merge sees meanwhile; whatever fails is taken back."""
    try:
        _with_base(model, undo, work)
    except BaseException:
        try:
            undo.run()  # what was cut short, and what was interrupted on the way out
        finally:
            undo.run()
        raise


@pinned
def _with_base(model: Any, undo: Undo, work: Callable[[nn.Module], object]) -> None:
    with exclusive(model) as base:
        try:
            work(base)
        except BaseException:
            undo.run()
            raise


@contextmanager
def applied(run: Run, model: Any) -> Generator[tuple[LayerReport, ...]]:
    """Inside, the updates are added to the weights; afterwards the weights are what they were.

    The model is this thread's alone as long as the block runs.
    """
    held = HeldValues()
    with exclusive(model) as base, restoring() as undo:
        undo.add(held.close)
        undo.add(held.put_back)
        yield _added(run, model, base, held)


@pinned
def _added(run: Run, model: Any, base: nn.Module, held: HeldValues) -> tuple[LayerReport, ...]:
    """Every value is read back: some kinds of tensors take a write and keep what they had."""
    sites, rows = find_sites(model, run.stream.modules), list[LayerReport]()
    saved = find_saved(model, run.heads.shapes())
    vectors = check_vectors(run.vectors, model)
    check_parameters(sites)
    # PEFT changes tied token rows in both too
    rows_of = {change.name for change in run.vectors.changes if change.rows}
    written = {name: tensor for name, tensor in vectors.items() if name not in rows_of}
    check_separate(base, {name: site.parameter for name, site in sites.items()} | saved | written)
    moved = rows_before(run.vectors, vectors, run.stream.modules)
    for module, update, row in run.stored(lossless=True):
        site = sites[module.name]
        weight = site.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = site.view(update.dense()).to(device=weight.device, dtype=wide)
        _write(site.weight, (weight.to(wide) + change).to(weight.dtype), module.name, held)
        rows.append(row)
    for name, read in run.heads.tensors().items():
        _write(saved[name], read().to(saved[name]), name, held)
    for target in vectors.values():
        held.keep(target)
    with torch.no_grad():
        apply_vectors(run.vectors, vectors, moved)
    return tuple(rows)


def _write(weight: Tensor, value: Tensor, name: str, held: HeldValues) -> None:
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(
            f"the weight of {name!r} plus its update is not finite in {weight.dtype}"
        )
    held.keep(weight)
    with torch.no_grad():
        weight.copy_(value)
    if not torch.equal(weight.detach(), value):
        raise ModelMismatchError(
            f"the weight of {name!r}, a {type(weight.data).__name__}, does not hold what was "
            "written to it; use save_pretrained or add_to"
        )


def add(run: Run, peft_model: Any, adapter_name: str, finish: Finish, undo: Undo) -> None:
    """Register a new adapter in a live PeftModel and fill it;
    on any error the model is what it was.

    Args:
        finish: runs before the adapter is registered.
        undo: what takes back the caller's part of it.
    """
    if not hasattr(peft_model, "peft_config"):
        raise ModelMismatchError(
            f"add_to takes a PeftModel; got {type(peft_model).__name__}. Use apply_to(model)"
        )
    if not isinstance(adapter_name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MethodError(f"an adapter's name is text; got a {type(adapter_name).__name__}")
    if adapter_name in peft_model.peft_config:
        raise OutputExistsError(
            f"the model already has an adapter {adapter_name!r}; choose another name"
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter_name) or hasattr(nn.ModuleDict, adapter_name):
        raise MethodError(
            f"{adapter_name!r} cannot be an adapter's name; use letters, digits, '_' and '-'"
        )
    _alone(peft_model, undo, lambda _: _registered(run, peft_model, adapter_name, finish, undo))


def _registered(run: Run, peft_model: Any, adapter_name: str, finish: Finish, undo: Undo) -> None:
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]

    find_modules(peft_model, run.stream.modules)
    find_saved(peft_model, run.heads.shapes())
    adapted = run.stream.modules
    names = names_in(peft_model, run)
    check_vectors(run.vectors, peft_model)
    vectors = replace(run.vectors, base=ModelWeights(peft_model, {}))
    beside = for_live_model(vectors, adapted, run.dtype)
    rows, ranks, state, parameters = (
        list[LayerReport](),
        dict[str, int](),
        dict[str, Tensor](),
        list[str](),
    )
    bundler, bundles = Bundler(adapted, names, run.dtype), list[Bundle]()
    for module, update, row in run.stored():
        bundles.append(bundler.add(module, update))
        rows.append(row)
    for bundle in (*bundles, bundler.finish()):
        state |= {PREFIX + key: tensor for key, tensor in bundle.tensors.items()}
        ranks |= bundle.ranks
        parameters += bundle.parameters
    for name, read in run.heads.tensors().items():
        state[PREFIX + tensor_name(name, names)] = read()
    state |= {PREFIX + key: tensor for key, tensor in beside.tensors(adapted, names).items()}
    config = config_of(run, ranks, parameters, names) | beside.config(adapted, names)
    config.pop("peft_type")
    if parameters:
        config["target_parameters"] = live_parameters(peft_model, parameters)
    finish(tuple(rows))
    asking = {parameter: parameter.requires_grad for parameter in peft_model.parameters()}
    undo.add(partial(ask, asking))
    undo.add(
        partial(activate, peft_model, peft_model.active_adapter, list(peft_model.active_adapters))
    )
    undo.add(partial(delete, peft_model, adapter_name))
    peft_model.add_adapter(adapter_name, LoraConfig(**config))
    for name, tensor in own_heads(peft_model, adapter_name).items():
        state.setdefault(name, tensor)
    outcome = cast("Any", set_peft_model_state_dict(peft_model, state, adapter_name=adapter_name))
    if outcome.unexpected_keys:
        raise ModelMismatchError(f"the model has no place for {outcome.unexpected_keys[:3]}")
    ask(asking)
