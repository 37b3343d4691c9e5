"""Tensors of the wrong name, shape, dtype or value."""

# ruff: noqa: E501  a case per line

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from .build import (
    PREFIX,
    QA,
    QB,
    WEIGHTS,
    Case,
    Q,
    Raw,
    accept,
    changed,
    files,
    good_config,
    good_tensors,
    module,
    pair,
    random,
    raw,
    refuse,
    scaled,
    warn,
    with_tensors,
    write,
)

ONES = raw(np.ones((4, 16)))


def stray(
    name: str, tensor: str, *words: str, shape: tuple[int, ...] = (4, 16), **config: object
) -> Case:
    return refuse(
        "tensors",
        name,
        with_tensors({tensor: raw(np.ones(shape))}, **config),
        WEIGHTS,
        tensor,
        *words,
    )


def shaped(name: str, a: tuple[int, ...], b: tuple[int, ...], *words: str) -> Case:
    changes = {QA: raw(np.ones(a)), QB: raw(np.ones(b))}
    return refuse("tensors", name, with_tensors(changes), "q_proj", *(words or (WEIGHTS,)))


def value(name: str, number: float, which: str = QA, dtype: str = "F32") -> Case:
    tensors = good_tensors(dtype=dtype)
    shape = tensors[which].shape
    values = np.zeros(shape)
    values[-1, 1] = number
    return refuse(
        "numbers",
        name,
        files(weights=tensors | {which: raw(values, dtype)}),
        which,
        "NaN or infinite",
    )


def typed(dtype: str) -> Case:
    return refuse(
        "tensors",
        f"factors of {dtype}",
        with_tensors({QA: raw(np.ones((4, 16)), dtype)}),
        QA,
        "dtype",
    )


def renamed(old: str, new: str) -> dict[str, Raw]:
    return {name.replace(old, new): tensor for name, tensor in good_tensors().items()}


def beside(name: str, content: bytes) -> Callable[[Path], None]:
    """The good adapter with another file in its folder."""

    def build(folder: Path) -> None:
        write(folder)
        (folder / name).write_bytes(content)

    return build


