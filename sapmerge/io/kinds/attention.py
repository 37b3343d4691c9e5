"""nn.MultiheadAttention, as in OpenAI's CLIP and open_clip:
LoRA on `in_proj` and on `out_proj` of one module.

PEFT stores the first under the module's name ("attn.lora_A", an update (3 d, d)) and the second
inside of its base layer ("attn.base_layer.out_proj.lora_A").
"""

from __future__ import annotations

__all__ = ["TWICE"]

TWICE = 2.0
"""PEFT adds the update of `out_proj` twice, in the forward pass, so also in training,
and in merging (0.17 to 0.21.2).

`MultiheadAttention.merge` adds it to the weight and then calls `out_proj.merge`. So what an adapter
learned is twice what it stores, and half is written.
A test compares with the PEFT that is installed.
"""
