"""What an output says about itself: its config and its metadata."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sapmerge.io.kinds.experts import WRITTEN_BY
from sapmerge.merging.inputs import in_content_order
from sapmerge.merging.run import Run
from sapmerge.models import tensor_name

__all__ = ["config_of", "metadata_of"]

_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


def config_of(
    run: Run, ranks: Mapping[str, int], parameters: Sequence[str], names: Mapping[str, str]
) -> dict[str, Any]:
    """An adapter_config.json from nothing: r = alpha everywhere, explicit modules,
    no trace of the inputs' settings.

    Args:
        ranks: module or parameter, as the model spells it -> rank.
        parameters: those of them that are parameters (experts).
        names: canonical name -> the name that the model uses.
    """
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    plain = _told_apart(ranks)
    odd = {
        name if name in plain else "^" + re.escape(name): value
        for name, value in ranks.items()
        if value != rank
    }
    experts = (
        {"target_parameters": sorted(parameters), "peft_version": WRITTEN_BY} if parameters else {}
    )
    return {
        "peft_type": "LORA",
        "task_type": _task(run),
        "base_model_name_or_path": run.base.name,
        "revision": run.base.revision,
        "auto_mapping": _auto_mapping(run),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(set(ranks) - set(parameters)),
        "modules_to_save": _saved_modules(run, names) or None,
        "fan_in_fan_out": any(adapter.fan_in_fan_out for adapter in run.adapters),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **experts,
    }


def _auto_mapping(run: Run) -> object:
    """The class of the base, which AutoPeftModel needs where there is no task;
    copied where all inputs agree.
    """
    mappings = [adapter.config.get("auto_mapping") for adapter in run.adapters]
    return mappings[0] if all(one == mappings[0] for one in mappings) else None


def _told_apart(names: Collection[str]) -> set[str]:
    r"""Those that mean one module in `rank_pattern` as they are, and need no regular expression;
    readers limit those.

    PEFT looks for `(.*\.)?name$`: it is the end of a module's name,
    and a dot in it stands for any letter.
    """
    count, alike = Counter[str](), defaultdict[int, dict[frozenset[int], set[str]]](dict)
    for name in names:
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            tail = name[start:]
            count[tail] += 1
            alike[len(tail)].setdefault(_dots(tail), set()).add(tail)

    def alone(name: str) -> bool:
        mine = _dots(name)
        # Where another one has all the dots of this one, only an equal one is meant.
        others = (
            tail for dots, tails in alike[len(name)].items() if not dots >= mine for tail in tails
        )
        return count[name] == 1 and not any(
            all(a in (".", b) for a, b in zip(name, tail)) for tail in others
        )

    return {name for name in names if _PLAIN.fullmatch(name) and alone(name)}


def _dots(name: str) -> frozenset[int]:
    return frozenset(place for place, letter in enumerate(name) if letter == ".")


def _saved_modules(run: Run, names: Mapping[str, str]) -> list[str]:
    """The saved modules as the model spells them, told by the names of their tensors."""
    modules: set[str] = set()
    for tensor in run.heads.chosen:
        module = next(module for module in run.heads.modules if tensor.startswith(f"{module}."))
        tail, spelled = tensor[len(module) :], tensor_name(tensor, names)
        modules.add(spelled.removesuffix(tail) if spelled.endswith(tail) else module)
    return sorted(modules)


def _task(run: Run) -> str | None:
    """The inputs' common task. PEFT refuses a checkpoint of a task with a head that does
    not hold the head.
    """
    tasks = {adapter.task_type for adapter in run.adapters}
    task = tasks.pop() if len(tasks) == 1 else None
    return (
        task if run.heads.modules or task not in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else None
    )


def metadata_of(
    run: Run, form: Mapping[str, object], said: Mapping[str, Any] | None
) -> dict[str, str]:
    """What an output says of its making.

    Args:
        form: how it was written, where that is not the usual way.
        said: of its anchors, see `anchored`.
    """
    from sapmerge.version import __version__

    inputs = [
        {"label": a.label, "digest": a.digest, "files": dict(a.files), "weight": weight}
        for a, weight in sorted(
            zip(run.adapters, run.weights, strict=True), key=lambda pair: in_content_order(*pair)
        )
    ]
    return {
        "sapmerge.version": __version__,
        "sapmerge.recipe": json.dumps(
            {**run.recipe, **({"written": form} if form else {})}, sort_keys=True
        ),
        "sapmerge.inputs": json.dumps(inputs, sort_keys=True),
        **({} if said is None else {"sapmerge.anchors": json.dumps(said, sort_keys=True)}),
    }
