"""Tiny models, batches and adapters; and the oracle: plain autograd on the dense weight W0 + D."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sapmerge as sm
from sapmerge.anchors import Anchors
from sapmerge.io.adapter import Adapter
from sapmerge.io.modules import Module
from tests.conftest import Anchored

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PIXELS = {"image_size": 8, "patch_size": 4}
IMAGE_TOKEN = 45

VISION_TARGETS = r".*vision_model.*(q_proj|fc1)"
TEXT_TARGETS = r".*text_model.*(v_proj|fc2)"
BOTH_TARGETS = r".*(vision|text)_model.*(q_proj|fc2)"


def clip(attention: str = "sdpa") -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    special = {
        "eos_token_id": 49,
        "bos_token_id": 48,
        "pad_token_id": 0,
        "max_position_embeddings": 12,
    }
    config = CLIPConfig(
        text_config=TEXT | special, vision_config=VISION | PIXELS, projection_dim=12
    )
    config._attn_implementation = attention
    return louder(CLIPModel(config).eval())


def siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    config = SiglipConfig(
        text_config=TEXT | {"max_position_embeddings": 12, "projection_size": 16},
        vision_config=VISION | PIXELS,
    )
    return louder(SiglipModel(config).eval())


def dual_encoder() -> nn.Module:
    from transformers import (
        BertConfig,
        BertModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(**VISION, **PIXELS))
    text = BertModel(BertConfig(**TEXT, max_position_embeddings=12))
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=12
    )
    return louder(VisionTextDualEncoderModel(config, vision, text).eval())


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return louder(
        LlamaForCausalLM(LlamaConfig(**TEXT, max_position_embeddings=32, pad_token_id=0)).eval()
    )


def llava() -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, **PIXELS),
        text_config=LlamaConfig(**TEXT, max_position_embeddings=32, pad_token_id=0),
        image_token_id=IMAGE_TOKEN,
    )
    return louder(LlavaForConditionalGeneration(config).eval())


def louder(model: nn.Module) -> nn.Module:
    """Random weights of a size at which gradients are not tiny."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(0, 0.25)
    return model


class Plain(nn.Module):
    """Embedding, convolutions and linear layers, one of them used twice; ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.same = nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", dilation=1)
        self.line = nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=2)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.active = nn.ReLU(inplace=True)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.same(self.active(self.conv(images))).tanh()
        image = self.line(found.flatten(2)).mean(-1)
        image = self.twice(torch.tanh(self.twice(image)))
        text = self.twice(self.words(ids).mean(1))
        return self.head(image), self.head(text)


def plain_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    image, text = model(**batch)
    return (image - text).square().sum(-1).mean()


def pairs(
    sizes: Sequence[int] = (3, 4), seed: int = 5, masked: bool = True
) -> list[dict[str, Tensor]]:
    """Image-text batches."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        ids = torch.randint(1, 44, (size, 7), generator=generator)
        ids[:, -1] = 49
        batch = {"input_ids": ids, "pixel_values": torch.randn(size, 3, 8, 8, generator=generator)}
        if masked:
            batch["attention_mask"] = torch.ones_like(ids)
        out.append(batch)
    return out


def prompts(sizes: Sequence[int] = (3, 2), seed: int = 6) -> list[dict[str, Tensor]]:
    """LLaVA batches: four image tokens, text, padding."""
    out = pairs(sizes, seed)
    for batch in out:
        ids = batch["input_ids"]
        ids = torch.cat(
            [
                torch.full((len(ids), 4), IMAGE_TOKEN),
                ids,
                torch.zeros(len(ids), 2, dtype=torch.long),
            ],
            1,
        )
        batch["input_ids"], batch["attention_mask"] = ids, (ids != 0).long()
    return out


def sentences(sizes: Sequence[int] = (3, 2)) -> list[dict[str, Tensor]]:
    return [
        {key: value for key, value in batch.items() if key != "pixel_values"}
        for batch in pairs(sizes)
    ]


def mean_loss(model: nn.Module, loader: list[Any], loss: Any) -> float:
    """Of all samples of the batches, which may differ in size."""
    sizes = [len(batch["input_ids"]) for batch in loader]
    with torch.no_grad():
        return sum(n * float(loss(model, batch)) for n, batch in zip(sizes, loader)) / sum(sizes)


def plain_batches(sizes: Sequence[int] = (3, 4)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "images": torch.randn(size, 3, 6, 6, generator=generator),
            "ids": torch.randint(0, 11, (size, 5), generator=generator),
        }
        for size in sizes
    ]


