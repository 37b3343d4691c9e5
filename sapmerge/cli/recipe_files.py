"""`sapmerge merge recipe.yaml`: a merge written down, as mergekit's users know it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, cast

from sapmerge.cli.choices import DTYPES, ENGINES, LOSSES, MODEL_DTYPES, SPELLINGS
from sapmerge.cli.recipes import method_of
from sapmerge.errors import MethodError, not_one_of, printable

__all__ = ["chosen_method", "dump_recipe", "is_recipe", "read_recipe"]

_TEXT, _NUMBER = (str,), (int, float)
_KEYS: Mapping[str, tuple[type, ...]] = {
    "adapters": (list,),
    "method": _TEXT,
    "parameters": (dict,),
    "modules": (dict,),
    "scale": _NUMBER,
    "rank": (int, float, str),
    "base": _TEXT,
    "modules_to_save": (str, dict),
    "names": _TEXT,
    "serving": _TEXT,
    "dtype": _TEXT,
    "uniform_rank": (bool,),
    "anchors": (dict,),
}
_OF_ADAPTERS: Mapping[str, tuple[type, ...]] = {
    "path": _TEXT,
    "label": _TEXT,
    "weight": _NUMBER,
    "revision": _TEXT,
}
_OF_ANCHORS: Mapping[str, tuple[type, ...]] = {
    "folder": _TEXT,
    "model": _TEXT,
    "loss": _TEXT,
    "batch_size": (int,),
    "device": _TEXT,
    "dtype": _TEXT,
    "cache": _TEXT,
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "names": SPELLINGS,
    "serving": ENGINES,
    "dtype": DTYPES,
}
_ANCHOR_CHOICES: Mapping[str, tuple[str, ...]] = {"loss": LOSSES, "dtype": MODEL_DTYPES}
_THEIRS = {
    "models": "adapters",
    "model": "path",
    "merge_method": "method",
    "base_model": "base",
    "out_dtype": "dtype",
    "weights": "adapters: [{path: ..., weight: ...}]",
    "density": "parameters: {density: ...}",
}
"""What mergekit and others call our keys."""


def is_recipe(adapters: Sequence[str]) -> bool:
    """Whether the arguments are one file with a recipe."""
    return len(adapters) == 1 and adapters[0].lower().endswith((".yaml", ".yml"))


def read_recipe(options: argparse.Namespace) -> None:
    """Fill in what the file says and no flag does. Paths are seen from the working folder.

    Raises:
        MethodError: no file, no YAML, an unknown key, or a value of a wrong kind; it names the key.
    """
    # Not an extra: huggingface_hub requires PyYAML, and peft, a dependency of ours, requires that.
    import yaml

    name = options.adapters[0]
    try:
        with open(name, encoding="utf-8") as file:
            found: object = yaml.safe_load(file)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise MethodError(f"the recipe {printable(name)} cannot be read: {text}") from None
    recipe = _checked(found, _KEYS, f"the recipe {printable(name)}", _CHOICES)
    if not recipe.get("adapters"):
        raise MethodError(f"the recipe {printable(name)} names no adapters")
    entries = [_entry(one, name) for one in recipe["adapters"]]
    options.adapters = [_argument(one, name) for one in entries]
    labelled = [one for one in entries if "label" in one]
    if labelled and len(labelled) < len(entries):
        raise MethodError(f"the recipe {printable(name)}: label all adapters, or none")
    if options.weights is None and any("weight" in one for one in entries):
        options.weights = [float(one.get("weight", 1.0)) for one in entries]
    anchors = _checked(
        recipe.get("anchors", {}), _OF_ANCHORS, f"{printable(name)}, anchors", _ANCHOR_CHOICES
    )
    said = {
        "method": recipe.get("method"),
        "parameters": recipe.get("parameters"),
        "modules": recipe.get("modules"),
        "rank": recipe.get("rank"),
        "base_model": recipe.get("base"),
        "modules_to_save": recipe.get("modules_to_save"),
        "names": recipe.get("names"),
        "serving": recipe.get("serving"),
        "save_dtype": recipe.get("dtype"),
        "uniform_rank": recipe.get("uniform_rank"),
        "anchors": anchors.pop("folder", None),
        **anchors,
    }
    for key, value in said.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.scale == 1.0:
        options.scale = float(recipe.get("scale", 1.0))


def chosen_method(options: argparse.Namespace) -> Any:
    """The method of flags or recipe; None for the default with anchors."""
    arguments = _parameters(options)
    if options.method is None:
        if arguments or options.modules:
            raise MethodError(
                "--density, --seed, parameters and modules go with a method: add --method NAME"
            )
        return None
    method = method_of(options.method, arguments)
    if not options.modules:
        return method
    from sapmerge import ByModule

    table = {pattern: method_of(str(text), {}) for pattern, text in options.modules.items()}
    return ByModule(table, default=method)


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Of the method: what the file says, and the flags before it."""
    found: dict[str, Any] = dict(options.parameters or {})
    given: dict[str, Any] = {"density": options.density, "seed": options.seed}
    return found | {key: value for key, value in given.items() if value is not None}


