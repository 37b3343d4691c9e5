"""`adapter_config.json`: what is no JSON, wrong numbers, patterns that hang,
and configs that mean another adapter.
"""

# ruff: noqa: E501  a case per line

from __future__ import annotations

import json

import numpy as np

from .build import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Build,
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
    warn,
    with_tensors,
)

GOOD = json.dumps(good_config())


def text(name: str, config: bytes | str, *words: str) -> Case:
    raw_bytes = config if isinstance(config, bytes) else config.encode()
    return refuse("json", name, files(raw_bytes), CONFIG, *words)


def number(name: str, key: str, value: object, *words: str) -> Case:
    return refuse("numbers", name, changed(**{key: value}), CONFIG, key, *words)


def meaning(name: str, key: str, value: object, *words: str) -> Case:
    return refuse("meaning", name, changed(**{key: value}), CONFIG, key, *words)


BOTH = ["q_proj", "v_proj"]
LAYERS = [PREFIX + module(layer, part) for layer in (0, 1) for part in BOTH]
TOKENS = PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta"
EXPERTS = PREFIX + "model.layers.0.mlp.experts"


def magnitudes(size: int | None = None, columns: int = 1) -> dict[str, Raw]:
    """Magnitudes of DoRA for the good adapter; of the right size by default."""
    return {
        f"{name}.lora_magnitude_vector": raw(
            np.ones((size or (16 if "q_proj" in name else 8), columns)).squeeze()
        )
        for name in LAYERS
    }


ATTENTION = pair("attn", 48, 16) | pair("attn.base_layer.out_proj", 16, 16)


def bank(nest: str, rows: int, columns: int | None = None) -> dict[str, Raw]:
    """The factors of all experts of one parameter."""
    return {
        f"{EXPERTS}{nest}.lora_A.weight": random((rows, 16), 70),
        f"{EXPERTS}{nest}.lora_B.weight": random((24, columns or rows), 71),
    }


def experts(tensors: dict[str, Raw] | None = None, **config: object) -> Build:
    """The good adapter with experts in it."""
    settings = {
        "peft_version": "0.21.2",
        "target_parameters": ["mlp.experts.gate_up_proj"],
    } | config
    return with_tensors(bank("", 8) if tensors is None else tensors, **settings)


def with_text(key: str, value: str) -> str:
    """The good config with a literal that Python's json would not write."""
    return GOOD.replace(f'"{key}": {json.dumps(good_config()[key])}', f'"{key}": {value}')


def fields(bomb: str) -> dict[str, dict[str, object]]:
    return {
        "target_modules": {"target_modules": bomb},
        "exclude_modules": {"exclude_modules": bomb},
        "rank_pattern": {"rank_pattern": {bomb: 4}},
        "alpha_pattern": {"alpha_pattern": {bomb: 8}},
        "layers_pattern": {"layers_to_transform": [0, 1], "layers_pattern": [bomb]},
        "modules_to_save": {"modules_to_save": [bomb]},
    }