def bombs(count: int, config: dict[str, object]) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        tensors: dict[str, Raw] = {}
        one = raw(np.ones((1, 1)))
        for i in range(count // 2):
            for part in "AB":
                tensors[
                    f"{PREFIX}model.layers.{i // 400}.mlp.experts.{i % 400}.up_proj.lora_{part}.weight"
                ] = one
        write(folder, config, tensors)

    return build


EMBED = {
    PREFIX + "model.embed_tokens.lora_embedding_A": random((4, 32), 50),
    PREFIX + "model.embed_tokens.lora_embedding_B": random((16, 4), 51),
}
CONV = {
    PREFIX + "conv.lora_A.weight": random((4, 3, 3, 3), 52),
    PREFIX + "conv.lora_B.weight": random((8, 4, 1, 1), 53),
}
HEAD = {PREFIX + "lm_head.weight": random((32, 16), 54)}
BOTH = ["q_proj", "v_proj"]
CASES = [
    stray("a norm of the base", PREFIX + "model.norm.weight", "base model", shape=(16,)),
    stray("a matrix of the base", PREFIX + "model.layers.0.mlp.down_proj.weight", "base model", shape=(16, 16)),
    stray("a base layer", Q + ".base_layer.weight", "base model", shape=(16, 16)),
    stray("a base layer's bias", Q + ".base_layer.bias", "base model", shape=(16,)),
    stray("the adapted weight itself", Q + ".weight", "base model", shape=(16, 16)),
    stray("a bias of the base", Q + ".bias", "bias", shape=(16,)),
    accept("tensors", "embeddings of a resized base", with_tensors({PREFIX + "model.embed_tokens.weight": random((32, 16), 55)})),
    accept("tensors", "lm_head, not declared", with_tensors(HEAD)),
    stray("a module in lm_head", PREFIX + "lm_head.dense.weight", "base model", shape=(32, 16)),
    stray("a tensor of an embedding that is no weight", PREFIX + "model.embed_tokens.scale", "base "
                                                                                             "model"),
    stray("a copy of a base layer that is no embedding", Q + ".base_layer.weight", "base model"),
    stray("a head where another is declared", PREFIX + "score.weight", "base model", modules_to_save=["lm_head"]),
    stray("a name without prefix", "model.norm.weight", "begin with", shape=(16,)),
    stray("a factor without prefix", module(0, "q_proj") + ".lora_A.weight", "begin with"),
    stray("another adapter's factor", Q + ".lora_A.victim.weight"),
    stray("the default adapter's factor", Q + ".lora_A.default.weight"),
    refuse("tensors", "another adapter's module", with_tensors({name.replace(".weight", ".victim.weight"): tensor for name, tensor in pair(module(1, "k_proj"), 8, 16).items()}, target_modules=[*BOTH, "k_proj"]), "another adapter"),
    refuse("tensors", "two adapters", files(weights=renamed(".weight", ".a.weight") | {name.replace(".weight", ".b.weight"): tensor for name, tensor in good_tensors(1).items()}), "spelling"),
    stray("a magnitude without DoRA", Q + ".lora_magnitude_vector", "DoRA", shape=(16,)),
    stray("a magnitude with weight", Q + ".lora_magnitude_vector.weight", "DoRA", shape=(16,)),
    stray("a bias of lora_B", Q + ".lora_B.bias", "lora_bias", shape=(16,)),
    stray("lora_C", Q + ".lora_C.weight"),
    stray("lora_A alone", Q + ".lora_A", "not part"),
    stray("lora_a in small letters", Q + ".lora_a.weight"),
    stray("lora_A of a lora_A", QA.replace(".weight", ".lora_A.weight")),
    stray("an AdaLoRA tensor", Q + ".lora_E", "AdaLoRA"),
    stray("a LoHa tensor", Q + ".hada_w1_a", "another method"),
    stray("an IA3 tensor", Q + ".ia3_l", "another method"),
    stray("a kohya tensor", "lora_unet_mid_block.lora_down.weight", "kohya"),
    stray("trained tokens", PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta", "token"),
    stray("an optimiser's state", "optimizer.state.0.exp_avg"),
    stray("a second prefix", PREFIX + PREFIX + module(0, "k_proj") + ".lora_A.weight"),
    stray("two dots", PREFIX + "model..layers.0.q_proj.lora_A.weight"),
    stray("a path", PREFIX + "../../etc/passwd"),
    stray("letters of another alphabet", PREFIX + "model.layers.0.self_attn.ԛ_proj.lora_A.weight", "non-ASCII"),
    stray("layer 99, one half", PREFIX + module(99, "q_proj") + ".lora_A.weight", "lora_B"),
    stray("a module that target_modules does not name", PREFIX + module(0, "k_proj") + ".lora_A.weight"),
    refuse("tensors", "kohya names", files(weights=renamed("lora_A", "lora_down")), WEIGHTS, "lora_down"),
    refuse("tensors", "wrong prefix", files(weights=renamed("base_model.", "")), WEIGHTS, "begin "
                                                                                          "with"),
    refuse("tensors", "diffusers prefix", files(weights=renamed("base_model.model", "unet")), WEIGHTS, "unet"),
    accept("tensors", "names of a live model", files(weights=renamed(".weight", ".default.weight")), truth="good"),
    refuse("tensors", "A without B", with_tensors({QB: None}), QA, "lora_B"),
    refuse("tensors", "B without A", with_tensors({QA: None}), QB, "lora_A"),
    refuse("tensors", "a module behind a second prefix", with_tensors(pair(PREFIX + module(0, "q_proj"), 16, 16)), "twice"),
    refuse("tensors", "half a file", with_tensors(dict.fromkeys(list(good_tensors())[4:]), target_modules=["q_proj", "v_proj", "k_proj"]), "k_proj"),
    refuse("tensors", "all B missing", with_tensors({name: None for name in good_tensors() if "lora_B" in name}), "lora_B"),
    refuse("tensors", "a second module at rank 2", with_tensors(pair(module(1, "q_proj"), 16, 16, 2)), "rank 2"),
    refuse("tensors", "linear and embedding factors of one module", with_tensors(EMBED | pair("model.embed_tokens", 16, 32), target_modules=[*BOTH, "embed_tokens"]), "embed_tokens", "not of an embedding"),
    refuse("tensors", "a module as two versions of transformers spell it", with_tensors(pair("vit.encoder.layer.0.attention.attention.query", 16, 16) | pair("vit.layers.0.attention.q_proj", 16, 16), target_modules=[*BOTH, "query"]), "query", "belong to one module"),
    warn("tensors", "a copy of an adapted embedding", with_tensors(EMBED | {PREFIX + "model.embed_tokens.base_layer.weight": random((32, 16), 56)}, target_modules=[*BOTH, "embed_tokens"]), "copies of the base's weight", "embed_tokens"),
    refuse("tensors", "a saved head in two spellings", with_tensors(HEAD | {PREFIX + "lm_head.modules_to_save.weight": HEAD[PREFIX + "lm_head.weight"]}, modules_to_save=["lm_head"]), "another spelling"),
    refuse("tensors", "a saved head's original", with_tensors(HEAD | {PREFIX + "lm_head.original_module.weight": HEAD[PREFIX + "lm_head.weight"]}, modules_to_save=["lm_head"]), "original_module"),
    refuse("tensors", "a saved head under two names", with_tensors(HEAD | {PREFIX + "language_model.lm_head.weight": HEAD[PREFIX + "lm_head.weight"]}, modules_to_save=["lm_head"]), "two spellings"),
    shaped("ranks of A and B differ", (4, 16), (16, 5), "rank 4"),
    shaped("A is transposed", (16, 4), (16, 4), "rank"),
    shaped("A has no dimension", (), (16, 4)),
    shaped("A has one dimension", (64,), (16, 4)),
    shaped("A has three dimensions", (4, 16, 1), (16, 4)),
    refuse("tensors", "rank 0", with_tensors({QA: raw(np.ones((0, 16))), QB: raw(np.ones((16, 0)))}), "q_proj", "empty"),
    shaped("rank above the shape, and above r", (17, 16), (16, 17), "rank 17"),
    accept("tensors", "rank above the shape", with_tensors(pair("model.layers.0.gate", 1, 16), target_modules=[*BOTH, "gate"])),
    shaped("a kernel in B", (4, 16, 3), (16, 4, 3), "kernel"),
    shaped("a grouped convolution", (4, 16, 3), (16, 2, 1), "grouped"),
    shaped("six dimensions", (4, 16, 1, 1, 1, 1), (16, 4, 1, 1, 1, 1)),
    shaped("rank 8 where r is 4", (8, 16), (16, 8), "rank 8"),
    shaped("rank 1 where r is 4", (1, 16), (16, 1), "rank 1"),
    *(accept("tensors", f"factors of {dtype}", with_tensors({QA: raw(np.zeros((4, 16)), dtype)})) for dtype in ("F8_E4M3", "F8_E5M2")),
    *(typed(dtype) for dtype in ("I64", "I32", "I8", "U8", "BOOL", "C64")),
    warn("tensors", "float64", files(weights=good_tensors(dtype="F64")), "float64"),
    warn("tensors", "gauge: A times 10^4, B over 10^4", files(weights=scaled(1e4, 1e-4)), "norm"),
    warn("tensors", "gauge: A over 10^4, B times 10^4", files(weights=scaled(1e-4, 1e4)), "norm"),
    value("NaN in A", float("nan")),
    value("NaN in B", float("nan"), QB),
    value("infinity in A", float("inf")),
    value("minus infinity in B", -float("inf"), QB),
    value("NaN in float16", float("nan"), QA, "F16"),
    value("infinity in bfloat16", float("inf"), QB, "BF16"),
    value("float64 that float32 cannot hold", 1e300, QA, "F64"),
    refuse("numbers", "NaN in a saved head", with_tensors({PREFIX + "lm_head.weight": raw(np.full((32, 16), np.nan))}, modules_to_save=["lm_head"]), "lm_head", "NaN"),
    refuse("numbers", "a product that overflows", files(weights=scaled(1e25, 1e25)), "not finite"),
    refuse("numbers", "a scaled factor that overflows", with_tensors({QB: raw(np.full((16, 4), 3e38))}), "not finite"),
    accept("numbers", "denormals", files(weights=scaled(1.0, 1e-40))),
    accept("numbers", "denormals in both", files(weights=scaled(1e-39, 1e-39))),
    accept("numbers", "large numbers", files(weights=scaled(1e15, 1e15))),
    accept("numbers", "minus zero", with_tensors({QB: raw(np.full((16, 4), -0.0))})),
    accept("tensors", "a zero adapter", files(weights=scaled(1.0, 0.0))),
    accept("tensors", "float16", files(weights=good_tensors(dtype="F16"))),
    accept("tensors", "bfloat16", files(weights=good_tensors(dtype="BF16"))),
    accept("tensors", "A in float16, B in float32", files(weights=good_tensors() | {QA: random((4, 16), 60, dtype="F16")})),
    accept("tensors", "rank 1", files(good_config(r=1), good_tensors(rank=1))),
    accept("tensors", "rank as large as the shape", files(good_config(r=8, target_modules=["v_proj"]), pair(module(0, "v_proj"), 8, 16, 8))),
    accept("tensors", "an embedding", with_tensors(EMBED, target_modules=[*BOTH, "embed_tokens"])),
    accept("tensors", "a convolution", with_tensors(CONV, target_modules=[*BOTH, "conv"])),
    accept("tensors", "one module", files(good_config(target_modules=["v_proj"]), pair(module(1, "v_proj"), 8, 16))),
    accept("tensors", "a saved head", with_tensors(HEAD, modules_to_save=["lm_head"])),
    accept("tensors", "46,000 factors of 1 x 1", bombs(46_000, good_config(r=1, target_modules=["up_proj"]))),
    refuse("tensors", "66,000 factors of 1 x 1 with the wrong r", bombs(66_000, good_config(target_modules=["up_proj"])), "rank 1"),
    accept("tensors", "the good adapter", changed()),
    warn("tensors", "weights that nobody reads", beside("value_head.safetensors", b"\0" * 8), "value_head.safetensors"),
    warn("tensors", "the original LLaVA's config without its projector", beside("config.json", b'{"model_type": "llava_llama"}'), "non_lora_trainables.bin"),
]  # fmt: skip
