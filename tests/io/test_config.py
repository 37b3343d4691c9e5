"""adapter_config.json: every key used, neutral, or refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path

import pytest
import torch

from sapmerge.errors import (
    AdapterConfigError,
    AdapterSecurityError,
    LimitExceededError,
    NonFiniteError,
    SapmergeError,
    SapmergeWarning,
)
from tests.io.helpers import (
    PREFIX,
    SHARED,
    accepted,
    good_config,
    good_tensors,
    module,
    refused,
    warned,
    write,
)

GOOD = json.dumps(good_config())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not valid JSON"),
        (b"peft_type: LORA\nr: 4\n", "not valid JSON"),
        (GOOD.encode("utf-16"), "UTF-8"),
        (b"null", "null"),
        (b"[]", "a list"),
        (GOOD.encode() * 2, "not valid JSON"),
        (b"[" * 100_000, "nested"),
        (GOOD.replace('"r": 4', '"r": ' + "9" * 5000).encode(), "5000 digits"),
        (GOOD.replace('"r": 4', '"r": 4, "lora_alpha": 1').encode(), "'lora_alpha' is a duplicate"),
        (GOOD.replace('"lora_alpha": 8', '"lora_alpha": NaN').encode(), "NaN"),
        (GOOD.replace('"lora_alpha": 8', '"lora_alpha": -Infinity').encode(), "-Infinity"),
        (GOOD.replace('"lora_alpha": 8', '"lora_alpha": 1e999').encode(), "1e999"),
        (
            GOOD.replace(
                '"inference_mode": true', '"auto_mapping": ' + '{"a":' * 40 + "1" + "}" * 40
            ).encode(),
            "deeper",
        ),
        (GOOD.encode() + b" " * 2_000_000, "at most"),
        (b"version https://git-lfs.github.com/spec/v1", "not valid JSON"),
    ],
)
def test_bad_json(tmp_path: Path, text: bytes, word: str) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    refused(tmp_path, "adapter_config.json", word)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    accepted(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", ...),
        ("peft_type", "lora"),
        ("peft_type", "LOHA"),
        ("peft_type", {}),
        ("r", ...),
        ("r", 0),
        ("r", -4),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("r", 2**31),
        ("r", 8),
        ("lora_alpha", ...),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("lora_alpha", True),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("fan_in_fan_out", "yes"),
        ("target_modules", []),
        ("target_modules", 3),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", ["q_proj"]),
        ("target_modules", ["q_proj", "v_proj", "k_proj"]),
        ("target_modules", ["nothing"]),
        ("target_modules", "q_proj|("),
        ("target_modules", ".*q_proj"),
        ("exclude_modules", ["v_proj"]),
        ("exclude_modules", ".*v_proj"),
        ("layers_to_transform", [0]),
        ("layers_to_transform", [0, 1, 2]),
        ("layers_to_transform", "0"),
        ("layers_pattern", "layers"),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", ["v_proj"]),
        ("modules_to_save", [".*"]),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", [4]),
        ("alpha_pattern", {"q_proj": None}),
        ("task_type", "FOO"),
        ("revision", 3),
        ("base_model_name_or_path", ["a"]),
        ("lora_dropout", "0.1"),
        ("lora_dropout", 3),
        ("bias", "some"),
        ("use_dora", True),
        ("lora_bias", True),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "unheard"),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"a": 1}),
        ("megatron_core", "antigravity"),
        ("trainable_token_indices", [0]),
        ("target_parameters", ["mlp.experts.gate"]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"a": 1}),
        ("ensure_weight_tying", "yes"),
        ("enable_lora", [True, False]),
        ("unheard_of", 1),
        ("unheard_of", True),
        ("unheard_of", {"a": 0}),
        ("\x1b[31mkey", "x"),
        ("auto_mapping", "subprocess"),
    ],
)
def test_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, good_config(**{key: value}))
    word = (
        "r"
        if key == "rank_pattern"
        else "modules_to_save"
        if key == "modules_to_save"
        else key.removeprefix("\x1b")
    )
    refused(
        tmp_path, word, error=AdapterSecurityError if key == "megatron_core" else AdapterConfigError
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("unheard_of", None),
        ("auto_mapping", {"base_model_class": "X", "parent_library": "dinov3.models"}),
        ("peft_version", "9.9"),
        ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "mica"),
        ("ensure_weight_tying", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("loftq_config", {}),
        ("megatron_core", "megatron.core"),
        ("target_modules", None),
        ("target_modules", ...),
        ("target_modules", "all-linear"),
        ("target_modules", r".*\.self_attn\.(q|v)_proj"),
        ("target_modules", r"(?!.*vision).*_proj"),
        (
            "target_modules",
            [module(layer, part) for layer in (0, 1) for part in ("q_proj", "v_proj")],
        ),
        ("exclude_modules", ["k_proj"]),
        ("exclude_modules", ".*k_proj"),
        ("exclude_modules", []),
        ("layers_to_transform", [0, 1]),
        ("layers_to_transform", []),
        ("lora_dropout", 0.5),
        ("task_type", None),
        ("bias", None),
        ("velora_config", {"num_groups": 64}),
    ],
)
def test_accepted_silently(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, good_config(**{key: value}))
    plain = write(tmp_path / "plain")
    assert accepted(tmp_path).digest == accepted(plain).digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", 8000),
        ("unheard_of", False),
        ("unheard_of", {}),
        ("auto_mapping", {"base_model_class": "Popen", "parent_library": "subprocess"}),
        ("rank_pattern", {"k_proj": 3}),
        ("alpha_pattern", {"k_proj": 3}),
        ("alpha_pattern", {"q_proj": 3, "self_attn.q_proj": 4}),
    ],
)
def test_warned_of(tmp_path: Path, key: str, value: object) -> None:
    write(tmp_path, good_config(**{key: value}))
    warned(tmp_path, key)


def test_patterns_follow_the_order_of_the_file(tmp_path: Path) -> None:
    name = module(0, "q_proj")
    write(tmp_path, good_config(alpha_pattern={"q_proj": 12, "layers.0.self_attn.q_proj": 4}))
    assert warned(tmp_path, "differ").modules[name].alpha == 12
    write(tmp_path, good_config(alpha_pattern={"layers.0.self_attn.q_proj": 4, "q_proj": 12}))
    adapter = warned(tmp_path, "differ")
    assert adapter.modules[name].alpha == 4
    assert adapter.modules[name].scaling == 1
    assert adapter.modules[module(1, "q_proj")].alpha == 12
    assert adapter.modules[module(1, "v_proj")].alpha == 8


def test_rslora(tmp_path: Path) -> None:
    write(tmp_path, good_config(use_rslora=True))
    assert {module.scaling for module in accepted(tmp_path).modules.values()} == {8 / math.sqrt(4)}


@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"],
)
@pytest.mark.parametrize(
    "bomb", [r"(_*[a-z]*)*X", r"(([a-z.0-9_]+)+)+!", r"(.*)*(.*)*(.*)*(.*)*1X", r"(\w|\w\w|\.)+X"]
)
def test_regex_bombs_are_stopped(tmp_path: Path, field: str, bomb: str) -> None:
    changes: dict[str, object] = {
        field: {bomb: 4} if field.endswith("_pattern") and field[0] in "ra" else bomb
    }
    if field == "layers_pattern":
        changes = {"layers_to_transform": [0], "layers_pattern": bomb}
    write(tmp_path, good_config(**changes))
    start = time.monotonic()
    with contextlib.suppress(SapmergeError, Warning):
        accepted(tmp_path)
    assert time.monotonic() - start < 4


def test_limits_of_patterns(tmp_path: Path) -> None:
    write(tmp_path, good_config(target_modules="(q_proj|v_proj)" * 40))
    refused(tmp_path, "target_modules", error=LimitExceededError)
    write(tmp_path, good_config(alpha_pattern={f"x{i}": 1 for i in range(5000)}))
    refused(tmp_path, "alpha_pattern", "5000", error=LimitExceededError)
    write(tmp_path, good_config(rank_pattern={f"(x{i}|y)": 1 for i in range(500)}))
    warned(tmp_path, "rank_pattern")
    for text in ("q_proj{e<=1}", r"\p{L}*_proj", "[[:alpha:]]+_proj", "a{99999999999}", "(" * 400):
        write(tmp_path, good_config(target_modules=text))
        refused(tmp_path, "target_modules", error=AdapterConfigError)


def test_overflow_of_the_product_is_refused(tmp_path: Path) -> None:
    write(tmp_path, good_config(lora_alpha=1e300))
    with pytest.warns(SapmergeWarning, match="lora_alpha"):
        refused(tmp_path, "not finite", "q_proj", error=NonFiniteError)
    tensors = {name: value * 1e25 for name, value in good_tensors().items()}
    write(tmp_path, tensors=tensors)
    refused(tmp_path, "not finite", error=NonFiniteError)


def test_unbalanced_factors_and_denormals(tmp_path: Path) -> None:
    tensors = {
        name: value * (1e4 if "lora_A" in name else 1e-4) for name, value in good_tensors().items()
    }
    write(tmp_path, tensors=tensors)
    warned(tmp_path, "4 modules", "norm")
    tensors = {
        name: value * (1.0 if "lora_A" in name else 1e-41) for name, value in good_tensors().items()
    }
    write(tmp_path, tensors=tensors)
    accepted(tmp_path)
    write(tmp_path, tensors={name: value.double() for name, value in good_tensors().items()})
    warned(tmp_path, "float64")


def _tensors_for(config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Tensors that a config would go with."""
    targets = config.get("target_modules") or ["q_proj", "v_proj"]
    assert isinstance(targets, list)
    rank = config["r"]
    assert isinstance(rank, int)
    return {
        f"{PREFIX}m.{name}.lora_{part}.weight": torch.ones(rank, rank)
        for name in targets
        for part in "AB"
    }


