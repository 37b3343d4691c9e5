"""What a live model calls its modules, whichever class,
version or wrapper spelled the names in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from sapmerge.io.modules import Module
from sapmerge.io.names import alike, canonical, stem

__all__ = ["Names", "base_of", "matrix_shape", "is_transposed", "without_wrappers"]


def without_wrappers(model: Any) -> Any:
    """The model inside torch.compile, DataParallel, DistributedDataParallel and the like,
    or the model itself.
    """
    while (inner := _wrapped_in(model)) is not None:
        model = inner
    return model


def base_of(model: Any) -> nn.Module:
    """The plain model inside a PeftModel and the wrappers of torch, or the model itself."""
    model = without_wrappers(model)
    inner = getattr(model, "get_base_model", None)
    return cast(
        "nn.Module",
        without_wrappers(inner()) if inner is not None and hasattr(model, "peft_config") else model,
    )


_WRAPPING = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def _wrapped_in(module: Any) -> nn.Module | None:
    """The module that a wrapper holds; None for a module that is no wrapper."""
    name = _WRAPPING.get(type(module).__name__)
    inner = None if name is None else module._modules.get(name)
    return inner if isinstance(inner, nn.Module) else None


class Names:
    """The modules of a model: where they are, what to call them, and which one a key means.

    Args:
        model: wrapped or not; the adapters of a PeftModel are no modules of it.
    """

    def __init__(self, model: Any) -> None:
        self.base = base_of(model)
        inside = set[str]()  # paths of modules that a wrapper in the model holds
        self.plain: dict[str, str] = {}
        """Path -> the name without wrappers."""
        for path, module in cast("Iterable[tuple[str, nn.Module]]", self.base.named_modules()):
            if _wrapped_in(module) is not None:
                inside.add(f"{path}.{_WRAPPING[type(module).__name__]}")
            if path and ".lora_" not in path:
                holder, _, last = path.rpartition(".")
                above = self.plain.get(holder, "")
                self.plain[path] = above if path in inside else f"{above}.{last}" if above else last
        self.paths: dict[str, str] = {}
        """Key -> path."""
        for path, name in self.plain.items():
            key = canonical(name)
            clash = key in self.paths and self.plain[self.paths[key]] != name
            self.paths[name if clash else key] = path
        self._stems: dict[str, list[str]] | None = None
        self._tails: dict[str, list[str]] = {}

    def locate(self, wanted: Mapping[str, tuple[int, ...] | None]) -> dict[str, str]:
        """The model's own key for every module that it has, whatever files call it.

        In this order: the key itself, what transformers would rename it to, one that differs in
        what is around a tower, one with the same ending.
        Two keys that lead to one module lead nowhere.

        Args:
            wanted: key -> shape of the update, which decides where several modules have a name
                that fits; or None.
        """
        matches = {
            key: own for key, shape in wanted.items() if (own := self._find(key, shape)) is not None
        }
        used = Counter(matches.values())
        return {key: own for key, own in matches.items() if key == own or used[own] == 1}

    def located(self, modules: Iterable[Module]) -> dict[str, str]:
        """Owner of an adapted weight -> where the model has it,
        and the keys of all modules that it has.
        """
        wanted = {
            module.owner: module.shape if module.name == module.owner else None
            for module in modules
        }
        return {
            **self.paths,
            **{owner: self.paths[key] for owner, key in self.locate(wanted).items()},
        }

    def _find(self, key: str, shape: tuple[int, ...] | None) -> str | None:
        if key in self.paths:
            return key
        theirs = self._in_transformers(key)
        if theirs is not None and theirs in self.paths:
            return theirs
        if self._stems is None:
            self._stems = {}
            for own in self.paths:
                self._stems.setdefault(stem(own).path, []).append(own)
                for tail in _tails(own):
                    self._tails.setdefault(tail, []).append(own)
        ending = next((tail for tail in _tails(key) if tail in self.paths), None)
        for candidates in (
            [own for own in self._stems.get(stem(key).path, ()) if alike(key, own)],
            self._tails.get(key, []),
            [] if ending is None else [ending],
        ):
            fitting = [own for own in candidates if shape is None or self.shape(own) == shape]
            if len(fitting) == 1:
                return fitting[0]
        return None

    def shape(self, key: str) -> tuple[int, ...] | None:
        """(outputs, inputs) of the weight of a module of the model;
        None for a module that has none.
        """
        module = self.base.get_submodule(self.paths[key])
        while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
            module = inner
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            return None
        return matrix_shape(module, weight)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module -> (outputs, inputs) of its weight, by the names without wrappers."""
        found = {self.plain[path]: self.shape(key) for key, path in self.paths.items()}
        return {name: (shape[0], shape[1]) for name, shape in found.items() if shape is not None}

    def _in_transformers(self, key: str) -> str | None:
        """What transformers would rename the module to when it loads it into this model."""
        if not any(cls.__module__.startswith("transformers.") for cls in type(self.base).__mro__):
            return None
        try:
            from transformers import core_model_loading as loading
            from transformers.conversion_mapping import get_model_conversion_mapping

            if not hasattr(self, "_renamings"):
                every = cast("list[Any]", get_model_conversion_mapping(cast("Any", self.base)))
                self._renamings = [one for one in every if isinstance(one, loading.WeightRenaming)]
            rename = cast("Any", loading).rename_source_key
            renamed: str = rename(f"{key}.weight", self._renamings, [])[0]
            return canonical(renamed.removesuffix(".weight"))
        except (
            ImportError,
            AttributeError,
            TypeError,
        ):  # transformers 4, or another form of its table
            return None


def _tails(name: str) -> Iterator[str]:
    """The name without its first parts, the longest first, as long as no number is lost."""
    parts = name.split(".")
    for at in range(1, len(parts)):
        if parts[at - 1].isdigit():
            return
        yield ".".join(parts[at:])


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is stored as (inputs, outputs)."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def matrix_shape(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """(outputs, inputs) of a module's weight, seen as the matrix that an update is added to."""
    if is_transposed(module):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight.numel() // max(1, weight.shape[0])
