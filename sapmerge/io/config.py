"""`adapter_config.json`: a rule for every key. A key that no rule covers is refused by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from sapmerge.errors import AdapterConfigError, AdapterSecurityError
from sapmerge.io.config_reader import MODULE, ConfigReader
from sapmerge.io.files import shown
from sapmerge.io.kinds.adalora import as_lora

__all__ = ["Settings", "settings"]


@dataclass(frozen=True)
class Settings:
    """What of a config decides about the update. Ranks are only here to be compared
    with the tensors.
    """

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...] | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    heads: tuple[str, ...]
    fan_in_fan_out: bool
    base_model: str | None
    revision: str | None
    task_type: str | None
    dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] | None = None
    """Rows of the embedding that `trainable_token_indices` names;
    "" for the model's input embedding.
    """
    start: str | None = None
    """An initialisation that was subtracted from the base: "pissa" or "olora"."""
    adalora: bool = False


# PEFT adds these to modules_to_save of every adapter for the task, whether the model has them or
# not.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", *HEADS)

# Keys that change what the adapter does in a way a sum of B @ A cannot say: the value that means
# "off", and why.
REFUSED: dict[str, tuple[object, str]] = {
    "layer_replication": (
        None,
        "the adapter belongs to a model with repeated layers, not to its base",
    ),
    "megatron_config": (
        None,
        "Megatron layers are not supported; convert the adapter to plain LoRA",
    ),
    "alora_invocation_tokens": (
        None,
        "activated LoRA acts on some tokens only, a merged adapter on all",
    ),
    "use_qalora": (False, "QALoRA pools its inputs, so its update is not B @ A"),
    "use_bdlora": (None, "block-diagonal LoRA stores blocks, not B and A"),
    "arrow_config": (None, "Arrow routes between adapters and has no update of its own"),
    "kasa_config": (None, "KaSA truncates the base weight, so its update is not B @ A"),
    "monteclora_config": (None, "MonteCLoRA samples its update"),
    "enable_lora": (
        None,
        "the adapter was written by PEFT before 0.3 and fuses several projections; train it again",
    ),
}
# Initialisations that leave the base alone. The others (CorDA, LoftQ, LoRA-GA) subtract from it
# what no file tells.
INITS = ("gaussian", "eva", "orthogonal", "mica")
# What was subtracted from the base can be computed from the base.
STARTS = ("pissa", "olora")
_TEXT = (str, type(None))
_TABLE = (dict, type(None))
# Keys that say nothing about the update, and the types they may have.
NEUTRAL: dict[str, tuple[type, ...]] = {
    "auto_mapping": _TABLE,
    "inference_mode": (bool, type(None)),
    "peft_version": _TEXT,
    "qalora_group_size": (int, type(None)),
    "merge_weights": (bool, type(None)),
    "eva_config": _TABLE,
    "corda_config": _TABLE,
    "lora_ga_config": _TABLE,
    "loftq_config": _TABLE,
    "velora_config": _TABLE,
    "runtime_config": _TABLE,
}
READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "fan_in_fan_out",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "init_lora_weights",
        "lora_dropout",
        "megatron_core",
        "use_dora",
        "lora_bias",
        "bias",
        "trainable_token_indices",
        "target_parameters",
        "lora_B_layout",
        "ensure_weight_tying",
    ]
)
# Keys that other trainers add, and that say nothing about the update: learning rates, the dtype of
# training, versions.
HARMLESS = frozenset(
    [
        "lorap_lr_ratio",
        "lorap_emb_lr",
        "lora_dtype",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
        "swift_version",
    ]
)


def settings(config: Mapping[str, object], where: str, *, adalora: bool = False) -> Settings:
    """Every key used, neutral, or refused by name.

    Raises:
        AdapterConfigError: a key or value that is missing, unknown, contradictory or unsupported.
        AdapterSecurityError: a key that asks for code.
    """
    read = ConfigReader(config, where)
    peft_type = config.get("peft_type")
    if peft_type == "ADALORA":
        return settings(as_lora(config, where), where, adalora=True)
    if peft_type != "LORA":
        known = (
            f"merge {shown(peft_type)} adapters into their bases with PEFT instead"
            if peft_type
            else ""
        )
        read.fail("peft_type", "'LORA'", known)
    for key in config:
        _check_key(key, read)
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise AdapterConfigError(
                f"{where}: {key} is missing; PEFT would silently use 8: write what was trained"
            )
    core = config.get("megatron_core")
    if core not in (None, "megatron.core"):
        raise AdapterSecurityError(
            f"{where}: megatron_core {shown(core)} would be imported; expected 'megatron.core'"
        )
    start = _start(config.get("init_lora_weights", True), read)
    dropout = read.number("lora_dropout", 0.0)
    if not 0 <= dropout <= 1:
        read.fail("lora_dropout", "a number in [0, 1]")
    r = config["r"]
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        read.fail("r", "a positive whole number")
    targets, excluded = read.names("target_modules"), read.names("exclude_modules")
    if targets is not None and not targets and not config.get("target_parameters"):
        read.fail("target_modules", "at least one module name")
    layers, lists = read.layers(), read.names("layers_pattern")
    lists = (lists,) if isinstance(lists, str) and lists else tuple(lists or ())
    if isinstance(targets, str) and (layers is not None or lists):
        read.fail(
            "layers_to_transform",
            "null, because target_modules is a pattern: PEFT refuses both together",
        )
    if lists and layers is None:
        read.fail(
            "layers_pattern",
            "null, because layers_to_transform is null: PEFT refuses one without the other",
        )
    task = read.text("task_type")
    if task is not None and task not in TASKS:
        read.fail("task_type", f"one of {', '.join(TASKS)}, or null")
    saved = read.names("modules_to_save")
    if isinstance(saved, str):
        read.fail("modules_to_save", "a list of module names")
    if not all(MODULE.fullmatch(name) for name in saved or ()):
        read.fail("modules_to_save", "plain module names")
    ranks = read.table("rank_pattern")
    if any(
        isinstance(rank, bool) or not isinstance(rank, int) or rank < 1 for rank in ranks.values()
    ):
        read.fail("rank_pattern", "positive whole numbers")
    alphas = read.table("alpha_pattern")
    read.flag("ensure_weight_tying")  # PEFT has stored what it tied, too
    dora, lora_bias = read.flag("use_dora"), read.flag("lora_bias")
    if (start is not None) + dora + lora_bias > 1:
        read.fail(
            "use_dora" if dora else "lora_bias",
            "false",
            "PEFT has no use_dora with lora_bias, PiSSA or OLoRA",
        )
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        read.fail("bias", "'none', 'all' or 'lora_only'")
    parameters = read.names("target_parameters")
    if isinstance(parameters, str) or not all(MODULE.fullmatch(name) for name in parameters or ()):
        read.fail("target_parameters", "a list of parameter names")
    if parameters and (dora or lora_bias or start):
        read.fail(
            "target_parameters", "null", "PEFT has no such layer with use_dora, lora_bias or PiSSA"
        )
    if adalora and (dora or lora_bias or start or parameters):
        read.fail(
            "peft_type",
            "'LORA'",
            "PEFT has no AdaLoRA with use_dora, lora_bias, target_parameters or PiSSA",
        )
    return Settings(
        r=r,
        alpha=read.number("lora_alpha", 8.0),
        rslora=read.flag("use_rslora"),
        rank_pattern=cast("dict[str, int]", ranks),
        alpha_pattern={
            key: read.as_number(alpha, "alpha_pattern") for key, alpha in alphas.items()
        },
        targets=targets,
        excluded=excluded or None,
        layers=layers or None,
        layers_pattern=lists,
        saved=tuple(dict.fromkeys(saved or ())),
        heads=HEADS.get(task or "", ()),
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        base_model=read.text("base_model_name_or_path") or None,
        revision=read.text("revision") or None,
        task_type=task,
        dora=dora,
        lora_bias=lora_bias,
        bias=str(bias),
        parameters=tuple(parameters or ()),
        tokens=read.tokens(),
        start=start,
        adalora=adalora,
    )


def _check_key(key: str, read: ConfigReader) -> None:
    """Refuse what is switched on and unsupported, and what nobody knows."""
    value = read.config[key]
    if key in REFUSED:
        off, why = REFUSED[key]
        if value not in (None, [], {}) and (type(value) is not type(off) or value != off):
            read.fail(key, json.dumps(off), why)
    elif key in NEUTRAL:
        if not isinstance(value, NEUTRAL[key]):
            read.fail(key, " or ".join(kind.__name__ for kind in NEUTRAL[key]))
        if key == "auto_mapping" and isinstance(value, dict):
            library = str(cast("dict[str, object]", value).get("parent_library")).split(".")[0]
            if library in sys.stdlib_module_names:
                read.warn(
                    f"auto_mapping names {shown(library)}, which is no library of models; it is "
                    "never imported"
                )
    elif key in HARMLESS and (value is None or isinstance(value, str | int | float)):
        read.warn(f"key {shown(key)} is ignored: it is known to say nothing about the update")
    elif key not in READ and value is not None:
        if value is False or value in ("", [], {}):
            read.warn(
                f"unknown key {shown(key)} is ignored: {shown(value)} is taken to mean that it is "
                "off"
            )
        else:
            read.fail(
                key, "only known keys of a LoraConfig", "remove it if it does not change the update"
            )


def _start(init: object, read: ConfigReader) -> str | None:
    """Which initialisation was subtracted from the base; None if the base was left alone."""
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in INITS):
        return None
    if isinstance(init, str) and init.lower() in STARTS:
        return init.lower()
    if isinstance(init, str) and init.lower().startswith(
        ("pissa", "olora", "corda", "loftq", "lora_ga")
    ):
        read.fail(
            "init_lora_weights",
            "'pissa', 'olora' or an initialisation that leaves the base weights alone",
            "what it subtracted from the base depends on data or chance; convert it: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) in PEFT",
        )
    return read.fail("init_lora_weights", f"true, false, {', '.join((*INITS, *STARTS))}")
