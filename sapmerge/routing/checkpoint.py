"""What a routed composition is on disk: its config, made and read back with checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, MethodError
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import shown
from sapmerge.io.routed import ROUTED
from sapmerge.merging.stream import AdapterLayers
from sapmerge.routing.live import Stack
from sapmerge.routing.routers import ArrowRouter, FixedRouter, LearnedRouter, Router

__all__ = ["adapters_of", "card_of", "config_of", "router_of", "router_settings", "states_of"]

_FORMAT = 1
_KINDS: Mapping[str, Callable[..., Router]] = {
    "fixed": FixedRouter,
    "arrow": ArrowRouter,
    "learned": LearnedRouter,
}
_CONFIG = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out")


def config_of(
    stream: AdapterLayers, router: Router, base: tuple[str | None, str | None]
) -> dict[str, object]:
    """What routed.json says. Adapters in the order of the columns of the router's tensors.

    Raises:
        MethodError: the router is a class of the caller's, of which a file says nothing.
    """
    from sapmerge.version import __version__

    found = [adapter.config.get("auto_mapping") for adapter in stream.adapters]
    tasks = {adapter.task_type for adapter in stream.adapters}
    spelled = Counter(module.spelled for module in stream.modules.values())
    return {
        "format": _FORMAT,
        "sapmerge": __version__,
        "config": {
            "base_model_name_or_path": base[0],
            "revision": base[1],
            "task_type": tasks.pop() if len(tasks) == 1 else None,
            "auto_mapping": found[0] if all(one == found[0] for one in found) else None,
            "fan_in_fan_out": any(adapter.fan_in_fan_out for adapter in stream.adapters),
        },
        "adapters": [{"label": a.label, "digest": a.digest} for a in stream.adapters],
        "router": router_settings(router),
        "layers": {
            name: {
                "spelled": module.spelled if spelled[module.spelled] == 1 else name,
                "ranks": [
                    a.modules[name].rank if name in a.modules else 0 for a in stream.adapters
                ],
            }
            for name, module in stream.modules.items()
        },
    }


def router_settings(router: Router) -> dict[str, object]:
    """The kind of a router and its settings, as JSON; the weights of a `FixedRouter` are in its
    state.
    """
    kind = next((name for name, cls in _KINDS.items() if type(router) is cls), None)
    if kind is None:
        raise MethodError(
            "a checkpoint holds a FixedRouter, an ArrowRouter or a LearnedRouter; this router is "
            f"a {type(router).__name__}, which a file cannot say"
        )
    settings = {} if kind == "fixed" else asdict(cast("ArrowRouter | LearnedRouter", router))
    return {"kind": kind, **settings}


def card_of(config: Mapping[str, Any]) -> str:
    """README.md."""
    labels = [entry["label"] for entry in config["adapters"]]
    return "\n".join(
        [
            "# Routed LoRA adapters",
            "",
            f"Made by sapmerge {config['sapmerge']} from {len(labels)} adapters, "
            f"{len(config['layers'])} layers.",
            "It is no PEFT checkpoint: a router mixes the adapters for every token.",
            "",
            "```",
            *(f"{entry['label']}  sha256 {entry['digest'][:16]}" for entry in config["adapters"]),
            f"router  {config['router']['kind']}",
            "```",
            "",
            "`sapmerge.Routed.load(path).attach(model)` puts them into the base model; "
            "`sapmerge.Routed.load(path).fold(weights)` makes one plain adapter.",
            "",
        ]
    )


def router_of(config: Mapping[str, Any], states: Mapping[str, Tensor], where: str) -> Router:
    """The router that a file describes.

    Raises:
        AdapterFormatError: it describes none.
    """
    given = config.get("router")
    if not isinstance(given, dict):
        _fail(where, "'router' is no object")
    settings = dict(cast("dict[str, Any]", given))
    kind = settings.pop("kind", None)
    if kind not in _KINDS:
        _fail(where, f"the router is of kind {shown(kind)}; expected {', '.join(_KINDS)}")
    if kind == "fixed":
        values = next(iter(states.values())).flatten()
        settings |= {"weights": dict(zip(_labels(config, where), map(float, values)))}
    try:
        return _KINDS[kind](**settings)
    except (TypeError, MethodError) as error:
        _fail(where, f"the settings of the router are wrong: {error}")


def adapters_of(
    config: Mapping[str, Any], factors: Mapping[str, Tensor], where: str
) -> list[Adapter]:
    """One adapter in memory for each that went in, read as any stranger's is.

    Raises:
        AdapterFormatError: the config is not of the form that sapmerge writes, or does not fit the
            tensors.
        AdapterConfigError: as for `Adapter.load`.
    """
    labels, layers = _labels(config, where), _layers(config, where)
    wanted = {f"{name}.{part}" for name in layers for part in "AB"}
    if wanted != set(factors):
        odd = sorted(wanted ^ set(factors))[0]
        _fail(where, f"the factors and the config do not agree on {shown(odd)}")
    states: list[dict[str, Tensor]] = [{} for _ in labels]
    patterns: list[dict[str, int]] = [{} for _ in labels]
    for name, (spelled, ranks) in layers.items():
        A, B = factors[f"{name}.A"], factors[f"{name}.B"]
        if len(ranks) != len(labels) or A.ndim != 2 or B.ndim != 2:
            _fail(where, f"layer {shown(name)} needs one rank per adapter, and two matrices")
        if not sum(ranks) == A.shape[0] == B.shape[1]:
            _fail(where, f"layer {shown(name)}: the ranks {ranks} do not fit A {tuple(A.shape)}")
        start = 0
        for state, pattern, rank in zip(states, patterns, ranks):
            if rank:
                mine = slice(start, start + rank)
                state[f"base_model.model.{spelled}.lora_A.weight"] = A[mine]
                state[f"base_model.model.{spelled}.lora_B.weight"] = B[:, mine]
                pattern[spelled] = rank
                start += rank
    names = {spelled: name for name, (spelled, _) in layers.items()}
    return [
        _adapter(config, label, state, pattern, names, where)
        for label, state, pattern in zip(labels, states, patterns)
    ]


def _adapter(
    config: Mapping[str, Any],
    label: str,
    state: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    names: Mapping[str, str],
    where: str,
) -> Adapter:
    given = config.get("config")
    if not isinstance(given, dict) or set(cast("dict[str, object]", given)) != set(_CONFIG):
        _fail(where, f"'config' has exactly {', '.join(_CONFIG)}")
    if not ranks:
        _fail(where, f"adapter {shown(label)} has no layer")
    most = max(ranks.values())
    odd = {f"^{_escaped(name)}": rank for name, rank in ranks.items() if rank != most}
    made = {
        **cast("dict[str, object]", given),
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
    }
    adapter = Adapter.from_state_dict(made, state, label=label)
    return adapter.respelled(
        {m.name: names[m.spelled] for m in adapter.modules.values() if names[m.spelled] != m.name}
    )


def states_of(
    config: Mapping[str, Any], stacks: Mapping[str, Stack], states: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Layer -> the router's tensor, of the right shape.

    Raises:
        AdapterFormatError: one is missing, or has another shape.
    """
    count = len(_labels(config, where))
    fixed = cast("dict[str, object]", config["router"]).get("kind") == "fixed"
    if set(states) != set(stacks):
        odd = sorted(set(states) ^ set(stacks))[0]
        _fail(where, f"the router and the factors do not agree on the layer {shown(odd)}")
    for name, state in states.items():
        wanted = (count,) if fixed else (count, stacks[name].A.shape[1])
        if tuple(state.shape) != wanted:
            _fail(
                where, f"the router has {tuple(state.shape)} for {shown(name)}; expected {wanted}"
            )
    return {name: states[name].to(torch.float32) for name in stacks}


