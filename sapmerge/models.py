"""Finding an adapter's modules in a live model,
whichever transformers version spelled their names.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sapmerge.core.undo import restoring
from sapmerge.errors import ModelMismatchError
from sapmerge.io.modules import Module
from sapmerge.naming import Names, base_of, is_transposed, matrix_shape

__all__ = [
    "MERGED",
    "ModelWeights",
    "Site",
    "base_of",
    "device_of",
    "exclusive",
    "find_modules",
    "find_saved",
    "find_sites",
    "find_tensors",
    "merged_into",
    "model_names",
    "tensor_name",
    "tuner_layers",
    "weight_view",
]


_locks = weakref.WeakKeyDictionary[nn.Module, "threading.RLock"]()
_locks_lock = threading.Lock()


@contextmanager
def exclusive(model: Any) -> Generator[nn.Module]:
    """The plain model inside, for this thread alone:
    hooks, modes and weights of a model belong to one merge at a time.

    Every pass over anchors and every write to the weights happens inside. It may be entered again.
    """
    base = base_of(model)
    if not isinstance(base, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ModelMismatchError(f"expected a torch module; got a {type(model).__name__}")
    with _locks_lock:
        lock = _locks.setdefault(base, threading.RLock())
    owned = cast("Callable[[], bool]", lock._is_owned)  # type: ignore[attr-defined]  # pyright: ignore
    with restoring() as undo:
        if not owned():
            undo.add(lambda: owned() and lock.release())
            lock.acquire()
        yield base


def model_names(model: Any) -> Mapping[str, str]:
    """Key -> where the model has the module, without the wrappers that PEFT inserts."""
    return Names(model).paths


def tensor_name(name: str, names: Mapping[str, str]) -> str:
    """A canonical tensor name, e.g. "classifier.weight",
    as the model with those module names spells it.
    """
    module, _, last = name.rpartition(".")
    return f"{names.get(module, module)}.{last}"


@dataclass(frozen=True)
class Site:
    """Where the weight of one layer lies in a model.

    Args:
        module: the module that owns it, without PEFT's wrappers.
        name: of the parameter in the module, e.g. "weight", "in_proj_weight" or "gate_up_proj".
        parameter: the whole parameter.
        weight: the layer's part of it: all of it, or one expert's slice (a view).
        transposed: whether the weight is stored as (inputs, outputs).
        hooked: whether the module maps an input to W x, so that an update can be added to its
            output.
        part: where in the parameter the layer's weight is.
    """

    module: nn.Module
    name: str
    parameter: Tensor
    weight: Tensor
    transposed: bool
    hooked: bool
    part: tuple[int | slice, ...] = ()

    def view(self, matrix: Tensor) -> Tensor:
        """An (outputs, inputs) matrix in the layout of the weight."""
        return matrix.T if self.transposed else matrix.reshape(self.weight.shape)

    def matrix(self) -> Tensor:
        """The weight as an (outputs, inputs) matrix."""
        weight = self.weight.detach()
        return weight.T if self.transposed else weight.reshape(weight.shape[0], -1)


class ModelWeights:
    """The weights of a live model, for kinds of adapters that need them (see
    `Adapter.with_base`).

    Raises:
        ModelMismatchError: they are asked for while an adapter of the model is merged into them.
    """

    def __init__(self, model: Any, wanted: Mapping[str, Module]) -> None:
        self._sites, self._model = find_sites(model, wanted), model
        if wanted:
            _check_unmerged(model)

    def matrix(self, module: Module) -> Tensor:
        """The weight of a layer as an (outputs, inputs) matrix, in float32 on the CPU."""
        _check_unmerged(self._model)
        return self._sites[module.name].matrix().to("cpu", torch.float32)

    def tensor(self, name: str) -> Tensor:
        """A parameter by its canonical name, in float32 on the CPU."""
        _check_unmerged(self._model)
        return find_tensors(self._model, [name])[name].detach().to("cpu", torch.float32)


MERGED = (
    "an adapter of the model is merged into its weights, so these are not the base's: "
    "unmerge_adapter() first"
)


def tuner_layers(model: Any) -> list[Any]:
    """The layers in which PEFT keeps adapters."""
    return [
        module
        for module in base_of(model).modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)
    ]


def merged_into(layers: Iterable[Any]) -> bool:
    """Whether PEFT has merged an adapter of such layers into their weights."""
    return any(getattr(layer, "merged", False) is True for layer in layers)


def _check_unmerged(model: Any) -> None:
    if merged_into(tuner_layers(model)):
        raise ModelMismatchError(MERGED)


def find_modules(model: Any, wanted: Mapping[str, Module]) -> dict[str, nn.Module]:
    """The model's module for every adapted weight; see `find_sites`."""
    return {name: site.module for name, site in find_sites(model, wanted).items()}