OTHER_KINDS = {"dora": "use_dora", "DoRA": "", "kasa": "kasa_config", "bdlora": "use_bdlora"}
CONFIGS = sorted((SHARED / "configs").glob("*.json")) if SHARED.exists() else []
OTHERS = sorted((SHARED / "configs" / "not_lora").glob("*.json")) if SHARED.exists() else []
here = pytest.mark.skipif(not CONFIGS, reason="the shared data is not beside this repository")


@here
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_real_configs(tmp_path: Path, path: Path) -> None:
    config = json.loads(path.read_text())
    word = next((key for part, key in OTHER_KINDS.items() if part in path.stem), None)
    write(tmp_path, config, _tensors_for(config))
    if word == "":  # a DoRA: its magnitudes are wanted, and then its base
        names = {name.partition(".lora_")[0] for name in _tensors_for(config)}
        rank = config["r"]
        magnitudes = {f"{name}.lora_magnitude_vector": torch.ones(rank) for name in names}
        heads = {
            f"{PREFIX}{name}.weight": torch.ones(2, 2)
            for name in config.get("modules_to_save") or ()
        }
        adapter = accepted(write(tmp_path, config, _tensors_for(config) | magnitudes | heads))
        assert all(module.needs_base for module in adapter.modules.values())
    elif word is None:
        adapter = accepted(tmp_path)
        assert {module.rank for module in adapter.modules.values()} == {config["r"]}
        assert adapter.base_model == config["base_model_name_or_path"]
    else:
        refused(tmp_path, word, error=AdapterConfigError)


@here
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_real_configs_of_other_methods(tmp_path: Path, path: Path) -> None:
    write(tmp_path, json.loads(path.read_text()))
    refused(tmp_path, json.loads(path.read_text())["peft_type"], "PEFT", error=AdapterConfigError)


def test_every_field_of_peft_has_a_rule() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    from sapmerge.io.config import NEUTRAL, READ, REFUSED

    known = set(NEUTRAL) | set(REFUSED) | set(READ)
    assert {field.name for field in fields(LoraConfig)} <= known
