"""Small real adapters of every kind, and an oracle that knows nothing of sapmerge:
what PEFT makes of the base.

For any kind of adapter k, delta_k = state_dict(merge_and_unload(base + k)) - state_dict(base), and
a merge by `mean` is base + sum_k w_k delta_k / sum_k w_k:
B A, biases, token rows, magnitudes and experts alike.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sapmerge as sm

Make = Callable[[], nn.Module]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QV = ["q_proj", "v_proj"]


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **more}))


def biased_llama() -> nn.Module:
    return llama(attention_bias=True)


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    )


def captioner() -> nn.Module:
    """A ViT, whose Linear layers are square, before a GPT-2, whose Conv1D `c_proj` is."""
    from transformers import GPT2Config, VisionEncoderDecoderModel, ViTConfig
    from transformers import VisionEncoderDecoderConfig as Both

    torch.manual_seed(0)
    image: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": 32}
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1)
    config = Both.from_encoder_decoder_configs(ViTConfig(**image, **sizes), text)
    return VisionEncoderDecoderModel(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = {
        key: SMALL[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    }
    return BertForSequenceClassification(BertConfig(**small, num_hidden_layers=2, num_labels=3))


def qwen_moe(**more: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {
        "moe_intermediate_size": 20,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    } | more
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **sizes))


def square_moe() -> nn.Module:
    """hidden = 2 x inner: gate_up_proj is square, so shapes tell nothing about layouts."""
    return qwen_moe(moe_intermediate_size=16, num_experts=3)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:
    """Its experts are stored (experts, in, out), and say so."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
    return GptOssForCausalLM(
        GptOssConfig(**SMALL, **sizes, layer_types=["full_attention", "sliding_attention"])
    )


class _Block(nn.Module):
    """As in OpenAI's CLIP and open_clip: attention in one nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Tower(nn.Module):
    """Blocks of an open_clip tower."""

    def __init__(self, width: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


def tower() -> nn.Module:
    torch.manual_seed(0)
    return Tower()


def wide_tower() -> nn.Module:
    torch.manual_seed(1)
    return Tower(48, 6, 1)


class Mixed(nn.Module):
    """A convolution, an embedding and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.fc = nn.Embedding(12, 8), nn.Conv2d(3, 8, 3), nn.Linear(8, 6)


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed()


def train(
    folder: Path,
    make: Make,
    seed: int,
    spread: float = 0.1,
    config: type[Any] = LoraConfig,
    **settings: Any,
) -> Path:
    """A folder saved by PEFT; every trainable parameter moved away from its start,
    as training does.
    """
    if config is LoraConfig:
        settings.setdefault("init_lora_weights", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), config(**settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        path = folder / f"adapter-{seed}-{len(list(folder.iterdir()))}"
        model.save_pretrained(str(path))
    return path


def edit(
    path: Path,
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    tensors: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> Path:
    """Change a saved adapter, in a copy of it."""
    out = path.parent / f"{path.name}-edited-{len(list(path.parent.iterdir()))}"
    out.mkdir()
    settings = json.loads((path / "adapter_config.json").read_text())
    held = load_file(path / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config(settings) if config else settings))
    changed = tensors(held) if tensors else held
    save_file(
        {name: value.contiguous() for name, value in changed.items()},
        out / "adapter_model.safetensors",
    )
    return out


def state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors in float64, without PEFT's infix."""
    return {
        key.replace(".base_layer.", "."): value.detach().double().clone()
        for key, value in model.state_dict().items()
        if value.is_floating_point()
    }


def unloaded(make: Make, path: Path | str) -> dict[str, Tensor]:
    """The base with one adapter merged into it by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return state(PeftModel.from_pretrained(make(), str(path)).merge_and_unload())


def target(
    make: Make, paths: Sequence[Path], weights: Sequence[float] | None = None, total: bool = False
) -> dict[str, Tensor]:
    """base + sum_k w_k delta_k / sum_k w_k; without the division for a sum."""
    base, weights = state(make()), weights or [1.0] * len(paths)
    parts = [unloaded(make, path) for path in paths]
    whole = 1.0 if total else sum(weights)
    return {
        key: value + sum(w * (part[key] - value) for w, part in zip(weights, parts)) / whole
        for key, value in base.items()
    }


def compare(
    make: Make, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Every delta is right, relative to its own size; what must not move does not;
    and something moves.
    """
    base, moved = state(make()), 0
    for key, value in wanted.items():
        size, error = float((value - base[key]).norm()), float((got[key] - value).norm())
        moved += size > 1e-9
        assert error <= tolerance * max(size, 0.05), (
            f"{key} is off by {error / max(size, 1e-9):.1e}"
        )
    assert moved


def merged(paths: Sequence[Path], method: Any = None, **settings: Any) -> sm.Merged:
    """A merge that may warn."""
    settings.setdefault("rank", "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sm.merge([str(path) for path in paths], method=method or sm.mean(), **settings)


def check_sinks(
    make: Make,
    paths: Sequence[Path],
    folder: Path,
    *,
    weights: Sequence[float] | None = None,
    total: bool = False,
    tolerance: float = 1e-5,
    live: bool = True,
    **settings: Any,
) -> sm.Merged:
    """A mean (or sum) applied to the base, saved and loaded by PEFT, and added to a live model,
    against the oracle.
    """
    wanted = target(make, paths, weights, total)
    done = merged(paths, sm.task_arithmetic() if total else sm.mean(), weights=weights, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        done.apply_to(model)
        compare(make, state(model), wanted, tolerance)
        out = folder / "merged"
        done.save_pretrained(out)
        compare(make, unloaded(make, out), wanted, tolerance)
        again = sm.Adapter.load(out)
        assert sm.verify(out, [str(path) for path in paths]) == []
        assert len(again.modules) == len(done.run.stream.modules)
        if live:
            other = PeftModel.from_pretrained(make(), str(paths[0]), adapter_name="first")
            done.add_to(other, "both")
            other.set_adapter("both")
            compare(make, state(other.merge_and_unload(adapter_names=["both"])), wanted, tolerance)
    return done
