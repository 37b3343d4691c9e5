"""What a round accepts: modules and shapes from the round's own model or manifest,
never from an upload.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from sapmerge.errors import (
    AdapterConfigError,
    IncompatibleAdaptersError,
    LimitExceededError,
    MethodError,
    ModelMismatchError,
    RoundError,
    SapmergeError,
)
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import shown
from sapmerge.io.modules import Module
from sapmerge.io.names import canonical
from sapmerge.io.records import is_folder, read_record
from sapmerge.models import base_of, checked_shape, model_names

__all__ = ["Contract", "Manifest", "Slot", "contract"]

Manifest: TypeAlias = "str | os.PathLike[str] | Adapter | Mapping[str, Any]"
"""A JSON file or mapping module -> [outputs, inputs]; or an adapter of your own, or its folder."""

_HEADER = 1 << 20  # bytes of config and safetensors header, beside the tensors
_FORMAT = 1


@dataclass(frozen=True)
class Slot:
    """A module that uploads may adapt.

    Args:
        kind: "linear", "conv" or "embedding".
        shape: (m, n) of the update; conv: n = inputs * kernel; embedding: m = its dimension, n =
            its rows.
        kernel: of a convolution, (inputs, *kernel); else empty.
    """

    kind: str
    shape: tuple[int, int]
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Contract:
    """What the uploads of one round must be. It is written into `round.json` when
    the round is made.

    Args:
        base_model: the name that an upload's config may give its base; one without a name is taken,
            too.
        modules: canonical name -> Slot.
        saved: canonical tensor name -> shape, of modules that may be saved whole.
        max_rank: of any module.
        max_bytes: of both files of an upload together.
        max_norm_ratio: an adapter longer than so many times the median of all is left out of the
            merge.
        quorum: how many clients a merge needs.
        max_share: of the samples, for one client, where there are enough others.
    """

    base_model: str | None
    modules: Mapping[str, Slot]
    saved: Mapping[str, tuple[int, ...]]
    max_rank: int
    max_bytes: int
    max_norm_ratio: float
    quorum: int
    max_share: float

    def __post_init__(self) -> None:
        if not self.modules:
            raise MethodError("the round accepts no module at all; look at `modules`")
        if not (_whole(self.max_rank) and _whole(self.max_bytes) and _whole(self.quorum)):
            raise MethodError(
                "max_rank, max_bytes and quorum are whole numbers from 1 on; "
                f"got {self.max_rank!r}, {self.max_bytes!r} and {self.quorum!r}"
            )
        if not (0 < self.max_share <= 1 and self.max_norm_ratio >= 1):
            raise MethodError(
                "max_share is a share in (0, 1] and max_norm_ratio at least 1; "
                f"got {self.max_share!r} and {self.max_norm_ratio!r}"
            )

    def check(self, adapter: Adapter) -> dict[str, Any]:
        """What was checked of an upload that keeps the contract, as data.

        Raises:
            SapmergeError: the upload does not keep it; the message names module,
                field and what was expected.
        """
        if self.base_model and adapter.base_model and adapter.base_model != self.base_model:
            raise IncompatibleAdaptersError(
                f"the config names the base model {shown(adapter.base_model)}; the round is for "
                f"{self.base_model!r}"
            )
        for name, module in adapter.modules.items():
            self._check_module(name, module)
        for name, tensor in adapter.saved.items():
            if name not in self.saved:
                raise AdapterConfigError(
                    f"the upload saves {shown(name)} whole, which the round does not take; train "
                    "without modules_to_save, or make the round with modules_to_save=[...]"
                )
            if tuple(tensor.shape) != self.saved[name]:
                raise IncompatibleAdaptersError(
                    f"the saved tensor {shown(name)} is {tuple(tensor.shape)}; the round expects "
                    f"{self.saved[name]}"
                )
        for vector in adapter.vectors.values():
            raise AdapterConfigError(
                f"the upload changes {shown(vector.name)} of the base, which the round does not "
                "take; train without "
                "lora_bias, with bias='none' and without trainable_token_indices"
            )
        ranks = [module.rank for module in adapter.modules.values()]
        norm = math.sqrt(sum(adapter.update(name).norm() ** 2 for name in adapter.modules))
        return {
            "modules": len(ranks),
            "rank": [min(ranks), max(ranks)],
            "saved": len(adapter.saved),
            "norm": norm,
        }

    def _check_module(self, name: str, module: Module) -> None:
        slot = self.modules.get(name)
        if slot is None:
            raise IncompatibleAdaptersError(
                f"module {shown(name)} is none of the {len(self.modules)} modules of the round, "
                f"e.g. {next(iter(self.modules))!r}"
            )
        kernel = tuple(module.a_shape[1:]) if module.kind == "conv" else ()
        if (module.kind, module.shape, kernel) != (slot.kind, slot.shape, slot.kernel):
            raise IncompatibleAdaptersError(
                f"module {shown(name)} is {module.kind} {module.shape} in the upload; the round "
                f"expects {slot.kind} {slot.shape}"
            )
        if module.needs_base is not None:
            raise AdapterConfigError(
                f"module {shown(name)}: {module.needs_base}; the round takes plain LoRA only"
            )
        if module.rank > self.max_rank:
            raise LimitExceededError(
                f"module {shown(name)} has rank {module.rank}; at most {self.max_rank} is allowed"
            )

    def check_same(self, wanted: Contract, path: str) -> None:
        """Whether a round is opened again with what it was made with.

        Raises:
            RoundError: it is not; names the field.
        """
        one, other = self.to_dict(), wanted.to_dict()
        for name in one:
            if one[name] != other[name]:
                raise RoundError(
                    f"{path}: the round was made with another {name}; open it with Inbox(folder) "
                    "alone, or make a new round"
                )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `round.json`."""
        data = asdict(self)
        if math.isinf(self.max_norm_ratio):
            data["max_norm_ratio"] = None
        return {"format": _FORMAT, **data}

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str) -> Contract:
        """The contract in a `round.json`.

        Raises:
            RoundError: it is none.
        """
        try:
            if data["format"] != _FORMAT:
                raise RoundError(
                    f"{where}: format {data['format']!r}; this version of sapmerge reads {_FORMAT}"
                )
            ratio = data["max_norm_ratio"]
            return Contract(
                base_model=data["base_model"],
                modules={name: _slot(name, entry) for name, entry in data["modules"].items()},
                saved={name: tuple(shape) for name, shape in data["saved"].items()},
                max_rank=data["max_rank"],
                max_bytes=data["max_bytes"],
                max_norm_ratio=math.inf if ratio is None else ratio,
                quorum=data["quorum"],
                max_share=data["max_share"],
            )
        except (KeyError, TypeError, AttributeError, ValueError, MethodError) as error:
            raise RoundError(
                f"{where}: is no contract of a round ({shown(str(error))}); restore it"
            ) from error