def dump_recipe(options: argparse.Namespace, path: str) -> None:
    """Write the call as a file that `read_recipe` reads.

    Raises:
        MethodError: the file cannot be written.
    """
    import yaml

    weights = options.weights
    if isinstance(weights, str):
        from sapmerge.cli.arguments import weights_of

        weights = weights_of(weights)
    entries = list[dict[str, Any]]()
    for number, argument in enumerate(options.adapters):
        label, separator, folder = argument.partition("=")
        labelled = separator and not os.path.lexists(argument)
        entry = {"path": folder, "label": label} if labelled else {"path": argument}
        if weights is not None:
            by_label = isinstance(weights, dict)
            name = label if labelled else os.path.basename(os.path.normpath(argument))
            entry["weight"] = weights[name] if by_label else weights[number]
        entries.append(entry)
    anchors = {
        "folder": options.anchors,
        **{key: getattr(options, key) for key in _OF_ANCHORS if key != "folder"},
    }
    recipe: dict[str, Any] = {
        "adapters": entries,
        "method": options.method,
        "parameters": _parameters(options),
        "modules": options.modules,
        "scale": options.scale,
        "rank": options.rank,
        "base": options.base_model,
        "modules_to_save": options.modules_to_save,
        "names": options.names,
        "serving": options.serving,
        "dtype": options.save_dtype,
        "uniform_rank": options.uniform_rank,
        "anchors": {key: value for key, value in anchors.items() if value is not None},
    }
    kept = {key: value for key, value in recipe.items() if value is not None and value != {}}
    try:
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(kept, file, sort_keys=False, allow_unicode=True)
    except OSError as error:
        raise MethodError(f"--dump-recipe {printable(path)}: {error.strerror or error}") from None


def _checked(
    found: object,
    keys: Mapping[str, tuple[type, ...]],
    where: str,
    choices: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise MethodError(f"{where}: expected keys and values, e.g. {next(iter(keys))}: ...")
    table = cast("dict[Any, Any]", found)
    for key, value in table.items():
        if key not in keys:
            close = get_close_matches(str(key), list(keys), 1)
            meant = _THEIRS.get(str(key)) or (close[0] if close else "")
            hint = f"did you mean {meant}?" if meant else f"the keys are {', '.join(keys)}"
            raise MethodError(f"{where}: unknown key {printable(str(key))!r}; {hint}")
        if not isinstance(value, keys[key]) or (isinstance(value, bool) and bool not in keys[key]):
            kinds = " or ".join(kind.__name__ for kind in keys[key])
            raise MethodError(f"{where}: {key} is a {kinds}; got {printable(str(value)[:80])!r}")
        if key in choices and value not in choices[key]:
            raise MethodError(not_one_of(f"{where}: {key}", value, choices[key]))
    return dict(table)


def _entry(one: object, name: str) -> dict[str, Any]:
    if isinstance(one, str):
        return {"path": one}
    entry = _checked(one, _OF_ADAPTERS, f"{printable(name)}, adapters")
    if "path" not in entry:
        raise MethodError(f"{printable(name)}, adapters: an entry has no path")
    return entry


def _argument(entry: Mapping[str, Any], name: str) -> str:
    text: str = entry["path"]
    if "revision" in entry:
        if not text.startswith("hf://"):
            raise MethodError(
                f"{printable(name)}, adapters: {printable(text)!r} is a folder, which has no "
                "revision; write hf://user/name for the Hub"
            )
        text = f"{text}@{entry['revision']}"
    return f"{entry['label']}={text}" if "label" in entry else text
