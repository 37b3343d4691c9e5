"""Where a merge goes: a PEFT checkpoint, the weights of a model, or a new adapter of a live PeftModel."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sapmerge.core.updates import Update
from sapmerge.errors import MethodError, ModelMismatchError, NonFiniteError, OutputError, OutputExistsError
from sapmerge.io.modules import Module
from sapmerge.io.writing import CheckpointWriter
from sapmerge.merging.bundles import Bundle, Bundler
from sapmerge.merging.form import Form
from sapmerge.merging.report import LayerReport
from sapmerge.merging.run import Run
from sapmerge.merging.spelling import spelling_of, written_names
from sapmerge.merging.texts import card_of, config_of, metadata_of
from sapmerge.merging.vector_output import for_checkpoint, for_live_model
from sapmerge.merging.vectors import apply_vectors, check_vectors
from sapmerge.models import (
    ModelWeights,
    check_untied,
    find_modules,
    find_saved,
    find_sites,
    tensor_name,
)
from sapmerge.naming import Names, base_of

__all__ = ["add", "apply", "save", "save_together"]

_PREFIX = "base_model.model."
_USUAL = Form()


def save(run: Run, path: str | os.PathLike[str], *, overwrite: bool, form: Form = _USUAL) -> tuple[LayerReport, ...]:
    """Write a checkpoint folder, streaming the layers; the config is built from scratch, scaling is exactly 1."""
    written_names(run.adapters, form.names, run.own_names)  # refuses before any work
    for adapter in run.adapters:
        if adapter.files and os.path.realpath(adapter.source) == os.path.realpath(path):
            raise OutputError(f"the output {os.fspath(path)!r} is one of the inputs; write to another folder")
    with CheckpointWriter(path, overwrite=overwrite) as writer:
        checkpoint = _Checkpoint(run, writer, form)
        for module, update, row in run.stored():
            checkpoint.add(module, update, row)
        return checkpoint.finish()


def save_together(runs: Mapping[str, Run]) -> None:
    """Write several checkpoints (path -> run) side by side, layer by layer: what they share is read once."""
    with ExitStack() as stack:
        making = [
            (_Checkpoint(run, stack.enter_context(CheckpointWriter(path))), run.stored()) for path, run in runs.items()
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
        self._rows, self._ranks, self._parameters = list[LayerReport](), dict[str, int](), list[str]()

    def add(self, module: Module, update: Update, row: LayerReport) -> None:
        """One layer, as `Run.stored` gives it."""
        self._write(self._bundler.add(module, update))
        self._rows.append(row)

    def finish(self) -> tuple[LayerReport, ...]:
        """The heads, the config and the card; then the folder is in its place."""
        self._write(self._bundler.finish())
        run, names = self.run, self._names
        for name, read in run.heads.tensors().items():
            self._writer.add(_PREFIX + tensor_name(name, names), read())
        for key, tensor in self._beside.tensors(self._adapted, names).items():
            self._writer.add(_PREFIX + key, tensor)
        if self._form.uniform_rank:
            self._widen(max(self._ranks.values()))
        config = config_of(run, self._ranks, self._parameters, names) | self._beside.config(self._adapted, names)
        form = self._form.recorded(spelling_of(run.adapters, self._form.names, run.own_names))
        self._writer.commit(config=config, metadata=metadata_of(run, form), card=card_of(run, self._rows))
        return tuple(self._rows)

    def _write(self, bundle: Bundle) -> None:
        rank = next(iter(bundle.ranks.values()), 1)
        for key, tensor in bundle.tensors.items():
            self._writer.add(_PREFIX + key, tensor)
            self._factors[_PREFIX + key] = int(".lora_B" in key or ".lora_embedding_B" in key), rank
        self._ranks |= bundle.ranks
        self._parameters += bundle.parameters

    def _widen(self, wanted: int) -> None:
        """One rank for all modules: what engines without patterns need, and exact."""
        for key, (dim, rank) in self._factors.items():
            if rank != wanted:
                self._writer.widen(key, dim, rank, wanted)
        self._ranks = dict.fromkeys(self._ranks, wanted)


def apply(run: Run, model: Any) -> tuple[LayerReport, ...]:
    """Add the updates to the weights, in place; on any error the weights are what they were."""
    sites, rows = find_sites(model, run.stream.modules), list[LayerReport]()
    saved = find_saved(model, run.heads.shapes())
    check_untied(model, {name: site.parameter for name, site in sites.items()} | saved)
    targets = check_vectors(run.vectors, model)
    with _restored_on_error() as keep, torch.no_grad():
        for module, update, row in run.stored(lossless=True):
            site = sites[module.name]
            weight = site.weight
            keep(weight)
            wide = torch.promote_types(weight.dtype, torch.float32)
            change = site.view(update.dense()).to(device=weight.device, dtype=wide)
            weight.copy_(weight.to(wide) + change)
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteError(f"the weight of {module.name!r} plus its update is not finite in {weight.dtype}")
            rows.append(row)
        for name, read in run.heads.tensors().items():
            keep(saved[name])
            saved[name].copy_(read().to(saved[name]))
        for target in targets.values():
            keep(target)
        apply_vectors(run.vectors, targets)
    return tuple(rows)


def add(run: Run, peft_model: Any, adapter_name: str) -> tuple[LayerReport, ...]:
    """Register a new adapter in a live PeftModel and fill it; on any error it is removed again."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]

    if not hasattr(peft_model, "peft_config"):
        raise ModelMismatchError(f"add_to takes a PeftModel; got {type(peft_model).__name__}. Use apply_to(model)")
    if adapter_name in peft_model.peft_config:
        raise OutputExistsError(f"the model already has an adapter {adapter_name!r}; choose another name")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", adapter_name) or hasattr(nn.ModuleDict, adapter_name):
        raise MethodError(f"{adapter_name!r} cannot be an adapter's name; use letters, digits, '_' and '-'")
    find_modules(peft_model, run.stream.modules)
    find_saved(peft_model, run.heads.shapes())
    adapted = run.stream.modules
    names = _names_in(peft_model, run)
    check_vectors(run.vectors, peft_model)
    vectors = replace(run.vectors, base=ModelWeights(peft_model, {}))
    beside = for_live_model(vectors, adapted, run.dtype)
    rows, ranks, state, parameters = list[LayerReport](), dict[str, int](), dict[str, Tensor](), list[str]()
    bundler, bundles = Bundler(adapted, names, run.dtype), list[Bundle]()
    for module, update, row in run.stored():
        bundles.append(bundler.add(module, update))
        rows.append(row)
    for bundle in (*bundles, bundler.finish()):
        state |= {_PREFIX + key: tensor for key, tensor in bundle.tensors.items()}
        ranks |= bundle.ranks
        parameters += bundle.parameters
    for name, read in run.heads.tensors().items():
        state[_PREFIX + tensor_name(name, names)] = read()
    state |= {_PREFIX + key: tensor for key, tensor in beside.tensors(adapted, names).items()}
    config = config_of(run, ranks, parameters, names) | beside.config(adapted, names)
    config.pop("peft_type")
    if parameters:
        config["target_parameters"] = _live_parameters(peft_model, parameters)
    try:
        peft_model.add_adapter(adapter_name, LoraConfig(**config))
        for name, tensor in _own_heads(peft_model, adapter_name).items():
            state.setdefault(name, tensor)
        outcome = cast("Any", set_peft_model_state_dict(peft_model, state, adapter_name=adapter_name))
        if outcome.unexpected_keys:
            raise ModelMismatchError(f"the model has no place for {outcome.unexpected_keys[:3]}")
    except BaseException:
        if adapter_name in peft_model.peft_config:
            peft_model.delete_adapter(adapter_name)
        raise
    return tuple(rows)


