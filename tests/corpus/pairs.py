"""Two adapters, each fine, that may not belong together;
and one adapter on the model it claims to be for.
"""

# ruff: noqa: E501  a case per line

from __future__ import annotations

from pathlib import Path
from typing import Any

from .build import (
    PREFIX,
    Build,
    Case,
    accept,
    good_config,
    good_tensors,
    module,
    pair,
    random,
    refuse,
    warn,
    write,
)


def two(
    second: dict[str, object],
    tensors: Any = None,
    first: dict[str, object] | None = None,
    left: Any = None,
) -> Build:
    def build(folder: Path) -> None:
        write(folder / "a", good_config(**(first or {})), left)
        write(
            folder / "b",
            good_config(**second),
            good_tensors(seed=1) if tensors is None else tensors,
        )

    return build


def pairs(name: str, build: Build, *words: str) -> Case:
    return refuse("pairs", name, build, *words, action="merge")


def fine(name: str, build: Build) -> Case:
    return accept("pairs", name, build, action="merge")


def based(name: str, tensors: dict[str, Any], *words: str, **config: object) -> Case:
    def build(folder: Path) -> None:
        write(folder, good_config(**config), tensors)

    return refuse("pairs", name, build, *words, action="base")


WIDE = {**good_tensors(1), **pair(module(0, "q_proj"), 16, 24, seed=5)}
TALL = {**good_tensors(1), **pair(module(0, "v_proj"), 16, 16, seed=5)}
EMBED = {
    PREFIX + "model.embed_tokens.lora_embedding_A": random((4, 32), 50),
    PREFIX + "model.embed_tokens.lora_embedding_B": random((16, 4), 51),
}
LINEAR = pair("model.embed_tokens", 16, 32)
CONV = {
    PREFIX + "conv.lora_A.weight": random((4, 3, 3, 3), 52),
    PREFIX + "conv.lora_B.weight": random((8, 4, 1, 1), 53),
}
LONG = {
    PREFIX + "conv.lora_A.weight": random((4, 3, 9, 1), 52),
    PREFIX + "conv.lora_B.weight": random((8, 4, 1, 1), 53),
}
FLAT = pair("conv", 8, 27)
HEAD = {PREFIX + "lm_head.weight": random((32, 16), 54)}
LAYER0 = {name: tensor for name, tensor in good_tensors(1).items() if ".layers.0." in name}
LAYER1 = {name: tensor for name, tensor in good_tensors().items() if ".layers.1." in name}
QUERY = {name: tensor for name, tensor in good_tensors(1).items() if "q_proj" in name}
AT, CT = {"target_modules": ["embed_tokens"]}, {"target_modules": ["conv"]}
CASES = [
    pairs("different base models", two({"base_model_name_or_path": "evil/other-base"}), "base "
                                                                                        "models", "evil/other-base"),
    pairs("different revisions", two({"revision": "v2"}, first={"revision": "v1"}), "revisions"),
    pairs("a revision and none", two({"revision": "abc123"}), "revisions"),
    pairs("different inputs", two({}, WIDE), "q_proj"),
    pairs("different outputs", two({}, TALL), "v_proj"),
    pairs("an embedding and a linear layer", two(AT, LINEAR, AT, EMBED), "embed_tokens"),
    pairs("a convolution and a linear layer", two(CT, FLAT, CT, CONV), "conv"),
    pairs("different kernels", two(CT, LONG, CT, CONV), "conv"),
    pairs("a head in one", two({"modules_to_save": ["lm_head"]}, good_tensors(1) | HEAD), "lm_head"),
    pairs("a head in both", two({"modules_to_save": ["lm_head"]}, good_tensors(1) | HEAD, {"modules_to_save": ["lm_head"]}, good_tensors() | HEAD), "lm_head"),
    pairs("one is a DoRA", two({"use_dora": True}), "use_dora"),
    pairs("one is broken", two({}, b"version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    pairs("one is missing", lambda folder: write(folder / "a"), "local only"),
    based("another input", WIDE, "q_proj"),
    based("another output", TALL, "v_proj"),
    based("an output that broadcasts", good_tensors() | pair(module(0, "q_proj"), 1, 16, 1), "q_proj", rank_pattern={"layers.0.self_attn.q_proj": 1}),
    based("an input that broadcasts", good_tensors() | pair(module(0, "q_proj"), 16, 1, 1), "q_proj", rank_pattern={"layers.0.self_attn.q_proj": 1}),
    based("transposed", good_tensors() | pair(module(0, "v_proj"), 16, 8), "v_proj"),
    based("a layer that the model lacks", good_tensors() | pair(module(99, "q_proj"), 16, 16), "layers.99"),
    based("a module that the model lacks", good_tensors() | pair(module(0, "k_proj"), 16, 16), "k_proj", target_modules=["q_proj", "v_proj", "k_proj"]),
    based("a module without a weight", pair("model", 16, 16), "model", target_modules=["model"]),
    accept("pairs", "the model it is for", lambda folder: write(folder), action="base"),
    fine("the same base", two({})),
    fine("no base named in one", two({"base_model_name_or_path": None})),
    fine("main, and no revision", two({"revision": "main"})),
    fine("different ranks", two({"r": 2}, good_tensors(1, rank=2))),
    fine("different scalings", two({"use_rslora": True, "lora_alpha": 3})),
    fine("different dtypes", two({}, good_tensors(1, "BF16"))),
    warn(
        "pairs",
        "different layers",
        two({"layers_to_transform": [0]}, LAYER0, {"layers_to_transform": [1]}, LAYER1),
        "share no module",
        action="merge",
    ),
    fine("different modules", two({"exclude_modules": ["v_proj"]}, QUERY)),
    fine("patterns in one", two({"alpha_pattern": {"q_proj": 3}})),
    fine("the same adapter twice", two({}, good_tensors())),
    fine("different tasks", two({"task_type": None})),
]  # fmt: skip
