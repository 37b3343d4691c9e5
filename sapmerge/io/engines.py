"""What engines that serve LoRA adapters make of a PEFT checkpoint: one table, read from their
sources.

An engine reads `adapter_config.json` in its own way: most apply one scaling to all modules and
know nothing of `rank_pattern`, `alpha_pattern` or rsLoRA. What it does not read it drops, often
without an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sapmerge.errors import MethodError
from sapmerge.io.adapter import Adapter
from sapmerge.io.modules import Module

__all__ = [
    "ENGINES",
    "NAMES_OF_KINDS",
    "NEW_TOWER",
    "TOWER",
    "Engine",
    "engine_of",
    "problems_in",
    "together",
]


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        title: how messages name it.
        versions: whose source was read.
        source: which files of it.
        load: how an output is loaded.
        ranks: the ranks that outputs get; empty for any.
        one_rank: whether all modules must have the same.
        scaling: "config": lora_alpha / r for all modules; "tensor": lora_alpha / the tensor's rank;
            "one": 1, the config is not read.
        rslora: whether `use_rslora` counts.
        kinds: of modules that it has an adapter for.
        groups: modules beside each other that must all have an adapter if one has.
        every_layer: whether a module must be adapted in all layers, or is dropped in all.
        towers: whether modules outside of the language model are read.
        older: whether a LLaVA's vision tower must be spelled as in transformers 4.
    """

    title: str
    versions: str
    source: str
    load: str
    ranks: tuple[int, ...] = ()
    one_rank: bool = False
    scaling: Literal["config", "tensor", "one"] = "config"
    rslora: bool = False
    kinds: frozenset[str] = frozenset({"linear"})
    groups: tuple[tuple[str, ...], ...] = ()
    every_layer: bool = False
    towers: bool = True
    older: bool = False


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_WITH_EMBEDDINGS = frozenset({"linear", "embedding"})
ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        "vLLM",
        "0.11, and lora_model.py of commit 0306474",
        "vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py",
        "vllm serve BASE --enable-lora --max-lora-rank R --lora-modules merged=OUT",
        ranks=(8, 16, 32, 64, 128, 256, 320, 512),
        rslora=True,
        kinds=_WITH_EMBEDDINGS,
        older=True,
    ),
    "sglang": Engine(
        "SGLang",
        "commits 002c60a and 0ceb81f",
        "python/sglang/srt/lora/lora.py, lora_config.py",
        "python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths merged=OUT",
        one_rank=True,
        groups=(_QKV, _GATE_UP),
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "commit 0b03ada",
        "convert_lora_to_gguf.py",
        "python convert_lora_to_gguf.py --base BASE OUT; llama-server -m BASE.gguf --lora OUT.gguf",
        scaling="tensor",
        kinds=_WITH_EMBEDDINGS,
        towers=False,
    ),
    "tgi": Engine(
        "TGI",
        "commit 45d95bd",
        "server/text_generation_server/adapters/lora.py",
        "text-generation-launcher --model-id BASE --lora-adapters merged=OUT",
        one_rank=True,
        rslora=True,
        every_layer=True,
    ),
    "diffusers": Engine(
        "diffusers",
        "0.42.1",
        "src/diffusers/loaders/peft.py",
        'pipe.transformer.load_lora_adapter("OUT", prefix="base_model.model", '
        'weight_name="adapter_model.safetensors")',
        scaling="one",
        kinds=frozenset({"linear", "conv"}),
    ),
}
NAMES_OF_KINDS = {
    "embedding": "a LoRA on embeddings",
    "conv": "a LoRA on a convolution",
    "in_proj": "a LoRA on nn.MultiheadAttention",
    "out_proj": "a LoRA on nn.MultiheadAttention",
    "parameter": "a LoRA on expert parameters (target_parameters)",
    "linear": "a LoRA on a Linear",
}
TOWER = re.compile(
    r"(?:.*\.)?(?:vision_tower|vision_model|visual|image_tower|audio_tower|video_tower|"
    r"mm_projector|multi_modal_projector)\..*"
)
NEW_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:encoder|embeddings)\..*")
_CLOSE = 1e-6
_LAYER = re.compile(r"(?P<before>.*\.(?:layers|h|blocks|block)\.)(?P<number>\d+)\.(?P<after>.+)")


def engine_of(name: str) -> Engine:
    """The engine of that name.

    Raises:
        MethodError: there is none in the table.
    """
    if name not in ENGINES:
        raise MethodError(
            f"serving={name!r} is no engine that is known; choose one of "
            f"{', '.join(map(repr, ENGINES))}"
        )
    return ENGINES[name]


