"""What else lies in the folder of an adapter: weights that are not read,
and the way on where there is no adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable

from sapmerge.io.files import shown

__all__ = ["unread_weights", "way_on"]

_WEIGHTS_END = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".npz",
    ".h5",
    ".msgpack",
    ".pkl",
    ".th",
)
# What trainers leave to go on from: it changes no model.
_STATE = re.compile(
    r"(?:optimizer|optim|scheduler|lr_scheduler|scaler|sampler|dl_state|trainer_state|training_state|rng_state|"
    r"random_states|training_args|zero_pp_rank|mp_rank|bf16_zero_pp_rank|events)\b.*|.*_(?:optim|rng)_states?\..*"
    r"|(?:rng_state|random_states|zero_pp_rank|mp_rank|bf16_zero_pp_rank|sampler|optimizer|scheduler)_.*"
)
_SHOWN = 8
_CONVERT = "sapmerge.convert(source, output) makes a PEFT folder of it"
_OTHERS = {
    "adapters.safetensors": f"an adapter of MLX: {_CONVERT}",
    "pytorch_lora_weights.safetensors": f"a LoRA in the format of diffusers: {_CONVERT}",
    "pytorch_lora_weights.bin": "a LoRA in the format of diffusers, and a pickle; save it there as "
    "safetensors",
    "adapter_model.pt": f"an adapter of torchtune: {_CONVERT}",
}
"""Names of other formats, and what they are."""
_MODEL = re.compile(r"(?:pytorch_|tf_)?model(?:-\d+-of-\d+)?\.(?:safetensors|bin|h5)")
"""The weights of a whole model."""


def unread_weights(names: Collection[str], read: Collection[str]) -> str | None:
    """What to warn of: files with weights that nobody reads; None where there are none."""
    unread = sorted(name for name in set(names) - set(read) if _holds_weights(name))
    if not unread:
        return None
    more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
    return (
        f"{', '.join(map(shown, unread[:_SHOWN]))}{more} beside the adapter may hold trained "
        "weights (a value head, a "
        "projector, new token rows), and nothing of it is read: the merge is without them"
    )


def _holds_weights(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(_WEIGHTS_END) and _STATE.fullmatch(lower) is None


def way_on(folder: str, names: Iterable[str], config: str) -> str:
    """What to do with a folder that is not an adapter's, from the names of what lies there."""
    names = sorted(names)
    inside = [name for name in names if os.path.isfile(os.path.join(folder, name, config))]
    if inside:
        return (
            f"{', '.join(map(shown, inside[:_SHOWN]))} in it "
            f"{'is an adapter' if len(inside) == 1 else 'are adapters'}: give {shown(inside[-1])} "
            "in it as the folder"
        )
    for name, what in _OTHERS.items():
        if name in names:
            return f"{name} is {what}"
    gguf = next((name for name in names if name.lower().endswith(".gguf")), None)
    if gguf is not None:
        return (
            f"{shown(gguf)} is an adapter of llama.cpp, which cannot be turned back; ask for "
            "the PEFT checkpoint"
        )
    if any(name.startswith(("zero_pp_rank", "mp_rank", "global_step")) for name in names):
        return (
            "it holds shards of DeepSpeed ZeRO: gather them with zero_to_fp32.py, and save the "
            "adapter again"
        )
    weights = [name for name in names if _holds_weights(name)]
    if "config.json" in names and any(map(_MODEL.fullmatch, names)):
        whole = next(name for name in names if _MODEL.fullmatch(name))
        return (
            f"it is a whole model ({shown(whole)}), no adapter: give it as the base, model=..., "
            "and the folder of an adapter here"
        )
    if weights:
        return (
            "nothing is downloaded for a local folder; it holds "
            f"{', '.join(map(shown, weights[:_SHOWN]))}, which "
            "is not read: save the adapter with PEFT's save_pretrained"
        )
    return "nothing is downloaded for a local folder; expected a folder written by save_pretrained"