def find_sites(model: Any, wanted: Mapping[str, Module]) -> dict[str, Site]:
    """Where the weight of every layer lies in a model.

    Raises:
        ModelMismatchError: modules are missing, or their weight has another shape.
    """
    own = Names(model)
    base, names = own.base, own.located(wanted.values())
    fused = {
        name: part
        for name, spec in wanted.items()
        if (part := fused_part(spec, names, base)) is not None
    }
    missing = [
        spec.spelled
        for name, spec in wanted.items()
        if spec.owner not in names and name not in fused
    ]
    if missing:
        raise ModelMismatchError(
            f"{type(base).__name__} has no module {missing[0]!r}"
            + (
                f" (nor {len(missing) - 1} others of the {len(wanted)} adapted ones)"
                if len(missing) > 1
                else ""
            )
            + f"; it has e.g. {list(own.plain.values())[-3:]}. Is it the adapters' base model?"
        )
    sites: dict[str, Site] = {}
    for name, spec in wanted.items():
        site = fused.get(name) or _site(unwrapped(base.get_submodule(names[spec.owner])), spec)
        shape = tuple(site.matrix().shape)
        if shape != spec.shape:
            raise ModelMismatchError(
                f"module {name!r} has a weight matrix {shape} in {type(base).__name__}, but the "
                f"adapters' update is {spec.shape}"
            )
        sites[name] = site
    return sites


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def _site(module: nn.Module, spec: Module) -> Site:
    parameter: object = module
    for part in spec.parameter.split("."):
        parameter = getattr(parameter, part, None)
    if isinstance(parameter, UninitializedParameter):
        raise ModelMismatchError(
            f"module {spec.name!r} ({type(module).__name__}) has no weight before it first runs"
        )
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        raise ModelMismatchError(
            f"module {spec.name!r} ({type(module).__name__}) has no floating-point {spec.parameter}"
        )
    if spec.kind != "parameter":
        checked_shape(module, parameter)  # refuses grouped convolutions
        hooked = spec.parameter == "weight"
        return Site(
            module, spec.parameter, parameter, parameter, hooked and is_transposed(module), hooked
        )
    experts = parameter.shape[0] if parameter.ndim == 3 else 1
    if experts != spec.experts:
        raise ModelMismatchError(
            f"{spec.parameter} of module {spec.owner!r} holds {experts} matrices in "
            f"{type(module).__name__}, and the adapters have {spec.experts}"
        )
    part = (spec.expert,) if parameter.ndim == 3 else ()
    # As PEFT reads it: see ParamWrapper.
    transposed = parameter.ndim == 3 and bool(getattr(module, "is_transposed", False))
    return Site(
        module,
        spec.parameter,
        parameter,
        parameter[part] if part else parameter,
        transposed,
        False,
        part,
    )


_EXPERT = re.compile(
    r"(?P<bank>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w1|w2|w3)"
)


def fused_part(spec: Module, names: Mapping[str, str], base: nn.Module) -> Site | None:
    """The part of a fused parameter that was a module of its own before transformers 5:
    "experts.3.up_proj".
    """
    match = (
        _EXPERT.fullmatch(spec.owner) if spec.kind == "linear" and spec.owner not in names else None
    )
    if match is None:
        return None
    bank = next(
        (
            b
            for b in (match["bank"], match["bank"].replace("block_sparse_moe", "mlp"))
            if b in names
        ),
        None,
    )
    module = None if bank is None else unwrapped(base.get_submodule(names[bank]))
    name = "down_proj" if match["leaf"] in ("down_proj", "w2") else "gate_up_proj"
    parameter, number = getattr(module, name, None), int(match["number"])
    if (
        module is None
        or not isinstance(parameter, Tensor)
        or parameter.ndim != 3
        or number >= parameter.shape[0]
    ):
        return None
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return None
    half = parameter.shape[1] // 2
    rows = {
        "gate_up_proj": slice(0, half)
        if match["leaf"] in ("gate_proj", "w1")
        else slice(half, None)
    }
    part = (number, rows.get(name, slice(None)))
    return Site(module, name, parameter, parameter[part], False, False, part)


def checked_shape(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """`matrix_shape`; grouped convolutions are refused."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups != 1:
        raise ModelMismatchError(
            f"{module} has groups: updates of grouped convolutions are not supported"
        )
    return matrix_shape(module, weight)


def weight_view(module: nn.Module, matrix: Tensor) -> Tensor:
    """An (outputs, inputs) matrix in the layout of the module's weight."""
    return (
        matrix.T if is_transposed(module) else matrix.reshape(cast("Tensor", module.weight).shape)
    )


def find_saved(model: Any, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The model's own tensor for every tensor of a module that was saved whole.

    Args:
        wanted: canonical tensor name -> shape.

    Raises:
        ModelMismatchError: it has none, or one of another shape.
    """
    targets = find_tensors(model, wanted, "modules_to_save='drop' leaves it out")
    for name, shape in wanted.items():
        shape_there = tuple(targets[name].shape)
        if shape_there != shape:
            raise ModelMismatchError(
                f"the adapters save {name!r} {shape}, and the model has {shape_there}; "
                "modules_to_save='drop' leaves it out"
            )
    return targets


def find_tensors(
    model: Any, wanted: Iterable[str], advice: str = "is it their base?"
) -> dict[str, Tensor]:
    """The model's own tensor for every canonical name, e.g.
    "classifier.weight", in PEFT's wrappers too.

    Raises:
        ModelMismatchError: it has none; `advice` ends the message.
    """
    wanted, known = list(wanted), Names(model)
    state = cast("dict[str, Tensor]", known.base.state_dict(keep_vars=True))
    own = {_WRAPPERS.sub(".", name): tensor for name, tensor in state.items()}
    keys = known.locate({name.rpartition(".")[0]: None for name in wanted})
    names = {module: known.paths[key] for module, key in keys.items()}
    tensors: dict[str, Tensor] = {}
    for name in wanted:
        target = own.get(tensor_name(name, names))
        if target is None:
            raise ModelMismatchError(
                f"the adapters change {name!r}, and the model has none; {advice}"
            )
        tensors[name] = target
    return tensors


_WRAPPERS = re.compile(r"(?:\.(?:original_module|base_layer|token_adapter))+\.")


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter lives."""
    return next(
        (parameter.device for parameter in cast("nn.Module", model).parameters()),
        torch.device("cpu"),
    )