BOMB = r"(([a-z_.0-9])+.)+[A-Z]([a-z])+$"
BOMBS = (
    r"(.*)*(.*)*(.*)*X",
    r"(\w+\.?)+#",
    r"(\w|\w\w|\.)+X",
    ".*.*.*.*.*.*.*.*.*.*z",
    r"(.*a){25}",
    r"(.?){40}Z",
)
LEGAL = (
    r".*\.self_attn\.(q|v)_proj",
    r"^(?!.*vision).*\.(?:q|v)_proj$",
    r"(?:\w+\.)*[qv]_proj",
    r"(?:.*?(?:vision|language|text|model).*?(?:self_attn|attention|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.x)",
    r"model\.layers\.([0-9]|1[0-9]|2[0-3])\.self_attn\.[qv]_proj",
)
HEAD = {PREFIX + "lm_head.weight": raw([[1.0] * 16] * 32)}
RANKS = good_tensors() | pair(module(1, "q_proj"), 16, 16, 2, 70)
CASES = [
    text("empty", b"", "JSON"),
    text("only spaces", "   \n", "JSON"),
    text("YAML", "peft_type: LORA\nr: 4\n", "JSON"),
    text("UTF-16", GOOD.encode("utf-16"), "UTF-8"),
    text("UTF-32", GOOD.encode("utf-32"), "UTF-8"),
    text("latin-1", GOOD.replace("llama", "llam\u00e9").encode("latin-1"), "UTF-8"),
    text("null", "null", "null"),
    text("a list", f"[{GOOD}]", "a list"),
    text("a string", json.dumps(GOOD), "a string"),
    text("a number", "4", "a number"),
    text("true", "true", "a boolean"),
    text("two objects", GOOD + GOOD, "JSON"),
    text("an object and text", GOOD + " x", "JSON"),
    text("cut", GOOD[:-10], "JSON"),
    text("a trailing comma", GOOD[:-1] + ",}", "JSON"),
    text("a comment", GOOD[:-1] + "// the end\n}", "JSON"),
    text("single quotes", GOOD.replace('"', "'"), "JSON"),
    text("zeros at the end", GOOD + "\0" * 8, "JSON"),
    text("a control character in a text", GOOD.replace("llama", "lla\nma"), "JSON"),
    text("100,000 lists deep", "[" * 100_000, "nested"),
    text("100,000 objects deep", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
    text("40 deep in a neutral key", GOOD[:-1] + ', "eva_config": ' + '{"a":' * 40 + "1" + "}" * 41, "nested"),
    text("a number of 5,000 digits", with_text("r", "9" * 5000), "5000 digits"),
    text("a fraction of 100,000 digits", with_text("lora_alpha", "0." + "1" * 100_000 + "e400000"), "too large"),
    text("a key twice", GOOD[:-1] + ', "lora_alpha": 8000}', "lora_alpha", "duplicate"),
    text("a key twice, the same value", GOOD[:-1] + ', "r": 4}', "'r'", "duplicate"),
    text("a key twice, in a table", GOOD[:-1] + ', "alpha_pattern": {"q_proj": 1, "q_proj": 2}}', "q_proj", "duplicate"),
    text("a key twice, spelled with an escape", GOOD[:-1] + ', "\\u0072": 8}', "'r'", "duplicate"),
    text("4 MB of spaces", GOOD + " " * 4_000_000, "at most"),
    text("4 MB of a neutral key", GOOD[:-1] + ', "peft_version": "' + "x" * 4_000_000 + '"}', "at "
                                                                                              "most"),
    text("git lfs pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "JSON"),
    text("html page", "<!DOCTYPE html><html></html>", "JSON"),
    text("a pickle", b"\x80\x04\x95\x00\x00.", "UTF-8"),
    accept("json", "a byte order mark", files(b"\xef\xbb\xbf" + GOOD.encode())),
    accept("json", "no spaces", files(json.dumps(good_config(), separators=(",", ":")).encode())),
    accept("json", "keys in reverse", files(json.dumps(dict(reversed(good_config().items()))).encode())),
    accept("json", "escapes and other alphabets", files(good_config(base_model_name_or_path="mod\u00e8le/\u4e2d"))),
    # Numbers.
    text("alpha NaN", with_text("lora_alpha", "NaN"), "NaN"),
    text("alpha Infinity", with_text("lora_alpha", "Infinity"), "Infinity"),
    text("alpha -Infinity", with_text("lora_alpha", "-Infinity"), "-Infinity"),
    text("alpha 1e999", with_text("lora_alpha", "1e999"), "1e999"),
    number("alpha missing", "lora_alpha", ..., "missing"),
    number("alpha null", "lora_alpha", None),
    number("alpha a text", "lora_alpha", "8"),
    number("alpha true", "lora_alpha", True),
    number("alpha a list", "lora_alpha", [8]),
    number("r missing", "r", ..., "missing"),
    number("r null", "r", None),
    number("r zero", "r", 0),
    number("r negative", "r", -4),
    number("r a text", "r", "4"),
    number("r a fraction", "r", 4.5),
    number("r 4.0", "r", 4.0),
    number("r true", "r", True),
    number("r 5", "r", 5),
    number("r 2^31", "r", 2**31),
    number("r 2 * 10^7", "r", 20_000_000),
    number("a rank_pattern of 2 * 10^7", "rank_pattern", {"q_proj": 20_000_000}),
    number("a rank_pattern of 0", "rank_pattern", {"q_proj": 0}),
    number("a rank_pattern of text", "rank_pattern", {"q_proj": "4"}, "positive whole"),
    number("a rank_pattern that is a list", "rank_pattern", ["q_proj"]),
    number("a rank_pattern that is not true", "rank_pattern", {"q_proj": 2}),
    number("an alpha_pattern of null", "alpha_pattern", {"q_proj": None}),
    number("an alpha_pattern of true", "alpha_pattern", {"q_proj": True}),
    text("an alpha_pattern of NaN", GOOD[:-1] + ', "alpha_pattern": {"q_proj": NaN}}', "NaN"),
    refuse("numbers", "ranks that differ without rank_pattern", files(None, RANKS), "rank 2"),
    number("dropout a text", "lora_dropout", "0.1"),
    number("dropout 3", "lora_dropout", 3),
    number("layers_to_transform a text", "layers_to_transform", "0", "a layer number"),
    number("layers_to_transform negative", "layers_to_transform", [-1]),
    refuse("numbers", "alpha 1e300", changed(lora_alpha=1e300), "not finite"),
    refuse("numbers", "an alpha_pattern of 1e300", changed(alpha_pattern={"q_proj": 1e300}), "not "
                                                                                             "finite"),
    warn("numbers", "alpha zero", changed(lora_alpha=0), CONFIG, "lora_alpha"),
    warn("numbers", "alpha negative", changed(lora_alpha=-8), CONFIG, "lora_alpha"),
    warn("numbers", "alpha times 1,000", changed(lora_alpha=8000), CONFIG, "lora_alpha"),
    warn("numbers", "alpha 1e-30", changed(lora_alpha=1e-30), CONFIG, "lora_alpha"),
    warn("numbers", "an alpha_pattern below zero", changed(alpha_pattern={"q_proj": -8}), CONFIG, "lora_alpha"),
    warn("numbers", "a rank_pattern key that matches nothing", changed(rank_pattern={"k_proj": 9}), "rank_pattern", "k_proj"),
    warn("numbers", "an alpha_pattern key that matches nothing", changed(alpha_pattern={"k_proj": 9}), "alpha_pattern", "k_proj"),
    warn("numbers", "alpha_pattern keys that overlap", changed(alpha_pattern={"q_proj": 12, "layers.0.self_attn.q_proj": 4}), "alpha_pattern", "differ"),
    warn("numbers", "alpha_pattern keys that overlap, reversed", changed(alpha_pattern={"layers.0.self_attn.q_proj": 4, "q_proj": 12}), "alpha_pattern", "differ"),
    accept("numbers", "alpha a fraction", changed(lora_alpha=0.5)),
    accept("numbers", "alpha 16.0", changed(lora_alpha=16.0)),
    accept("numbers", "rsLoRA", changed(use_rslora=True)),
    accept("numbers", "rank_pattern", files(good_config(rank_pattern={"layers.1.self_attn.q_proj": 2}), RANKS)),
    accept("numbers", "rank_pattern, anchored", files(good_config(rank_pattern={"^model.layers.1.self_attn.q_proj": 2}), RANKS)),
    accept("numbers", "alpha_pattern", changed(alpha_pattern={"v_proj": 3})),
    accept("numbers", "alpha_pattern keys that overlap and agree", changed(alpha_pattern={"v_proj": 3, "0.self_attn.v_proj": 3})),
    accept("numbers", "both patterns and rsLoRA", files(good_config(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={r"layers\.\d\.self_attn\.q_proj": 5}, use_rslora=True), RANKS)),
    # Patterns.
    *(refuse("patterns", f"a bomb in {key}", changed(**field), CONFIG, key) for key, field in fields(BOMB).items()),
    *(refuse("patterns", f"target_modules {bomb}", changed(target_modules=bomb), "target_modules") for bomb in BOMBS),
    *(refuse("patterns", f"exclude_modules {bomb}", changed(exclude_modules=bomb), "exclude_modules") for bomb in BOMBS),
    refuse("patterns", "20,000 alpha_pattern keys", changed(alpha_pattern={f"x{i}": 8 for i in range(20_000)}), "alpha_pattern"),
    refuse("patterns", "5,000 rank_pattern keys", changed(rank_pattern={f"x{i}": 8 for i in range(5_000)}), "rank_pattern"),
    refuse("patterns", "4,000 patterns that are no plain names", changed(alpha_pattern={f"x{i}|y(a|b){i}": 8 for i in range(4_000)}), "512 patterns"),
    refuse("patterns", "a pattern of 600 characters", changed(target_modules="(q_proj|v_proj)" * 40), "target_modules"),
    refuse("patterns", "a pattern of 300 kB", changed(exclude_modules="k" * 300_000), "exclude_modules"),
    *(refuse("patterns", f"not a pattern: {bad[:20]}", changed(target_modules=bad), "target_modules") for bad in ("q_proj|(", "[z-a]", "*q_proj", "a{99999999999}", "(" * 400, "(?<=.*)q", "(?P<a>q)(?P<a>v)", r"q\8")),
    *(refuse("patterns", f"another dialect: {bad}", changed(target_modules=bad), "target_modules", "regular expression") for bad in ("q_proj{e<=1}", r"\p{L}*_proj", "[[:alpha:]]+_proj")),
    refuse("patterns", "an exclude_modules that is no pattern", changed(exclude_modules="k_proj|("), "exclude_modules"),
    refuse("patterns", "an alpha_pattern key that is no pattern", changed(alpha_pattern={"(": 8}), "alpha_pattern"),
    *(accept("patterns", f"target_modules {legal[:40]}", changed(target_modules=legal)) for legal in LEGAL),
    accept("patterns", "exclude_modules, a pattern", changed(exclude_modules=r".*\.k_proj")),
    # Meaning.
    meaning("peft_type missing", "peft_type", ...),
    *(meaning(f"peft_type {value}", "peft_type", value) for value in ("FOO", "lora", "LOHA", "IA3", None, {}, ["LORA"])),
    meaning("target_modules empty", "target_modules", [], "at least one"),
    meaning("target_modules a number", "target_modules", 3, "a list of strings"),
    meaning("target_modules with a number", "target_modules", ["q_proj", 3]),
    meaning("target_modules unknown", "target_modules", ["nothing"]),
    meaning("target_modules hides v_proj", "target_modules", ["q_proj"]),
    meaning("target_modules names k_proj too", "target_modules", ["q_proj", "v_proj", "k_proj"], "k_proj"),
    meaning("target_modules is an ending", "target_modules", ["proj"]),
    meaning("target_modules with commas", "target_modules", "q_proj,v_proj"),
    meaning("exclude_modules hides v_proj", "exclude_modules", ["v_proj"]),
    meaning("exclude_modules, a pattern, hides v_proj", "exclude_modules", ".*v_proj"),
    meaning("layers_to_transform hides layer 1", "layers_to_transform", [0]),
    meaning("layers_to_transform names layer 2 too", "layers_to_transform", [0, 1, 2]),
    meaning("layers_pattern alone", "layers_pattern", "layers"),
    refuse("meaning", "layers_pattern of another list", changed(layers_to_transform=[0, 1], layers_pattern="blocks"), CONFIG, "layer"),
    refuse("meaning", "layers_to_transform with a pattern", changed(layers_to_transform=[0, 1], target_modules=".*_proj"), "layers_to_transform"),
    refuse("meaning", "layer 99 where layers_to_transform has 0 and 1", with_tensors(pair(module(99, "q_proj"), 16, 16), layers_to_transform=[0, 1]), "layers.99"),
    refuse("meaning", "modules_to_save absent from the file", changed(modules_to_save=["lm_head"]), "modules_to_save", "lm_head"),
    meaning("modules_to_save a text", "modules_to_save", "lm_head"),
    refuse("meaning", "modules_to_save names an adapted module", changed(modules_to_save=["v_proj"]), "modules_to_save", "v_proj"),
    meaning("modules_to_save a path", "modules_to_save", ["../lm_head"]),
    refuse("meaning", "one of two modules_to_save absent", with_tensors(HEAD, modules_to_save=["lm_head", "embed_tokens"]), "modules_to_save", "embed_tokens"),
    refuse("meaning", "an AdaLoRA of no rank", changed(peft_type="ADALORA"), "init_r"),
    refuse("meaning", "an AdaLoRA without lora_E", changed(peft_type="ADALORA", init_r=4), WEIGHTS),
    refuse("meaning", "an AdaLoRA whose masks are numbers", changed(peft_type="ADALORA", init_r=4, rank_pattern={"q_proj": [1, 0]}), "rank_pattern"),
    refuse("meaning", "an AdaLoRA with DoRA", changed(peft_type="ADALORA", init_r=4, use_dora=True), "peft_type", "no AdaLoRA with use_dora"),
    refuse("meaning", "an AdaLoRA of an nn.MultiheadAttention", with_tensors(ATTENTION, peft_type="ADALORA", init_r=4, target_modules=[*BOTH, "attn"]), "attn", "no in_proj layer"),
    refuse("meaning", "DoRA of an nn.MultiheadAttention", with_tensors(ATTENTION | magnitudes(), use_dora=True, target_modules=[*BOTH, "attn"]), "attn", "no in_proj layer"),
    refuse("meaning", "DoRA, magnitudes missing", changed(use_dora=True), "use_dora", "lora_magnitude_vector"),
    refuse("meaning", "DoRA, magnitudes too long", with_tensors(magnitudes(16), use_dora=True), "lora_magnitude_vector", "8 values"),
    refuse("meaning", "DoRA, magnitudes of two dimensions", with_tensors(magnitudes(8, 2), use_dora=True), "lora_magnitude_vector"),
    refuse("meaning", "DoRA without a base", with_tensors(magnitudes(), use_dora=True), "use_dora", "model"),
    refuse("meaning", "DoRA with lora_bias", with_tensors(magnitudes(), use_dora=True, lora_bias=True), "use_dora"),
    refuse("meaning", "lora_bias, biases missing", changed(lora_bias=True), "lora_bias"),
    refuse("meaning", "lora_bias, a bias too long", with_tensors({f"{n}.lora_B.bias": raw([1.0] * 99) for n in LAYERS}, lora_bias=True), "lora_B.bias", "99"),
    accept("meaning", "bias all, and no bias", changed(bias="all")),
    accept("meaning", "bias lora_only, and no bias", changed(bias="lora_only")),
    refuse("meaning", "bias lora_only, a bias elsewhere", with_tensors({PREFIX + "model.norm.bias": raw([1.0] * 16)}, bias="lora_only"), "model.norm.bias"),
    refuse("meaning", "bias all, a bias of two dimensions", with_tensors({PREFIX + "model.norm.bias": raw([[1.0] * 16])}, bias="all"), "no bias"),
    refuse("meaning", "bias all, a weight", with_tensors({PREFIX + "model.norm.weight": raw([1.0] * 16)}, bias="all"), "model.norm.weight"),
    refuse("meaning", "bias all, a bias in a factor", with_tensors({Q + ".lora_A.bias": raw([1.0] * 4)}, bias="all"), "lora_A.bias"),
    refuse("meaning", "bias all, one bias twice", with_tensors({Q + ".bias": raw([1.0] * 16), Q + ".base_layer.bias": raw([1.0] * 16)}, bias="all"), "another spelling"),
    refuse("meaning", "bias all, a head's bias with two values", with_tensors(HEAD | {PREFIX + "lm_head.bias": raw([1.0] * 32), PREFIX + "lm_head.modules_to_save.bias": raw([2.0] * 32)}, bias="all", modules_to_save=["lm_head"]), "different values"),
    meaning("bias a number", "bias", 1),
    *(meaning(f"init {value}", "init_lora_weights", value) for value in ("unheard", 3, {})),
    *(meaning(f"init {value}", "init_lora_weights", value, "leaves the base weights alone") for value in ("pissa_niter_16", "corda", "loftq", "lora_ga")),
    *(refuse("meaning", f"init {value} without a base", changed(init_lora_weights=value), value.lower(), "model") for value in ("pissa", "PiSSA", "olora")),
    meaning("layer_replication", "layer_replication", [[0, 2], [1, 2]]),
    meaning("megatron_config", "megatron_config", {"hidden_size": 16}),
    meaning("megatron_core, a module of Python", "megatron_core", "antigravity"),
    meaning("trainable_token_indices", "trainable_token_indices", [0, 1]),
    refuse("meaning", "token rows that the config does not name", with_tensors({TOKENS: random((2, 16), 60), TOKENS.replace("embed_tokens", "other"): random((2, 16), 61)}, trainable_token_indices={"embed_tokens": [0, 1]}), "model.other", "does not name"),
    refuse("meaning", "a bias in two spellings", with_tensors({PREFIX + "model.language_model.norm.bias": random((16,), 62), PREFIX + "language_model.model.norm.bias": random((16,), 63)}, bias="all"), "norm.bias", "two spellings"),
    refuse("meaning", "token rows, too few", with_tensors({TOKENS: random((2, 16), 60)}, trainable_token_indices=[0, 1, 2]), "3 rows"),
    refuse("meaning", "token rows of another module", with_tensors({TOKENS: random((2, 16), 60)}, trainable_token_indices={"lm_head": [0, 1]}), "lm_head"),
    refuse("meaning", "token rows, of one dimension", with_tensors({TOKENS: raw([1.0, 2.0])}, trainable_token_indices=[0, 1]), "2 rows"),
    *(meaning(f"token rows {value!r}", "trainable_token_indices", value, "distinct row numbers") for value in ([0, 0], [-1], [True], ["0"], {"": [[0]]}, {"a b": [0]}, "0")),
    meaning("target_parameters", "target_parameters", ["mlp.experts.gate_up_proj"]),
    meaning("target_parameters [1]", "target_parameters", [1], "list of strings"),
    *(meaning(f"target_parameters {value!r}", "target_parameters", value, "a list of parameter names") for value in ("experts.w", ["../w"], ["a b"])),
    refuse("meaning", "experts without a version", experts(peft_version=...), "peft_version"),
    refuse("meaning", "experts in a layout nobody knows", experts(lora_B_layout="diagonal"), "lora_B_layout"),
    refuse("meaning", "experts, rows that are no multiple of the rank", experts(bank("", 9)), "9 "
                                                                                              "rows"),
    refuse("meaning", "experts, other rows in B", experts(bank("", 8, 12)), "rank 8 in A, 12 in B"),
    refuse("meaning", "experts with half a nest", experts(bank(".base_layer", 8)), "nested"),
    refuse("meaning", "experts, three nested where two are named", experts(bank("", 8) | bank(".base_layer", 8) | bank(".base_layer.base_layer", 8)), "target_parameters"),
    refuse("meaning", "experts, of a convolution", experts({EXPERTS + ".lora_A.weight": random((8, 4, 1), 1), EXPERTS + ".lora_B.weight": random((4, 8, 1), 2)}), "expected A"),
    refuse("meaning", "parameters in an order nobody knows", experts(bank("", 8) | bank(".base_layer", 8), target_parameters=["mlp.experts.up", "mlp.experts.down"]), "order"),
    refuse("meaning", "a base layer's factor where no parameter is named", with_tensors(bank(".base_layer", 8)), "base_layer"),
    refuse("meaning", "200,001 experts", experts({EXPERTS + ".lora_A.weight": raw(np.ones((4 * 200_001, 1))), EXPERTS + ".lora_B.weight": raw(np.ones((1, 4 * 200_001)))}), "200001 experts"),
    refuse("meaning", "lora_bias, a bias of an nn.MultiheadAttention", with_tensors(pair("attn", 48, 16) | pair("attn.base_layer.out_proj", 16, 16) | {f"{n}.lora_B.bias": raw([1.0] * (16 if "q_proj" in n else 8)) for n in LAYERS} | {PREFIX + "attn.lora_B.bias": raw([1.0] * 48)}, target_modules=[*BOTH, "attn"], lora_bias=True), "does not belong"),
    refuse("meaning", "experts with DoRA", experts(use_dora=True), "target_parameters"),
    refuse("meaning", "an out_proj beside no in_proj", with_tensors(pair("attn.base_layer.out_proj", 16, 16), target_modules=[*BOTH, "attn"]), "out_proj"),
    refuse("meaning", "an out_proj beside a narrow in_proj", with_tensors(pair("attn.base_layer.out_proj", 16, 16) | pair("attn", 32, 16), target_modules=[*BOTH, "attn"]), "3 d"),
    warn("meaning", "a learning rate of a trainer", changed(lorap_lr_ratio=16.0), "lorap_lr_ratio"),
    refuse("meaning", "a learning rate that is an object", changed(lorap_lr_ratio={"a": 1}), "lorap_lr_ratio"),
    meaning("activated LoRA", "alora_invocation_tokens", [1, 2]),
    meaning("QALoRA", "use_qalora", True),
    meaning("KaSA", "kasa_config", {"beta": 1e-4}),
    meaning("BD-LoRA", "use_bdlora", {"nblocks": 2}),
    meaning("Arrow", "arrow_config", {"top_k": 3}),
    meaning("MonteCLoRA", "monteclora_config", {"a": 1}),
    accept("meaning", "weight tying", changed(ensure_weight_tying=True)),
    meaning("fused projections", "enable_lora", [True, False, True]),
    meaning("an unknown key", "unheard_of", 1),
    meaning("an unknown key, true", "unheard_of", True),
    meaning("an unknown key, an object", "unheard_of", {"a": 0}),
    meaning("a key of another case", "Lora_alpha", 16),
    meaning("tokenizer_kwargs", "tokenizer_kwargs", {"trust_remote_code": True}),
    meaning("trust_remote_code", "trust_remote_code", True),
    meaning("auto_mapping a text", "auto_mapping", "subprocess"),
    refuse("meaning", "a key with terminal escapes", changed(**{"\x1b]0;x\x07key": 1}), "\\x1b]0;x\\x07key"),
    refuse("meaning", "a key of 100 kB", changed(**{"k" * 100_000: 1}), "kkk"),
    *(meaning(f"{key} {value!r}", key, value) for key, value in (("use_rslora", "false"), ("use_rslora", 1), ("fan_in_fan_out", "yes"), ("inference_mode", "true"), ("task_type", "FOO"), ("task_type", 3), ("revision", 3), ("base_model_name_or_path", ["a"]), ("use_dora", "true"), ("use_dora", 1))),
    meaning("a base model with a newline", "base_model_name_or_path", "a/b\n---\nlicense: mit"),
    meaning("a base model with terminal escapes", "base_model_name_or_path", "\x1b[2Ja/b"),
    meaning("a base model of 10 kB", "base_model_name_or_path", "x" * 10_000),
    meaning("a revision of 10 kB", "revision", "x" * 10_000),
    warn("meaning", "an unknown key, false", changed(unheard_of=False), "unheard_of"),
    warn("meaning", "an unknown key, empty", changed(unheard_of={}), "unheard_of"),
    warn("meaning", "auto_mapping to subprocess", changed(auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"}), "subprocess"),
    accept("meaning", "an unknown key, null", changed(unheard_of=None)),
    accept("meaning", "auto_mapping to a model", changed(auto_mapping={"base_model_class": "X", "parent_library": "transformers.models.x"})),
    *(accept("meaning", f"{key} {value!r}", changed(**{key: value})) for key, value in (("peft_version", "9.9.9"), ("init_lora_weights", False), ("init_lora_weights", "gaussian"), ("init_lora_weights", "eva"), ("loftq_config", {}), ("megatron_core", "megatron.core"), ("target_modules", None), ("target_modules", "all-linear"), ("exclude_modules", ["k_proj"]), ("exclude_modules", []), ("layers_to_transform", [0, 1]), ("lora_dropout", 0.5), ("task_type", None), ("fan_in_fan_out", True), ("bias", None), ("revision", "main"), ("base_model_name_or_path", None), ("base_model_name_or_path", "/home/somebody/models/llama"), ("use_dora", False), ("layer_replication", None), ("modules_to_save", []))),
    accept("meaning", "full names as target_modules", changed(target_modules=[module(layer, part) for layer in (0, 1) for part in ("q_proj", "v_proj")])),
    accept("meaning", "only what counts", files({"peft_type": "LORA", "r": 4, "lora_alpha": 8})),
    accept("meaning", "layers_to_transform and layers_pattern", changed(layers_to_transform=[0, 1], layers_pattern=["layers"])),
]  # fmt: skip
