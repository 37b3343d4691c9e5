"""The model that the good adapter is for: the names and shapes of a small Llama, and no more."""

from __future__ import annotations

from typing import Any

from torch import nn


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(16, 8, bias=False), nn.Linear(16, 16, bias=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(16, 16, bias=False)})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(16, bias=False)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.conv = nn.Conv2d(3, 8, 3)
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.config = {"model_type": "llama"}

    def prepare_inputs_for_generation(self, **inputs: Any) -> dict[str, Any]:
        return inputs


def tiny() -> Tiny:
    return Tiny()
