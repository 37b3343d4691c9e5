"""Mutation of what other kinds of adapters bring: banks of experts, magnitudes, and the pickle
beside an adapter of LLaVA.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import tempfile
from typing import Any

import torch
from torch import Tensor

from tests.corpus.build import good_config, good_tensors
from tests.corpus.configs import bank, magnitudes

__all__ = ["RAN", "beside_seed", "kinds_seed", "mutate_beside", "mutate_kinds"]

RAN = os.path.join(tempfile.gettempdir(), f"fuzz-ran-{os.getuid()}")
"""The folder that code in a pickle makes if it runs."""

_PROJECTOR = "base_model.model.model.mm_projector.{}"
_NAMES = [
    "base_model.model.model.mm_projector.0.weight",
    "model.mm_projector.2.bias",
    "model.layers.0.self_attn.q_proj.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "lm_head.weight",
    "model.vision_tower.x",
    "",
    "../../x",
    "mm_projector\x07.weight",
]


class _Code:
    """A pickle that runs code where it is read without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (RAN,)


def kinds_seed(kind: str) -> bytes:
    """Config and names of a good adapter with a bank ("banks") or with magnitudes ("dora")."""
    config, tensors = good_config(), dict(good_tensors())
    if kind == "banks":
        config |= {"peft_version": "0.21.2", "target_parameters": ["mlp.experts.gate_up_proj"]}
        tensors |= bank("", 8)
    else:
        config |= {"use_dora": True}
        tensors |= magnitudes()
    listed = [[name, tensor.dtype, tensor.shape] for name, tensor in tensors.items()]
    return json.dumps([config, listed]).encode()


def mutate_kinds(data: bytes, rng: random.Random) -> bytes | None:
    """Wrong counts of experts, nests, versions and sizes of magnitudes; None where it is no input
    of this form any more.
    """
    try:
        config, listed = json.loads(data)
        special = [one for one in listed if "experts" in one[0] or "magnitude" in one[0]]
        one = rng.choice(special)
        kind = rng.randrange(6)
        if kind == 0:  # another count: rows of A, columns of B, or both
            for other in special if rng.random() < 0.5 else [one]:
                at = 0 if "lora_B" not in other[0] else 1
                other[2][at] = rng.choice((0, 1, 3, 4, 7, 12, 16, 4096, 2**40))
        elif kind == 1:
            one[2] = [*one[2], 1] if rng.random() < 0.5 else one[2][:-1]
        elif kind == 2:
            one[0] = one[0].replace("experts", rng.choice(("experts.base_layer", "experts.0", "x")))
        elif kind == 3:
            versions = ("0.17.0", "0.18.1", "0.19.1", "9", "", None, 3, "0.x")
            config["peft_version"] = rng.choice(versions)
            config["lora_B_layout"] = rng.choice((None, "expert_major", "rank_major", "x", 1))
        elif kind == 4:
            names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "experts.w", "", "a.b"]
            config["target_parameters"] = rng.sample(names, rng.randrange(4))
        else:
            listed.append([one[0] + rng.choice((".weight", ".default", "")), one[1], one[2]])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return json.dumps([config, listed]).encode()


def _saved(table: object) -> bytes:
    out = io.BytesIO()
    torch.save(table, out)
    return out.getvalue()


def beside_seed() -> bytes:
    """`non_lora_trainables.bin` as the original code of LLaVA writes it."""
    shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,)}
    return _saved({_PROJECTOR.format(k): torch.ones(shape) for k, shape in shapes.items()})


def mutate_beside(data: bytes, rng: random.Random) -> bytes:
    """Another table: strange names, values that are no tensors, and code."""
    kind = rng.randrange(4)
    if kind == 0:
        return pickle.dumps({_PROJECTOR.format("0.weight"): _Code()})
    if kind == 1:
        return _saved(rng.choice(([torch.ones(2)], torch.ones(2), {}, {1: torch.ones(2)}, "x")))
    values: list[Any] = [
        torch.ones(2, 3),
        torch.full((2,), float("nan")),
        torch.ones(2, dtype=torch.int64),
        torch.ones(0, 4),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(4, 4).to_sparse(),
        torch.ones(4, 4)[:, 1],
        torch.ones(1).expand(1000, 1000),
        {"a": torch.ones(1)},
        3,
        None,
        torch.nn.Parameter(torch.ones(2)),
    ]
    table: dict[str, Tensor] = {
        rng.choice(_NAMES): rng.choice(values) for _ in range(rng.randrange(1, 4))
    }
    return _saved(table)