def _labels(config: Mapping[str, Any], where: str) -> list[str]:
    if config.get("format") != _FORMAT:
        _fail(
            where, f"format {shown(config.get('format'))}; this version of sapmerge reads {_FORMAT}"
        )
    entries = config.get("adapters")
    labels: list[object] = [
        cast("dict[str, object]", entry).get("label") if isinstance(entry, dict) else None
        for entry in (cast("list[object]", entries) if isinstance(entries, list) else [])
    ]
    if (
        not labels
        or not all(isinstance(label, str) for label in labels)
        or len(set(labels)) < len(labels)
    ):
        _fail(where, "'adapters' is a list of objects with labels, each there once")
    return cast("list[str]", labels)


def _layers(config: Mapping[str, Any], where: str) -> dict[str, tuple[str, list[int]]]:
    """Layer -> how it is spelled, and the rank of every adapter there."""
    found: dict[str, tuple[str, list[int]]] = {}
    layers = config.get("layers")
    for name, entry in (cast("dict[str, Any]", layers) if isinstance(layers, dict) else {}).items():
        table = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        spelled, ranks = table.get("spelled"), table.get("ranks")
        fine = (
            isinstance(spelled, str)
            and isinstance(ranks, list)
            and set(table) == {"spelled", "ranks"}
        )
        if not fine or not all(type(r) is int and r >= 0 for r in cast("Sequence[object]", ranks)):
            _fail(where, f"layer {shown(name)} has a name as it is spelled, and a list of ranks")
        found[name] = cast("str", spelled), cast("list[int]", ranks)
    spellings = [spelled for spelled, _ in found.values()]
    if not found or len(set(spellings)) < len(spellings):
        _fail(where, "'layers' is an object of layers, each spelled in another way")
    return found


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _fail(where: str, problem: str) -> NoReturn:
    raise AdapterFormatError(
        f"{where}, {ROUTED}: {problem}; it was not written by sapmerge, or was changed"
    )
