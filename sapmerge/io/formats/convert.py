"""From one format of LoRA files to another, where that is exact."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from sapmerge.core.torch_state import pinned
from sapmerge.errors import AdapterFormatError, MethodError, OutputExistsError
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.files import shown
from sapmerge.io.formats import diffusers, kohya, mlx, peft, torchtune
from sapmerge.io.formats.known import config_of
from sapmerge.io.formats.lora import Lora, open_stored, read_json
from sapmerge.io.outputs import CONFIG_NAME, Kind
from sapmerge.io.records import write_file

__all__ = ["FORMATS", "Converted", "Format", "convert"]

Format: TypeAlias = Literal["peft", "kohya", "diffusers", "mlx", "torchtune"]
FORMATS: tuple[str, ...] = get_args(Format)


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Args:
        source, target: the formats.
        modules: component of a pipeline ("" of a model alone) -> its modules.
        paths: what was written.
    """

    source: str
    target: str
    modules: Mapping[str, tuple[str, ...]]
    paths: tuple[str, ...]

    def __str__(self) -> str:
        counts = ", ".join(
            f"{component or 'model'}: {len(names)} modules"
            for component, names in self.modules.items()
        )
        return f"{self.source} -> {self.target} ({counts}): {', '.join(self.paths)}"


@pinned
def convert(
    source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    to: Format = "peft",
    model: Any = None,
    base_model: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Convert a LoRA of kohya, diffusers, mlx-lm or torchtune to PEFT's format, or back.

    The factors are those of the file, bit by bit, wherever the format has a place for the scaling;
    else it is multiplied into B. What cannot be converted exactly is refused by its name: LoHa,
    LoKr, DoRA, heads, modules of which nobody can tell what the other format calls them.

    Args:
        source: a file or folder, whose format is found out; or component -> PEFT folder, e.g.
            {"unet": "a", "text_encoder": "b"}, for formats that have both in one file.
        output: a folder; of kohya's format a file `.safetensors`. A file with several components
            becomes one PEFT folder for each, in `output`.
        to: the format to write.
        model: the base, where names or heads have to be looked up: an `nn.Module`, component ->
            `nn.Module`, or the folder of a model or pipeline (only names and its config are read).
        base_model: name of the base, for the output; by default what the input says.
        allow_pickle: read `.pt` and `.bin` files, of authors that you trust.
        overwrite: replace an earlier output.

    Raises:
        AdapterFormatError, AdapterConfigError: what cannot be read or converted, by name.
        ModelMismatchError: the model is needed, or another one.
        OutputExistsError, OutputError: of `output`.

    Example:
        >>> sm.convert("style.safetensors", "style")  # doctest: +SKIP
        Converted(source='kohya', target='peft', ...)
    """
    if to not in FORMATS:
        raise MethodError(f"to={to!r} is no format; choose one of {', '.join(FORMATS)}")
    name, parts, base = _read(source, model, allow_pickle)
    if not any(parts.values()):
        raise AdapterFormatError(f"{shown(str(source))}: has no LoRA")
    base = base_model or base
    target: str = os.path.abspath(os.fspath(output))
    if to == "peft":
        paths = _to_peft(parts, target, base, f"{name}'s format", overwrite)
    else:
        paths = _to_others(parts, target, to, model, base, overwrite)
    modules = {component: tuple(sorted(table)) for component, table in parts.items()}
    return Converted(name, to, modules, paths)


def _read(
    source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    model: Any,
    allow_pickle: bool,
) -> tuple[str, dict[str, dict[str, Lora]], str | None]:
    """The format, the factors, and the base's name if it is told."""
    if isinstance(source, Mapping):
        read = {
            component: peft.read(str(os.fspath(path)), allow_pickle)
            for component, path in source.items()
        }
        return "peft", {component: modules for component, (modules, _) in read.items()}, None
    path = str(os.fspath(source))
    if not os.path.isdir(path):
        return _read_file(path, model, allow_pickle)
    names = set(os.listdir(path))
    if mlx.FILE in names:
        config = read_json(os.path.join(path, CONFIG_NAME))
        stored = open_stored(os.path.join(path, mlx.FILE))
        base = config.get("model")
        return "mlx", mlx.read(stored, config, model), base if isinstance(base, str) else None
    if "adapter_model.safetensors" in names or "adapter_model.bin" in names:
        modules, base = peft.read(path, allow_pickle)
        return "peft", {"": modules}, base
    inside = sorted(name for name in names if name.endswith((".safetensors", ".pt")))
    if len(inside) != 1:
        raise AdapterFormatError(
            f"{shown(path)}: is no LoRA of {', '.join(FORMATS)}: it holds "
            f"{shown(sorted(names)[:8])}; name the file"
        )
    return _read_file(os.path.join(path, inside[0]), model, allow_pickle)


def _read_file(
    path: str, model: Any, allow_pickle: bool
) -> tuple[str, dict[str, dict[str, Lora]], str | None]:
    if not os.path.lexists(path):
        raise AdapterFormatError(f"{shown(path)}: there is no such file or folder")
    stored = open_stored(path, allow_pickle)
    names = list(stored.tensors)
    if kohya.is_kohya(names):
        return "kohya", kohya.read(stored, model), None
    if diffusers.is_diffusers(names):
        return "diffusers", diffusers.read(stored), None
    if path.endswith(".pt"):
        config = read_json(os.path.join(os.path.dirname(os.path.abspath(path)), CONFIG_NAME))
        base = config.get("base_model_name_or_path")
        parts = torchtune.read(stored, config, config_of(model))
        return "torchtune", parts, base if isinstance(base, str) else None
    raise AdapterFormatError(
        f"{stored.where}: its tensors ({shown(sorted(names)[:3])}) are called as in none of "
        f"{', '.join(FORMATS)}; a file of PEFT or mlx-lm is given as the folder that holds it"
    )


def _to_peft(
    parts: Mapping[str, Mapping[str, Lora]],
    target: str,
    base: str | None,
    source: str,
    overwrite: bool,
) -> tuple[str, ...]:
    folders = {component: os.path.join(target, component) for component in parts}
    if set(parts) == {""}:
        folders = {"": target}
    for folder in folders.values():
        if os.path.lexists(folder) and not overwrite:
            raise OutputExistsError(f"{folder!r} exists; give another path, or overwrite=True")
        os.makedirs(os.path.dirname(folder), exist_ok=True)
    for component, modules in parts.items():
        peft.write(folders[component], modules, base, source, overwrite)
    return tuple(folders.values())


def _to_others(
    parts: Mapping[str, Mapping[str, Lora]],
    target: str,
    to: str,
    model: Any,
    base: str | None,
    overwrite: bool,
) -> tuple[str, ...]:
    if to == "kohya":
        if not target.endswith(".safetensors"):
            raise MethodError(f"{shown(target)}: kohya's format is one file, NAME.safetensors")
        content = _safetensors(kohya.write(parts))
        if os.path.lexists(target) and not overwrite:
            raise OutputExistsError(f"{target!r} exists; give another path, or overwrite=True")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write_file(target, content)
        return (target,)
    files: dict[str, bytes]
    if to == "diffusers":
        files = {diffusers.FILE: _safetensors(diffusers.write(parts))}
    elif to == "mlx":
        tensors, config = mlx.write(parts, base)
        files = {mlx.FILE: _safetensors(tensors), CONFIG_NAME: _json(config)}
    else:
        tensors, config = torchtune.write(parts, config_of(model))
        config = {**config, "base_model_name_or_path": base}
        files = {torchtune.FILE: _pickle(tensors), CONFIG_NAME: _json(config)}
    first = next(iter(files))
    kind = Kind(f"a LoRA in the format of {to}", first, lambda _: (*files, "README.md"))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with StagedFolder(target, overwrite=overwrite, kind=kind) as folder:
        for name, content in files.items():
            folder.write(name, content)
        folder.publish()
    return (target,)


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(own, metadata={"format": "pt"})


def _pickle(tensors: Mapping[str, Tensor]) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    torch.save(dict(tensors), buffer)
    return buffer.getvalue()


def _json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
