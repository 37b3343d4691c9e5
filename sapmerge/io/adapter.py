"""One adapter: what it changes and by how much,
checked when it is loaded and read again when a layer is needed.

Nothing in the files is believed, executed or downloaded: see `sapmerge.io`.
PEFT is not used to read them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from sapmerge.core.torch_state import pinned
from sapmerge.core.updates import Update
from sapmerge.errors import AdapterFormatError, MethodError
from sapmerge.io.beside import with_beside
from sapmerge.io.config import Settings, settings
from sapmerge.io.contents import Contents, sort_contents
from sapmerge.io.files import DEFAULT_LIMITS, Limits, shown
from sapmerge.io.folder import BESIDE, CONFIG, WEIGHTS, read_folder, which_weights
from sapmerge.io.hub import downloaded
from sapmerge.io.kinds.vectors import Vector
from sapmerge.io.licences import CARD
from sapmerge.io.live import check_live_scaling, config_bytes, live_adapter
from sapmerge.io.modules import BaseWeights, Module, SavedTensor
from sapmerge.io.pickles import held
from sapmerge.io.rearranged import Piece, rearranged
from sapmerge.io.strict_json import parse

__all__ = ["Adapter", "label_from"]

_VIEWS = {"config", "modules", "saved", "vectors", "files"}  # fields that nobody can write to
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA adapter. Make one with `load`, `from_hub`, `from_peft_model` or `from_state_dict`.

    Args:
        label: its name in reports; [A-Za-z0-9._-], at most 64 characters.
        source: what messages call it.
        config: the JSON as it came.
        modules: canonical name -> Module, sorted.
        saved: canonical tensor name -> SavedTensor, sorted.
        vectors: biases and rows of embeddings that the adapter moves or replaces, sorted (see
            `Vector`).
        digest: sha256 of all that decides about the update: values, scalings, names. Not of path,
            label or order.
        files: file name -> sha256 of the bytes used; empty for adapters in memory.
        settings: what the config says, every key checked.
        folder: where the files are, absolute, links resolved; None for adapters in memory.

    It can be pickled, for other processes: what lies in files is read there again, and compared.
    """

    label: str
    source: str
    config: Mapping[str, object] = field(repr=False)
    modules: Mapping[str, Module] = field(repr=False)
    saved: Mapping[str, SavedTensor] = field(repr=False)
    vectors: Mapping[str, Vector] = field(repr=False)
    digest: str
    files: Mapping[str, str]
    base_model: str | None
    revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    folder: str | None
    settings: Settings = field(repr=False)
    _contents: Contents = field(repr=False)
    _base: BaseWeights | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return _unpickled, (
            {name: dict(value) if name in _VIEWS else value for name, value in values.items()},
        )

    @classmethod
    @pinned
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        label: str | None = None,
        allow_pickle_weights: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Adapter:
        """Read a folder written by `save_pretrained`: its own files, nothing else,
        and never the network.

        Args:
            path: a local folder.
            label: by default the folder's name.
            allow_pickle_weights: read `adapter_model.bin` where there is no safetensors file, and
                `non_lora_trainables.bin`, the projector of the original code of LLaVA (torch >=
                2.10).
            limits: sizes above which an adapter is refused.

        Raises:
            AdapterFormatError, AdapterConfigError, AdapterSecurityError, LimitExceededError,
            NonFiniteError: the message names folder, file and tensor or key.
        """
        if not isinstance(path, (str, bytes, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise AdapterFormatError(
                f"an adapter is the path of a local folder; got a {type(path).__name__}"
            )
        source = os.fsdecode(path)
        if not source:
            raise AdapterFormatError("adapter '': an empty path; expected a local folder")
        folder = os.path.abspath(source)
        where = f"adapter {shown(source)}"
        weights_name, beside = which_weights(folder, where, allow_pickle_weights)
        label = label or label_from(os.path.basename(folder))
        config, chosen, contents, files = read_folder(folder, weights_name, where, limits)
        if beside:
            contents, more = with_beside(
                contents, os.path.join(folder, BESIDE), f"{where}, {BESIDE}", limits
            )
            files = {**files, **more}
        return _finished(
            label, source, config, chosen, contents, files, folder=os.path.realpath(folder)
        )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        label: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Adapter:
        """Download the two files of an adapter from the Hugging Face Hub (safetensors
        only), and its card if there is one, and load them.

        Args:
            repo_id: "user/name".
            revision: a commit, tag or branch; only a commit cannot change under you.
            label: by default the part of `repo_id` after the slash.
            subfolder: of the repository, where the two files are not at its top.
            token: as for `huggingface_hub.hf_hub_download`.
            cache_dir: where the download is kept; by default the Hub's own cache.
            limits: bounds of what is read.
        """
        folder = downloaded(
            repo_id,
            (CONFIG, WEIGHTS),
            optional=(CARD,),
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
        )
        return cls.load(
            folder, label=label or label_from(repo_id.rpartition("/")[2]), limits=limits
        )

    @classmethod
    @pinned
    def from_state_dict(
        cls,
        config: object,
        state_dict: Mapping[str, Tensor],
        *,
        label: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Adapter:
        """An adapter from a config and the tensors of `peft.get_peft_model_state_dict`;
        the tensors are copied.

        Args:
            config: a dict as in `adapter_config.json`, or a `peft.LoraConfig`.
            state_dict: names as in `adapter_model.safetensors`.
            label: "adapter" by default.
            limits: bounds of what is read.
        """
        return _in_memory(config, state_dict, label or "adapter", "(config, state_dict)", limits)

    @classmethod
    @pinned
    def from_peft_model(
        cls,
        model: nn.Module,
        adapter_name: str,
        *,
        label: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> Adapter:
        """A copy of one adapter of a live `PeftModel`;
        training it further does not change the copy.

        Args:
            model: a `PeftModel`.
            adapter_name: a key of `model.peft_config`.
            label: by default the adapter's name.
            limits: bounds of what is read.
        """
        config, tensors = live_adapter(model, adapter_name)
        source = f"PeftModel[{shown(adapter_name)}]"
        adapter = _in_memory(config, tensors, label or label_from(adapter_name), source, limits)
        check_live_scaling(model, adapter_name, adapter.modules, source)
        return adapter

    def relabelled(self, label: str) -> Adapter:
        """The same adapter under another label."""
        return replace(self, label=_checked_label(label))

    def sharing(self, other: Adapter) -> Adapter:
        """The same adapter; where the two agree, with the other's tables, which are held once."""
        contents = self._contents.sharing(other._contents)
        return replace(self, modules=MappingProxyType(contents.modules), _contents=contents)

    def respelled(
        self, names: Mapping[str, str], cut: Mapping[str, Sequence[Piece]] | None = None
    ) -> Adapter:
        """The same adapter under other keys; the digest stays.

        Args:
            names: module of the base -> its new key; those that it does not name keep theirs.
            cut: new key -> the pieces of other modules that its update is made of.
        """
        contents = rearranged(self._contents, names, cut or {})
        tables = {
            name: dict(sorted(getattr(contents, name).items()))
            for name in ("modules", "saved", "vectors")
        }
        return replace(
            self,
            **{name: MappingProxyType(table) for name, table in tables.items()},
            _contents=contents,
        )

    def with_base(self, base: BaseWeights) -> Adapter:
        """The same adapter, with its base's weights at hand: some kinds of updates need them."""
        return replace(self, _base=base)

    @pinned
    def update(self, name: str) -> Update:
        """The update of one weight matrix in float32, every scaling folded in.

        Args:
            name: a key of `modules`.

        Returns:
            B (m, r), A (r, n) as a `LowRank`; a `Dense` for DoRA.
            Convolutions and embeddings are brought to that form.

        Raises:
            MethodError: there is no such module, or its kind needs the base's weight
                (`Module.needs_base`).
            InputChangedError: the file is not the one that was loaded.
            NonFiniteError: a factor or the product is not finite in float32.
        """
        if name not in self.modules:
            raise MethodError(f"adapter {shown(self.source)} has no module {shown(name)}")
        module, base = self.modules[name], self._base
        return self._contents.update(
            name, self.source, None if base is None else lambda: base.matrix(module)
        )

    def reach(self, name: str) -> float:
        """A bound of the norm of an update, from what was seen at loading: zero for zero only."""
        return self._contents.readings[name].reach(self._contents.weights.facts)

    @pinned
    def saved_tensor(self, name: str) -> Tensor:
        """One tensor of a module that was saved whole, in the dtype of the file.

        Args:
            name: a key of `saved`.
        """
        if name not in self.saved:
            raise MethodError(f"adapter {shown(self.source)} has no saved tensor {shown(name)}")
        return self._contents.weights.read(self._contents.tensors[name][0])

    @pinned
    def vector(self, key: str) -> Tensor:
        """A bias, or rows of an embedding, as the file has them, in float32.

        Args:
            key: of `vectors`.
        """
        if key not in self.vectors:
            raise MethodError(f"adapter {shown(self.source)} has no vector {shown(key)}")
        return self._contents.weights.read(self.vectors[key].tensor).float()

    def copies(self) -> Mapping[str, tuple[str, ...]]:
        """Module -> sha256 of the copies of its weight in the base that the file has,
        and does not need.
        """
        facts = self._contents.weights.facts
        return {
            name: tuple(facts[t].digest for t in tensors)
            for name, tensors in self._contents.copies.items()
        }

    @pinned
    def copied(self, name: str) -> Tensor:
        """The copy of a module's weight in the base, in float32."""
        return self._contents.weights.read(self._contents.copies[name][0]).float()


def _in_memory(
    config: object, tensors: Mapping[str, Tensor], label: str, source: str, limits: Limits
) -> Adapter:
    where = f"adapter {shown(label)}, {source}"
    parsed = parse(config_bytes(config, f"{where}, config"), f"{where}, config", limits)
    chosen = settings(parsed, f"{where}, config")
    weights = held(cast("Mapping[object, object]", tensors), where, limits)
    contents = sort_contents(weights, chosen, parsed, f"{where}, config", limits)
    weights.scan()
    return _finished(label, source, parsed, chosen, contents, {})


def _finished(
    label: str,
    source: str,
    config: Mapping[str, object],
    chosen: Settings,
    contents: Contents,
    files: Mapping[str, str],
    folder: str | None = None,
) -> Adapter:
    """The adapter, once its values were seen and none was bad."""
    contents.check_values(source)
    return Adapter(
        label=_checked_label(label),
        source=source,
        config=MappingProxyType(config),
        modules=MappingProxyType(contents.modules),
        saved=MappingProxyType(dict(sorted(contents.saved.items()))),
        vectors=MappingProxyType(dict(sorted(contents.vectors.items()))),
        digest=contents.digest(),
        files=MappingProxyType(files),
        base_model=chosen.base_model,
        revision=chosen.revision,
        task_type=chosen.task_type,
        fan_in_fan_out=chosen.fan_in_fan_out,
        folder=folder,
        settings=chosen,
        _contents=contents,
    )


def _unpickled(values: Mapping[str, Any]) -> Adapter:
    views: dict[str, Any] = {name: MappingProxyType(values[name]) for name in _VIEWS}
    return Adapter(**{**values, **views})


def label_from(name: str) -> str:
    """A label made of any name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:64].strip(".") or "adapter"


def _checked_label(label: str) -> str:
    if not _LABEL.fullmatch(label):
        raise MethodError(
            f"label {shown(label)}: expected 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        )
    return label