def _names_in(peft_model: Any, run: Run) -> Mapping[str, str]:
    """Key -> where a live model has the module, of everything that the merge changes."""
    own = Names(peft_model)
    tensors = (*run.heads.chosen, *(change.name for change in run.vectors.changes))
    keys = own.locate({name.rpartition(".")[0]: None for name in tensors})
    return own.located(run.stream.modules.values()) | {module: own.paths[key] for module, key in keys.items()}


def _live_parameters(peft_model: Any, parameters: Sequence[str]) -> list[str]:
    """How `target_parameters` of a live model's other adapters say the same: PEFT wants one wording for all of them.

    Raises:
        ModelMismatchError: they mean other parameters.
    """
    known = [config.target_parameters for config in peft_model.peft_config.values()]
    wording = next((list(targets) for targets in known if targets), list(parameters))
    names = [_LORA_INFIX.sub("", name) for name, _ in base_of(peft_model).named_parameters()]
    meant = {name for name in names if any(f".{name}".endswith(f".{target}") for target in wording)}
    if meant != set(parameters):
        raise ModelMismatchError(
            f"PEFT wants all adapters of a model to adapt the same parameters; those that are there adapt "
            f"{sorted(meant ^ set(parameters))[0]!r} and the merged one does not, or the other way round. Use "
            "save_pretrained or apply_to"
        )
    return wording


_LORA_INFIX = re.compile(r"\.base_layer(?=\.)")


def _own_heads(peft_model: Any, adapter_name: str) -> dict[str, Tensor]:
    """The heads that PEFT gives to every adapter of a model: copies of the base's, also where the merge has none."""
    from peft.utils import ModulesToSaveWrapper

    return {
        f"{name}.{key}": tensor
        for name, module in peft_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for key, tensor in module.modules_to_save[adapter_name].state_dict().items()
    }


@contextmanager
def _restored_on_error() -> Generator[Callable[[Tensor], None]]:
    """Gives a function that remembers a tensor's value; all are put back if the block fails."""
    before: list[tuple[Tensor, Tensor]] = []

    def keep(tensor: Tensor) -> None:
        before.append((tensor, tensor.detach().clone()))

    try:
        yield keep
    except BaseException:
        with torch.no_grad():
            for tensor, value in reversed(before):
                tensor.copy_(value)
        raise
