"""A base model as a folder of safetensors, sharded or not:
names, shapes and weights, one tensor at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, AdapterSecurityError, ModelMismatchError
from sapmerge.io.files import DEFAULT_LIMITS, RegularFile, StoredWeights, shown
from sapmerge.io.header import open_weights
from sapmerge.io.keys import EMBEDDINGS
from sapmerge.io.measuring import Entry
from sapmerge.io.modules import Module
from sapmerge.io.names import canonical
from sapmerge.io.original_llava import MODEL_CONFIG
from sapmerge.io.strict_json import parse

__all__ = ["LARGE", "BaseFolder", "Spot"]

LARGE = replace(DEFAULT_LIMITS, config_bytes=DEFAULT_LIMITS.header_bytes)
"""For lists of tensors or files: those of models with many experts have several MB."""
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PLAIN = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
# What transformers calls its Conv1D modules (GPT-2, ImageGPT, Decision Transformer, CLVP). One flag
# of a config says nothing of a ViT beside GPT-2, so where there are such names, they decide.
_CONV1D = re.compile(r"(?:.*\.)?(?:c_attn|c_proj|c_fc|q_attn)")
# One expert of a fused parameter is several modules in a folder: the halves of gate_up_proj, or one
# matrix.
_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Spot:
    """Where a part of a layer's weight lies in a folder.

    Args:
        tensor: its name.
        expert: which matrix of a tensor of three dimensions; None for a whole tensor.
        rows: which rows of the layer it holds; None for all.
        transposed: whether it is stored as (inputs, outputs).
    """

    tensor: str
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False


class BaseFolder:
    """The weights of a base model that nobody has loaded.

    Args:
        path: a local folder with model.safetensors, or shards and their index.
        conv1d: whether Linear layers are stored as (inputs, outputs), as GPT-2's are;
            the adapters say so, of some of their modules.

    Raises:
        AdapterFormatError, AdapterSecurityError: the folder,
            an index or a header is not what it should be.
    """

    def __init__(self, path: str | os.PathLike[str], *, conv1d: bool = False) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ModelMismatchError(f"a base is the path of a folder; got a {type(path).__name__}")
        self.path, self.conv1d = os.path.abspath(os.fsdecode(path)), conv1d
        self._where = f"base {shown(os.fsdecode(path))}"
        self.shards: dict[str, StoredWeights] = {}
        for name in self._files():
            shard = os.path.join(self.path, name)
            with RegularFile(shard, f"{self._where}, {name}") as file:
                self.shards[name] = open_weights(file, shard, DEFAULT_LIMITS)
        self.entries: dict[str, tuple[str, Entry]] = {}
        for name, weights in self.shards.items():
            for tensor, entry in weights.entries.items():
                if tensor in self.entries:
                    raise AdapterFormatError(
                        f"{weights.where}: tensor {shown(tensor)} is in another shard, too"
                    )
                self.entries[tensor] = name, entry
        self._names = {self._canonical(tensor): tensor for tensor in self.entries}
        named = {
            key: self.entries[tensor][1].shape
            for key, tensor in self._names.items()
            if key.endswith(".weight") and _CONV1D.fullmatch(key.removesuffix(".weight"))
        }
        wide = (".c_attn.weight", ".c_fc.weight")  # more outputs than inputs
        self._named_so = bool(named)
        self._stored_so = any(
            key.endswith(wide) and len(shape) == 2 and shape[0] < shape[1]
            for key, shape in named.items()
        )

    def _files(self) -> list[str]:
        if os.path.lexists(os.path.join(self.path, _ONE)):
            return [_ONE]
        table = self._json(_INDEX).get("weight_map")
        files = (
            set(cast("Mapping[str, object]", table).values())
            if isinstance(table, dict)
            else set[object]()
        )
        if not files or not all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in files):
            raise AdapterSecurityError(
                f"{self._where}, {_INDEX}: weight_map must name safetensors files of this folder"
            )
        return sorted(cast("set[str]", files))

    def _json(self, name: str) -> dict[str, Any]:
        """A file beside the weights."""
        where = f"{self._where}, {name}"
        with RegularFile(os.path.join(self.path, name), where) as file:
            return parse(bytes(file.read(0, file.size)), where, LARGE)

    @staticmethod
    def _canonical(tensor: str) -> str:
        module, dot, leaf = tensor.rpartition(".")
        return f"{canonical(module, {})}{dot}{leaf}"

    def modules(self) -> Iterator[str]:
        """The modules that have a weight of two dimensions or more, by their canonical names."""
        for key, tensor in self._names.items():
            if key.endswith(".weight") and len(self.entries[tensor][1].shape) > 1:
                yield key.removesuffix(".weight")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (outputs, inputs) of its weight, by the folder's own names."""
        found: dict[str, tuple[int, int]] = {}
        for tensor, (_, entry) in self.entries.items():
            if tensor.endswith(".weight") and len(entry.shape) == 2:
                module = tensor.removesuffix(".weight")
                m, n = entry.shape[::-1] if self._turned(module) else entry.shape
                found[module] = m, n
        return found

    def _turned(self, module: str) -> bool:
        """Whether a matrix is stored as (inputs, outputs), as far as names tell."""
        if self._named_so:
            named = _CONV1D.fullmatch(module) is not None
            return named and (self.conv1d or self._stored_so)
        return self.conv1d

    def tied(self) -> bool:
        """Whether the head is the input embeddings: config.json says so, or it names a language
        model whose folder has no head.
        """
        if not os.path.lexists(os.path.join(self.path, MODEL_CONFIG)):
            return False
        table = self._json(MODEL_CONFIG)
        text = table.get("text_config")
        for part in (table, cast("Mapping[str, object]", text) if isinstance(text, dict) else {}):
            if "tie_word_embeddings" in part:
                return part["tie_word_embeddings"] is True
        heads = ("lm_head.weight", "embed_out.weight", "output.weight", "output_layer.weight")
        named = str(table.get("architectures"))
        return ("ForCausalLM" in named or "LMHead" in named) and not any(
            name.endswith(heads) for name in self._names
        )

    def find(self, name: str) -> str | None:
        """The folder's name of a tensor: the same, or the only one of which one is the
        end of the other.

        Folders of a model without its head lack its prefix ("h.0..." beside "transformer.h.0...").
        """
        if name in self._names:
            return self._names[name]
        near = [
            own
            for key, own in self._names.items()
            if f".{name}".endswith(f".{key}") or key.endswith(f".{name}")
        ]
        return near[0] if len(near) == 1 else None

    def raw(self, tensor: str) -> Tensor:
        """A tensor by the folder's name, in its dtype."""
        name, entry = self.entries[tensor]
        weights = self.shards[name]
        with RegularFile(weights.path, weights.where) as file:
            data = file.read(entry.start, entry.size)
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)

    def tensor(self, name: str) -> Tensor:
        """A parameter by its canonical name, in float32.

        Raises:
            ModelMismatchError: there is none.
        """
        full = self.find(name)
        if full is None and name.endswith("lm_head.weight"):  # tied: folders store it once
            full = next(
                (own for key, own in self._names.items() if key.endswith("embed_tokens.weight")),
                None,
            )
        if full is None:
            raise ModelMismatchError(
                f"{self._where} has no tensor {shown(name)}; is it the adapters' base?"
            )
        return self.raw(full).float()

    def spots(self, module: Module) -> list[Spot]:
        """Where the weight of a layer lies; several spots for a fused one.

        Raises:
            ModelMismatchError: it is not there, or has another shape.
        """
        whole = self.find(f"{module.owner}.{module.parameter}")
        if whole is not None:
            spots = [
                Spot(
                    whole,
                    module.expert if module.kind == "parameter" and module.experts > 1 else None,
                )
            ]
        else:
            spots = self._split(module)
        sizes = [
            self.entries[spot.tensor][1].shape[(0 if spot.expert is None else 1) :]
            for spot in spots
        ]
        shapes = [(size[0], int(torch.Size(size[1:]).numel())) for size in sizes if size]
        stacked = (sum(shape[0] for shape in shapes), shapes[0][1]) if shapes else None
        turned = module.kind == "embedding" or (
            module.kind == "linear"
            and not EMBEDDINGS.fullmatch(module.owner)
            and self._turned(module.owner)
        )
        if (
            len(spots) == 1
            and stacked == module.shape[::-1]
            and (turned or stacked != module.shape)
        ):
            return [Spot(spots[0].tensor, spots[0].expert, None, True)]
        if stacked != module.shape:
            present = "no such tensor" if stacked is None else f"one of shape {stacked}"
            raise ModelMismatchError(
                f"layer {module.name!r} {module.shape}: {self._where} has {present}; is it the "
                "adapters' base?"
            )
        return spots

    def _split(self, module: Module) -> list[Spot]:
        for leaves in _EXPERTS.get(module.parameter, ()) if module.kind == "parameter" else ():
            owners = (module.owner, module.owner.replace("mlp.experts", "block_sparse_moe.experts"))
            for owner in owners:
                names = [self.find(f"{owner}.{module.expert}.{leaf}.weight") for leaf in leaves]
                if all(names):
                    half = module.shape[0] // len(names)
                    return [
                        Spot(
                            cast("str", name),
                            None,
                            slice(k * half, (k + 1) * half) if len(names) > 1 else None,
                        )
                        for k, name in enumerate(names)
                    ]
        return []

    def matrix(self, module: Module) -> Tensor:
        """The weight of a layer as an (outputs, inputs) matrix, in float32."""
        parts: list[Tensor] = []
        for spot in self.spots(module):
            part = self.raw(spot.tensor).float()
            part = part if spot.expert is None else part[spot.expert]
            parts.append(part.T if spot.transposed else part.reshape(part.shape[0], -1))
        return torch.cat(parts)

    def check(self, modules: Iterable[Module], saved: Mapping[str, tuple[int, ...]]) -> None:
        """Whether all layers and saved tensors have their place here; headers only.

        Raises:
            ModelMismatchError: one has not.
        """
        for module in modules:
            self.spots(module)
        for name, shape in saved.items():
            key = self.find(name)
            if key is None or self.entries[key][1].shape != shape:
                raise ModelMismatchError(
                    f"the adapters save {name!r} {shape}, and {self._where} has no such tensor; "
                    "modules_to_save='drop' leaves it out"
                )