def contract(
    base_model: str | None,
    model: Any,
    manifest: Manifest | None,
    modules: Sequence[str] | None,
    modules_to_save: Sequence[str],
    max_rank: int,
    max_bytes: int | None,
    max_norm_ratio: float,
    quorum: int,
    max_share: float,
) -> Contract:
    """A contract from a model or a manifest.

    Args:
        modules: names, last parts of names ("q_proj") or patterns ("*vision*"); None: every module
            that has a weight matrix.
        modules_to_save: modules of the model that uploads may save whole.
        max_bytes: None: what the largest upload of `max_rank` needs.

    Raises:
        MethodError: neither or both of model and manifest, or a pattern that fits nothing.
    """
    if (model is None) == (manifest is None):
        raise MethodError(
            "a round needs to know names and shapes of the modules: give model=..., or "
            "manifest=... (a JSON file "
            "module -> [outputs, inputs], or a folder with an adapter of your own)"
        )
    slots = (
        dict(_of_model(model)) if model is not None else _of_manifest(cast("Manifest", manifest))
    )
    chosen = _chosen(slots, modules)
    saved = _saved(model, modules_to_save)
    if max_bytes is None:
        numbers = (
            sum(max_rank * sum(slot.shape) for slot in chosen.values()) if _whole(max_rank) else 0
        )
        max_bytes = _HEADER + 8 * (numbers + sum(math.prod(shape) for shape in saved.values()))
    return Contract(
        base_model, chosen, saved, max_rank, max_bytes, max_norm_ratio, quorum, max_share
    )


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _of_model(model: Any) -> Iterable[tuple[str, Slot]]:
    """Every module of a model that LoRA can adapt."""
    base = base_of(model)
    for name, spelled in sorted(model_names(model).items()):
        if spelled.endswith(".base_layer"):
            continue
        module = base.get_submodule(spelled)
        module = cast("nn.Module", getattr(module, "base_layer", module))
        weight = getattr(module, "weight", None)
        convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        linear = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"
        if not isinstance(weight, Tensor) or not (linear or convolution):
            continue
        try:
            shape = checked_shape(module, weight)
        except ModelMismatchError:  # grouped convolutions, which no adapter of ours has
            continue
        kind = (
            "conv" if convolution else "embedding" if isinstance(module, nn.Embedding) else "linear"
        )
        yield name, Slot(kind, shape, tuple(weight.shape[1:]) if convolution else ())