def with_peft(
    model: nn.Module, targets: Any, rank: int = 3, seed: int = 1, name: str = "default", **more: Any
) -> Any:
    """A PeftModel over a copy of the model, its adapter filled with random numbers."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in made.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made.eval()


def adapter(peft_model: Any, label: str, name: str = "default") -> Adapter:
    return Adapter.from_peft_model(peft_model, name, label=label)


def adapters(
    model: nn.Module, targets: Sequence[Any], ranks: Sequence[int] = (3, 2, 4), **more: Any
) -> tuple[list[Adapter], list[Any]]:
    """One adapter per entry of `targets`, called a0, a1, ...;
    and the PeftModels that they come from.
    """
    made = [with_peft(model, t, ranks[k], k + 1, **more) for k, t in enumerate(targets)]
    return [adapter(peft, f"a{k}") for k, peft in enumerate(made)], made


def merge(*args: Any, **kwargs: Any) -> sm.Merged:
    return sm.merge(*args, progress=False, **kwargs)


class Spy:
    """A scorer that keeps what it sees; all gradients are those of the whole, not of halves."""

    def __init__(self, statistic: str = "mean", at: str = "adapter") -> None:
        self.statistic, self.at = statistic, at
        self.values: dict[tuple[str, str, str], Tensor] = {}
        self.gradient: dict[tuple[str, str, str], Tensor] = {}

    def __call__(self, values: Tensor, stats: Any) -> Tensor:
        if getattr(stats, "half", None) is None:
            key = (stats.adapter, stats.layer, stats.part)
            self.values[key], self.gradient[key] = values, stats.moment(self.statistic, self.at)
        return values.abs()


def spied(
    layers: Iterable[sm.Layer],
    units: Any,
    wrap: Callable[[Any], Any] = lambda method: method,
    statistic: str = "mean",
    at: str = "adapter",
) -> Spy:
    """What a scorer sees in the layers, in the coordinates of a unit."""
    spy = Spy(statistic, at)
    sm.prepare(wrap(sm.Chain(sm.Prune(spy, sm.TopFraction(0.5), units=units), sm.Mean())), layers)
    return spy


def anchored(
    model: nn.Module,
    batches: Any,
    updates: Sequence[Mapping[str, sm.Update]],
    loss: Any = None,
    budget: int = 1 << 30,
) -> tuple[Anchors, Anchored]:
    """Anchors and layers for updates that are in no file, so that they can be float64."""
    shapes = {name: update.shape for found in updates for name, update in found.items()}
    modules = {
        name: Module(
            name, name, "linear", shape, 1, 1.0, 1.0, torch.float32, (1, shape[1]), (shape[0], 1)
        )
        for name, shape in shapes.items()
    }
    readers = [(f"a{k}", lambda found=found: found) for k, found in enumerate(updates)]
    anchors = Anchors(model, batches, modules, readers, loss, budget=budget)
    like = next(iter(updates[0].values())).dense()
    labels = tuple(label for label, _ in readers)
    layers = [
        sm.Layer(
            name,
            tuple(found[name] if name in found else sm.absent(shape, like) for found in updates),
            adapters=labels,
        )
        for name, shape in shapes.items()
    ]
    return anchors, Anchored(layers, anchors)


def random_updates(
    model: nn.Module, names: Sequence[str], rank: int, seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, sm.Update]:
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, sm.Update] = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        m, n = (
            (weight.shape[1], weight.shape[0])
            if isinstance(module, nn.Embedding)
            else (
                weight.shape[0],
                weight[0].numel(),
            )
        )
        B = torch.randn(m, rank, generator=generator, dtype=torch.float64) * 0.2
        A = torch.randn(rank, n, generator=generator, dtype=torch.float64) * 0.2
        out[name] = sm.LowRank(B.to(dtype), A.to(dtype))
    return out


class _Plus(nn.Module):
    """The weight W0 + D, with D (outputs, inputs) a parameter."""

    def __init__(self, change: Tensor, transposed: bool) -> None:
        super().__init__()
        self.change, self.transposed = nn.Parameter(change), transposed

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.change.T if self.transposed else self.change.reshape(weight.shape))


def dense_gradients(
    model: nn.Module, updates: Mapping[str, sm.Update], batches: Iterable[Any], loss: Any
) -> tuple[float, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Plain autograd on a copy of the model with weights W0 + D.

    Returns:
        The loss and dL/dD (m, n) per layer, means over the samples of all batches;
        and dL/dD of every batch.
    """
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    changes: dict[str, nn.Parameter] = {}
    for name, update in updates.items():
        module = model.get_submodule(name)
        plus = _Plus(update.dense().to(module.weight.dtype), isinstance(module, nn.Embedding))
        parametrize.register_parametrization(module, "weight", plus)
        changes[name] = plus.change
    total, count, sums, each = 0.0, 0, {}, []
    for batch in batches:
        size = len(next(iter(batch.values())))
        value = loss(model, batch)
        grads = torch.autograd.grad(value, list(changes.values()), allow_unused=True)
        found = {
            name: torch.zeros_like(change) if grad is None else grad
            for (name, change), grad in zip(changes.items(), grads)
        }
        each.append(found)
        total, count = total + float(value.detach()) * size, count + size
        for name, grad in found.items():
            sums[name] = sums.get(name, 0.0) + grad * size
    return total / count, {name: grad / count for name, grad in sums.items()}, each


def singles(batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same samples, one per batch."""
    return [
        {key: value[s : s + 1] for key, value in batch.items()}
        for batch in batches
        for s in range(len(next(iter(batch.values()))))
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a merge must leave as it was."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": {
            n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "asking": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {
            name: (
                list(module._forward_hooks.values()),
                list(module._forward_pre_hooks.values()),
                list(module._backward_hooks.values()),
            )
            for name, module in model.named_modules()
        },
        "disabled": {
            name: module.disable_adapters
            for name, module in model.named_modules()
            if isinstance(getattr(module, "disable_adapters", None), bool)
        },
    }


def assert_same_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for kind in ("training", "asking", "hooks", "disabled"):
        assert before[kind] == after[kind], kind
    for kind in ("weights", "grads"):
        assert before[kind].keys() == after[kind].keys()
        for name, tensor in before[kind].items():
            other = after[kind][name]
            assert (tensor is None and other is None) or torch.equal(tensor, other), (kind, name)


def load(base: nn.Module, path: Any) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()