def problems_in(adapter: Adapter, engine: Engine) -> list[str]:
    """What an engine refuses, drops or applies with another strength; empty if it serves the
    adapter as PEFT does.

    Headers and config only; no tensor is read.
    """
    found = list(_not_read(adapter, engine))
    for name, module in adapter.modules.items():
        found += ((what, name) for what in _of_module(module, adapter, engine))
    ranks = sorted({module.rank for module in adapter.modules.values()})
    if engine.one_rank and len(ranks) > 1:
        found.append((f"ranks differ ({ranks[0]} to {ranks[-1]}), and it takes one", ""))
    if engine.ranks and ranks and ranks[-1] > engine.ranks[-1]:
        found.append((f"rank {ranks[-1]} is above its largest, {engine.ranks[-1]}", ""))
    shapes = {m.spelled: m.shape for m in adapter.modules.values() if m.kind == "linear"}
    try:
        lacking = list(together(shapes, engine))
    except MethodError:
        lacking = [""]
    found += (("a module that must be adapted beside others is not", name) for name in lacking)
    return _gathered(found, engine)


def _not_read(adapter: Adapter, engine: Engine) -> Iterator[tuple[str, str]]:
    for tensor in adapter.saved:
        yield "a module saved whole (modules_to_save)", tensor.rpartition(".")[0]
    for vector in adapter.vectors.values():
        yield f"{vector.label}", vector.name


def _of_module(module: Module, adapter: Adapter, engine: Engine) -> Iterator[str]:
    if module.kind not in engine.kinds:
        yield NAMES_OF_KINDS[module.kind]
        return
    if module.method:
        yield f"an update that is no plain LoRA ({module.method})"
        return
    if not engine.towers and TOWER.fullmatch(module.spelled):
        yield "a module outside of the language model"
    if engine.older and NEW_TOWER.fullmatch(module.spelled):
        yield "a tower in the spelling of transformers 5, which it drops (names='transformers 4')"
    applied = _applied(module, adapter, engine)
    if not math.isclose(applied, module.scaling, rel_tol=_CLOSE):
        yield f"it applies {applied / module.scaling:.3g} of the strength"


def _applied(module: Module, adapter: Adapter, engine: Engine) -> float:
    """What an engine multiplies B A by."""
    if engine.scaling == "one":
        return 1.0
    r, alpha = adapter.settings.r, adapter.settings.alpha
    if engine.scaling == "tensor":
        return alpha / module.rank
    return alpha / (math.sqrt(r) if engine.rslora and adapter.settings.rslora else r)


def _gathered(found: list[tuple[str, str]], engine: Engine) -> list[str]:
    """One line per problem, with the first module that has it."""
    where: dict[str, list[str]] = {}
    for what, name in found:
        where.setdefault(what, []).append(name)
    return [
        f"{engine.title}: {what}"
        + (f": {names[0]!r}" if names[0] else "")
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in where.items()
    ]


def together(
    shapes: Mapping[str, tuple[int, int]],
    engine: Engine,
    known: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, tuple[int, int]]:
    """The modules that an engine wants an adapter for, and that have none, with the shapes of
    their weights: zeros serve.

    Args:
        shapes: adapted Linear modules -> (outputs, inputs).
        known: the same of all modules of the base, if it is at hand. Without it the base has as
            many layers as the adapters have, and the shape of a neighbour is that of its own kind
            in another layer, or of the one beside it.

    Raises:
        MethodError: the shape of a missing module cannot be told.
    """
    known = known or {}
    wanted: dict[str, tuple[int, int]] = {}
    if engine.every_layer:
        wanted |= _in_every_layer(shapes, known)
    for name in (*shapes, *wanted):
        holder, _, leaf = name.rpartition(".")
        for group in engine.groups:
            for other in group if leaf in group else ():
                beside = f"{holder}.{other}"
                if beside not in shapes:
                    wanted[beside] = _shape_of(beside, name, group, shapes, known)
    return wanted


def _in_every_layer(
    shapes: Mapping[str, tuple[int, int]], known: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[int, int]]:
    numbers: dict[str, set[str]] = {}  # list of layers -> their numbers
    for name in (*shapes, *known):
        found = _LAYER.fullmatch(name)
        if found is not None:
            numbers.setdefault(found["before"], set()).add(found["number"])
    wanted: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        found = _LAYER.fullmatch(name)
        for number in numbers[found["before"]] if found is not None else ():
            other = f"{found['before']}{number}.{found['after']}" if found is not None else ""
            if other not in shapes and (not known or other in known):
                wanted[other] = known.get(other, shape)
    return wanted


def _shape_of(
    missing: str,
    beside: str,
    group: tuple[str, ...],
    shapes: Mapping[str, tuple[int, int]],
    known: Mapping[str, tuple[int, int]],
) -> tuple[int, int]:
    if missing in known:
        return known[missing]
    leaf, stack = missing.rpartition(".")[2], re.sub(r"\d+", "*", missing)
    for name, shape in shapes.items():
        if re.sub(r"\d+", "*", name) == stack:
            return shape
    alike = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}
    twin = f"{missing.rpartition('.')[0]}.{alike.get(leaf, leaf)}"
    if twin in shapes:
        return shapes[twin]
    raise MethodError(
        f"{missing!r} must have an adapter because {beside!r} has one, and its shape is not known: "
        "give the base to the merge, model=..."
    )
