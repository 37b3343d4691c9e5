"""The spellings of one module's name. Keys made here match names with each other;
they are never written.

transformers 5 renamed modules, classes wrap each other (`model.layers` of a text model is
`model.language_model.layers` of its multimodal one), and torch.compile, DistributedDataParallel,
FSDP and checkpointing leave their own names inside.
Sources of the table: `transformers/conversion_mapping.py`, and the original code of LLaVA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["FAMILIES", "STYLES", "Stem", "alike", "canonical", "plain", "respelled", "stem"]

# Modules that hold one module each and are no part of its name. "module" may be a true name too:
# see `plain`.
WRAPPERS = frozenset(
    [
        "_orig_mod",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_forward_module",
    ]
)


def plain(name: str) -> str:
    """The name without wrappers: all of `WRAPPERS`, and `module` in front or beside one of them.

    Example:
        >>> plain("module._orig_mod.model.layers.0._fsdp_wrapped_module.mlp.up_proj")
        'model.layers.0.mlp.up_proj'
    """
    if "mod" not in name and "_f" not in name and "_checkpoint" not in name:
        return name
    parts = name.split(".")
    kept = [
        part
        for at, part in enumerate(parts)
        if part not in WRAPPERS
        and not (
            part == "module"
            and at + 1 < len(parts)
            and (
                all(p == "module" or p in WRAPPERS for p in parts[:at])
                or not WRAPPERS.isdisjoint(parts[at - 1 : at + 2])
            )
        )
    ]
    return ".".join(kept) or name


# Old and new templates: {i}, {j} are numbers, {rest} anything, and {head} nothing or a path that
# ends with a dot.
_VIT = r"(?:vit|deit|beit|ijepa|vivit|audio_spectrogram_transformer)\."
_DINO = r"dinov2(?:_with_registers)?\."
_Q, _K, _V = ("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")
_TABLE: tuple[tuple[str, str, str], ...] = (
    *(
        (_VIT, f"encoder.layer.{{i}}.{old}", f"layers.{{i}}.{new}")
        for old, new in (
            *((f"attention.attention.{old}", f"attention.{new}") for old, new in (_Q, _K, _V)),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        )
    ),
    *(
        (_DINO, f"encoder.layer.{{i}}.attention.{old}", f"encoder.layer.{{i}}.attention.{new}")
        for old, new in (
            *((f"attention.{old}", new) for old, new in (_Q, _K, _V)),
            ("output.dense", "o_proj"),
        )
    ),
    (r"segformer\.", "encoder.patch_embeddings.{i}.proj", "stages.{i}.patch_embeddings.proj"),
    *(
        (r"segformer\.", f"encoder.block.{{i}}.{{j}}.{old}", f"stages.{{i}}.blocks.{{j}}.{new}")
        for old, new in (
            *((f"attention.self.{old}", f"attention.{new}") for old, new in (_Q, _K, _V)),
            ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
            ("attention.output.dense", "attention.o_proj"),
            ("mlp.dense1", "mlp.fc1"),
            ("mlp.dense2", "mlp.fc2"),
            ("mlp.dwconv.dwconv", "mlp.dwconv.dwconv"),
        )
    ),
    *(
        (
            r"(?:swin|donut_swin)\.",
            f"encoder.layers.{{i}}.blocks.{{j}}.{old}",
            f"encoder.layers.{{i}}.blocks.{{j}}.{new}",
        )
        for old, new in (
            *((f"attention.self.{old}", f"attention.{new}") for old, new in (_Q, _K, _V)),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        )
    ),
    # Multimodal models whose towers moved below `model.`. Order counts: the first that fits.
    ("", "language_model.lm_head", "lm_head"),
    ("", "language_model.model.{rest}", "model.language_model.{rest}"),
    ("", "vision_tower.vision_model.{rest}", "model.vision_tower.{rest}"),
    ("", "model.vision_tower.vision_model.{rest}", "model.vision_tower.{rest}"),
    ("", "model.vision_tower.vision_tower.vision_model.{rest}", "model.vision_tower.{rest}"),
    ("", "model.vision_tower.vision_tower.{rest}", "model.vision_tower.{rest}"),
    ("", "model.mm_projector.0", "model.multi_modal_projector.linear_1"),
    ("", "model.mm_projector.2", "model.multi_modal_projector.linear_2"),
    ("", "vision_tower.{rest}", "model.vision_tower.{rest}"),
    ("", "image_tower.{rest}", "model.image_tower.{rest}"),
    ("", "video_tower.{rest}", "model.video_tower.{rest}"),
    ("", "audio_tower.{rest}", "model.audio_tower.{rest}"),
    ("", "multi_modal_projector.{rest}", "model.multi_modal_projector.{rest}"),
    ("", "visual.{rest}", "model.visual.{rest}"),
)
_HOLES = {"{i}": r"(?P<i>\d+)", "{j}": r"(?P<j>\d+)", "{rest}": r"(?P<rest>.+)"}


class _Rule(NamedTuple):
    old: re.Pattern[str]
    new: re.Pattern[str]
    old_template: str
    new_template: str


def _compiled(head: str, template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for hole, pattern in _HOLES.items():
        text = text.replace(re.escape(hole), pattern)
    return re.compile((f"(?P<head>(?:.*\\.)?{head})" if head else "(?P<head>)") + text)


_ONE_TOWER = sum(1 for head, _, _ in _TABLE if head)
_RULES = tuple(
    _Rule(_compiled(head, old), _compiled(head, new), old, new) for head, old, new in _TABLE
)


# and all others have an encoder
_STARTS = tuple({old.partition("{")[0] for head, old, _ in _TABLE if not head})


def _filled(template: str, found: re.Match[str]) -> str:
    return found["head"] + template.format(**found.groupdict())


def canonical(name: str, config: Mapping[str, object] | None = None) -> str:
    """A key that is the same for the spellings of one module that transformers 4,
    5 and wrappers give it.

    It looks like the name in transformers 5 and is not always one (Llama 4 keeps
    `language_model.model.`): match with it, and write what the files or the model say.

    Args:
        name: without "base_model.model.".
        config: not used: a base model's name says nothing about the names of its modules.

    Example:
        >>> canonical("vit.encoder.layer.0.attention.attention.query")
        'vit.layers.0.attention.q_proj'
        >>> canonical("module.language_model.model.layers.0.mlp.up_proj")
        'model.language_model.layers.0.mlp.up_proj'
        >>> canonical("bert.encoder.layer.0.output.dense")
        'bert.encoder.layer.0.output.dense'
    """
    name = plain(name)
    if "module." in name:
        parts = name.split(".")
        name = ".".join(
            part for at, part in enumerate(parts) if part != "module" or at + 1 == len(parts)
        )
    if not name.startswith(_STARTS) and "encoder." not in name:
        return name
    for rule in _RULES:
        if (match := rule.old.fullmatch(name)) is not None:
            return _filled(rule.new_template, match)
    return name


class Stem(NamedTuple):
    """What is left of a key without the models around it,
    and which tower it is in ("" where the key does not say).
    """

    path: str
    tower: str


_TOWER = re.compile(
    r"(?:(?P<text>(?:language_model|text_model)\.(?:model\.)?)"
    r"|(?P<tower>vision_tower|vision_model|visual|image_tower|video_tower|audio_tower)\.)"
)
# What wraps a bare model: `base_model_prefix` of transformers' classes.
_BASES = re.compile(
    r"(?:transformer|bert|roberta|xlm_roberta|distilbert|electra|albert|camembert|deberta|mpnet|vit|deit|beit|dinov2|"
    r"gpt_neox|swin|segformer|esm|wav2vec2|hubert|clip|siglip)\."
)


def stem(key: str) -> Stem:
    """A key without the names of the classes around a tower:
    what two spellings of one module have in common.

    Example:
        >>> stem("model.language_model.layers.0.mlp.up_proj")
        Stem(path='layers.0.mlp.up_proj', tower='text')
        >>> stem("model.layers.0.mlp.up_proj")
        Stem(path='layers.0.mlp.up_proj', tower='')
    """
    path = key.removeprefix("thinker.").removeprefix("model.")
    match = _TOWER.match(path)
    if match is not None:
        return Stem(path[match.end() :], "text" if match["text"] else match["tower"])
    base = _BASES.match(path)
    return Stem(path if base is None else path[base.end() :], "")


def alike(one: str, other: str, same_class: bool = False) -> bool:
    """Whether two different keys may be spellings of one module.

    A key that names no tower may be in the language model: decoders are saved from their text class
    too. A bare encoder may be of any tower, so it counts only between adapters of one class.
    """
    (path, tower), (other_path, other_tower) = stem(one), stem(other)
    if path != other_path:
        return False
    if tower == other_tower:
        return True
    if tower and other_tower:
        return False
    bare_encoder = path.startswith(("encoder.", "embeddings."))
    return same_class if bare_encoder else "text" in (tower, other_tower) or same_class


STYLES = ("transformers 5", "transformers 4", "llava")
FAMILIES = ("llava", "qwen", "")
_ORIGINAL_LLAVA = (
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"),
    ("model.multi_modal_projector.linear_2", "model.mm_projector.2"),
)
# (new prefix, old prefix) of transformers 4.51 and before.
_OLDER = {
    "llava": (
        ("lm_head", "language_model.lm_head"),
        ("model.language_model.", "language_model.model."),
        *(
            (f"model.vision_tower.{part}", f"vision_tower.vision_model.{part}")
            for part in (
                "encoder.layers.",
                "embeddings.",
                "pre_layrnorm",
                "post_layernorm",
                "head.",
            )
        ),
        ("model.", ""),
    ),
    "qwen": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "": (),
}


def respelled(key: str, style: str, family: str) -> str:
    """A key as one of `STYLES` spells the module.

    Args:
        key: as `canonical` gives it, with `model.language_model.` for the text layers of a
            multimodal model.
        style: "transformers 5"; "transformers 4" (4.51 and before; PEFT reads it in later ones
            too); "llava", the original code.
        family: "llava" (towers beside `language_model.model`),
            "qwen" (text layers were `model.layers`), "" (neither).
    """
    if style == "transformers 5":
        return key
    for new, old in _ORIGINAL_LLAVA if style == "llava" else _OLDER[family]:
        if key.startswith(new):
            return old + key[len(new) :]
    if style == "transformers 4" and not family:
        for rule in _RULES[:_ONE_TOWER]:
            if (match := rule.new.fullmatch(key)) is not None:
                return _filled(rule.old_template, match)
    return key
