"""kohya's names of modules: the dots are underscores, so a name has to be parsed.

A name is read as the words that modules of Stable Diffusion have; there is one way for each, or it
is refused. Blocks may be counted as diffusers does (`down_blocks_1_attentions_0`) or as the
original code (`input_blocks_4_1`), of which SD 1, SD 2 and SDXL have three to a level.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

__all__ = ["flattened", "unflattened"]

_UNET = (
    "down_blocks mid_block up_blocks attentions resnets downsamplers upsamplers transformer_blocks "
    "attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out time_emb_proj conv conv1 conv2 "
    "conv_in conv_out conv_shortcut time_embedding add_embedding linear_1 linear_2"
)
_TEXT = (
    "text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection"
)
_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_LEVEL = 3  # blocks per level: two layers and what follows them


def flattened(module: str) -> str:
    """The name as kohya writes it."""
    return module.replace(".", "_")


def unflattened(flat: str, component: str) -> str | None:
    """The module of a flat name, as diffusers calls it; None where there is no such, or several.

    Args:
        flat: without the prefix of its component.
        component: "unet", or one of the text encoders.

    Example:
        >>> unflattened("input_blocks_4_1_transformer_blocks_0_attn1_to_out_0", "unet")
        'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0'
    """
    if component == "unet":
        return _original(flat) or _parsed(flat, _UNET)
    return _parsed(flat, _TEXT)


def _parsed(flat: str, words: str) -> str | None:
    found = list(_parses(flat.split("_"), frozenset(words.split())))
    return found[0] if len(found) == 1 else None


def _parses(pieces: Sequence[str], words: frozenset[str]) -> Iterator[str]:
    """Every way to read the pieces as words and numbers."""
    if not pieces:
        yield ""
    for end in range(1, min(len(pieces), 3) + 1):
        word = "_".join(pieces[:end])
        if word in words or (end == 1 and word.isdigit()):
            for rest in _parses(pieces[end:], words):
                yield f"{word}.{rest}" if rest else word


def _original(flat: str) -> str | None:
    """A name of the original code; None for any other."""
    if flat in _TOP:
        return _TOP[flat]
    middle = re.fullmatch(r"middle_block_([012])_(.+)", flat)
    if middle:
        place = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
        return _inner(place[int(middle[1])], middle[2])
    match = re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", flat)
    if not match:
        return None
    number, inner, rest = int(match[2]), int(match[3]), match[4]
    if match[1] == "input":
        level, layer = divmod(number - 1, _LEVEL)
        if rest == "op":
            return f"down_blocks.{level}.downsamplers.0.conv" if layer == 2 and not inner else None
        block = f"down_blocks.{level}"
    else:
        level, layer = divmod(number, _LEVEL)
        if rest == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv" if layer == 2 and inner else None
        block = f"up_blocks.{level}"
    if number < (match[1] == "input") or inner > 1:
        return None
    return _inner(f"{block}.{('resnets', 'attentions')[inner]}.{layer}", rest)


def _inner(place: str, rest: str) -> str | None:
    if ".resnets." in place:
        return f"{place}.{_RESNET[rest]}" if rest in _RESNET else None
    found = _parsed(rest, _UNET)
    return None if found is None else f"{place}.{found}"
