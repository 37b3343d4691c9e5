"""Models of random weights, adapters of random numbers, anchors of noise:
what is timed does not depend on them.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import sapmerge as sm

LINEAR = "(q_proj|k_proj|v_proj|out_proj|o_proj|fc1|fc2|gate_proj|up_proj|down_proj)"
RANK = 16


@dataclass(frozen=True)
class Shape:
    """A model to measure.

    Args:
        title: what the table calls it.
        config: makes a transformers config.
        layers: part of the network -> how many layers it has.
        anchors: how many.
        size: of a batch.
        adapters: the numbers K of adapters.
        slow: measure only what an aim was set for.
    """

    title: str
    config: Any
    layers: dict[str, int]
    anchors: int
    size: int
    adapters: tuple[int, ...]
    slow: bool = False

    @property
    def shared(self) -> str:
        """The part that runs adapted while the other, of which there is nothing to learn,
        runs once.
        """
        return "language_model" if "language_model" in self.layers else "vision_model"

    def targets(self, where: str) -> str:
        """The modules that are adapted: "everywhere", in the "shared" part only,
        or in the "last half" of the layers.

        The last half of a LLaVA is that of its language model:
        the whole vision tower comes before it.
        """
        parts = (
            [self.shared]
            if where == "shared" or "language_model" in self.layers
            else list(self.layers)
        )
        if where == "everywhere":
            parts = list(self.layers)
        found: list[str] = []
        for part in parts:
            count = self.layers[part]
            numbers = range(count // 2 if where == "last half" else 0, count)
            found.append(rf"{part}\..*layers\.({'|'.join(map(str, numbers))})\.")
        return rf".*({'|'.join(found)}).*{LINEAR}"


def _clip(
    width: int, depth: int, heads: int, patch: int, text: int, projection: int, text_depth: int = 12
) -> Any:
    from transformers import CLIPConfig

    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    vision |= {"num_attention_heads": heads, "patch_size": patch, "projection_dim": projection}
    words = {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text // 64}
    words |= {"projection_dim": projection, "num_hidden_layers": text_depth}
    return CLIPConfig(text_config=words, vision_config=vision, projection_dim=projection)


def _llava(width: int, depth: int, inner: int, heads: int, tower: int = 12) -> Any:
    """A Llama, and the vision tower of ViT-B/32."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(patch_size=32, num_hidden_layers=tower)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=32064,
        max_position_embeddings=2048,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)


def _small_clip() -> Any:
    return _clip(512, 4, 8, 32, 256, 256, 4)


FULL = (
    Shape(
        "CLIP ViT-B/32",
        lambda: _clip(768, 12, 12, 32, 512, 512),
        {"vision_model": 12, "text_model": 12},
        32,
        16,
        (1, 4, 16),
    ),
    Shape(
        "CLIP ViT-L/14",
        lambda: _clip(1024, 24, 16, 14, 768, 768),
        {"vision_model": 24, "text_model": 12},
        4,
        4,
        (4,),
        slow=True,
    ),
    Shape(
        "LLaVA, 1.1B parameters",
        lambda: _llava(2048, 16, 8192, 32),
        {"vision_tower": 12, "language_model": 16},
        4,
        4,
        (4,),
        slow=True,
    ),
)
QUICK = (
    Shape("a small CLIP", _small_clip, {"vision_model": 4, "text_model": 4}, 8, 4, (4,)),
    Shape(
        "a small LLaVA",
        lambda: _llava(512, 4, 1024, 8, 4),
        {"vision_tower": 4, "language_model": 4},
        4,
        2,
        (4,),
        slow=True,
    ),
)


@dataclass(frozen=True)
class Setup:
    """A model twice over the same weights: plain, and wrapped by PEFT with all adapters loaded;
    and the anchors.

    Args:
        base: the plain model.
        wrapped: the PeftModel, with adapters "a0", "a1", ...
        adapters: the same ones, as sapmerge reads them.
        batches: of anchors.
    """

    base: nn.Module
    wrapped: Any
    adapters: list[sm.Adapter]
    batches: list[dict[str, Tensor]]

    @property
    def parameters(self) -> int:
        """The parameters of one adapter."""
        return sum(p.numel() for name, p in self.wrapped.named_parameters() if ".a0." in name)


def setup(shape: Shape, where: str, count: int) -> Setup:
    """A model with `count` adapters."""
    torch.manual_seed(0)
    config = shape.config()
    base = _model(config).eval()
    wrapped = _with_adapters(base, shape.targets(where), count)
    adapters = [sm.Adapter.from_peft_model(wrapped, f"a{k}") for k in range(count)]
    starts = range(0, shape.anchors, shape.size)
    return Setup(base, wrapped, adapters, [_batch(config, shape.size, start) for start in starts])


def _model(config: Any) -> nn.Module:
    from transformers import CLIPModel, LlavaForConditionalGeneration

    return (CLIPModel if config.model_type == "clip" else LlavaForConditionalGeneration)(config)


def _with_adapters(base: nn.Module, targets: str, count: int) -> Any:
    twin = copy.deepcopy(
        base, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    )
    settings = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=targets, init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(twin, settings, adapter_name="a0")
        for k in range(1, count):
            wrapped.add_adapter(f"a{k}", settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.02)
    return wrapped.eval()


def _batch(config: Any, size: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 224, 224, generator=generator)
    ids = torch.randint(1, 30000, (size, 24), generator=generator)
    if config.model_type == "clip":
        ids[:, -1] = 49407
    else:
        image = torch.full(
            (size, (224 // config.vision_config.patch_size) ** 2), config.image_token_id
        )
        ids = torch.cat([image, ids], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