def _of_manifest(manifest: Manifest) -> dict[str, Slot]:
    if isinstance(manifest, (str, os.PathLike)):
        path = os.fsdecode(manifest)
        if is_folder(path):
            manifest = Adapter.load(path)
        else:
            data = read_record(path)
            if data is None:
                raise MethodError(f"there is no manifest {path!r}")
            manifest = data
    if isinstance(manifest, Adapter):
        return {
            name: Slot(
                module.kind,
                module.shape,
                tuple(module.a_shape[1:]) if module.kind == "conv" else (),
            )
            for name, module in manifest.modules.items()
        }
    named = cast("Mapping[str, Any]", manifest.get("modules", manifest))
    try:
        return {name: _slot(name, entry) for name, entry in sorted(named.items())}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MethodError(
            f"a manifest maps modules to [outputs, inputs]; got {shown(str(error))}"
        ) from None


def _slot(name: str, entry: Any) -> Slot:
    if not isinstance(entry, Mapping):
        entry = {"shape": entry}
    table = cast("Mapping[str, Any]", entry)
    m, n = table["shape"]
    kind = table.get("kind", "linear")
    if not (_whole(m) and _whole(n)) or kind not in ("linear", "conv", "embedding"):
        raise ValueError(f"module {name!r}: {dict(table)!r}")
    return Slot(kind, (m, n), tuple(table.get("kernel", ())))


def _chosen(slots: Mapping[str, Slot], wanted: Sequence[str] | None) -> dict[str, Slot]:
    if wanted is None:
        return dict(slots)
    if isinstance(wanted, str):
        raise MethodError(f"modules is a list of names or patterns; got the text {wanted!r}")

    def fits(name: str, pattern: str) -> bool:
        return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)

    for pattern in wanted:
        if not any(fits(name, pattern) for name in slots):
            raise MethodError(
                f"modules: {pattern!r} fits no module of the model, e.g. {sorted(slots)[:3]}"
            )
    return {
        name: slot for name, slot in slots.items() if any(fits(name, pattern) for pattern in wanted)
    }


def _saved(model: Any, wanted: Sequence[str]) -> dict[str, tuple[int, ...]]:
    if not wanted:
        return {}
    if model is None:
        raise MethodError(
            "modules_to_save needs model=...: a manifest does not know the shapes of whole modules"
        )
    base = base_of(model)
    found: dict[str, tuple[int, ...]] = {}
    for module in wanted:
        own = {
            name: tuple(tensor.shape)
            for name, tensor in cast("dict[str, Tensor]", base.state_dict()).items()
            if name.startswith(f"{module}.") or f".{module}." in name
        }
        if not own:
            raise SapmergeError(f"modules_to_save: {type(base).__name__} has no module {module!r}")
        found |= {
            canonical(name.rpartition(".")[0]) + f".{name.rpartition('.')[2]}": s
            for name, s in own.items()
        }
    return found
