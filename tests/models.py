"""Small models, adapters trained by nobody, and PEFT as the oracle for both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PREFIX = "base_model.model."
DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "adapters"
BASE = "somebody/base"


class Block(nn.Module):
    """Two linear maps, so that names can be suffixes of each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.v = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(self.q(x)))


class Zoo(nn.Module):
    """Every kind of module that an adapter can have, in one forward pass. Ids (n, 5) -> (n, 4)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, 12)
        self.q = nn.Linear(12, 12)
        self.enc = Block(12)
        self.layers = nn.ModuleList([Block(12), Block(12)])
        self.xlayers = nn.ModuleList([Block(12), Block(12)])
        self.gpt = Conv1D(9, 12)
        self.wave = nn.Conv1d(9, 6, 3, padding=1)
        self.image = nn.Conv2d(1, 5, (2, 3), stride=(1, 2), padding=1)
        self.video = nn.Conv3d(5, 4, (1, 2, 2))
        self.narrow = nn.Linear(4, 2)
        self.head = nn.Linear(2, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.enc(self.q(x))
        for block in (*self.layers, *self.xlayers):
            x = x + block(x)
        x = self.wave(torch.tanh(self.gpt(x)).transpose(1, 2))
        x = self.video(self.image(x[:, None])[:, :, None]).flatten(2).mean(-1)
        return self.head(self.narrow(x))


KINDS = ("embed", "q", "enc.q", "layers.1.v", "xlayers.1.v", "gpt", "wave", "image", "video")
IDS = torch.arange(15).reshape(3, 5) % 20


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT warns about fan_in_fan_out, biases and names of bases: not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def lora(
    model: nn.Module,
    seed: int,
    r: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str = KINDS,
    dtype: torch.dtype = torch.float32,
    size: float = 0.3,
    name: str = "default",
    **config: Any,
) -> PeftModel:
    """The model with a random adapter on it, made by PEFT."""
    targets = targets if isinstance(targets, str) else list(targets)
    base = config.pop("base_model_name_or_path", BASE)
    settings = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **config)
    peft_model = quietly(get_peft_model, model, settings, adapter_name=name)
    peft_model.peft_config[name].base_model_name_or_path = base
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in peft_model.named_parameters():
        if "lora_" in parameter_name or ".modules_to_save." in parameter_name:
            value = torch.randn(parameter.shape, generator=generator) * size
            parameter.data = value.to(dtype)
    return peft_model


def save_lora(folder: Path, seed: int, model: nn.Module | None = None, **options: Any) -> Path:
    """A folder with a random adapter, written by PEFT."""
    quietly(lora(Zoo() if model is None else model, seed, **options).save_pretrained, folder)
    return folder


def load(folder: Path, model: nn.Module | None = None) -> PeftModel:
    """PEFT reads a folder, and has a place for every tensor in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft_model = PeftModel.from_pretrained(Zoo() if model is None else model, str(folder))
    keys = [
        str(w.message)
        for w in caught
        if "missing" in str(w.message) or "nexpected" in str(w.message)
    ]
    assert not keys, keys
    return peft_model


def plain(name: str) -> str:
    return name.removeprefix(PREFIX)


def deltas(peft_model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Module -> what PEFT adds to its weight, in the weight's own layout."""
    return {name: delta() for name, delta in lazy_deltas(peft_model, adapter).items()}


def lazy_deltas(peft_model: nn.Module, adapter: str = "default") -> dict[str, Callable[[], Tensor]]:
    return {
        plain(name): lambda module=module: module.get_delta_weight(adapter).detach()
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight") and adapter in module.scaling
    }


def matrices(found: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Deltas as (outputs, inputs) matrices in float64."""
    out = {}
    for name, delta in found.items():
        module = model.get_submodule(name)
        module = getattr(module, "base_layer", module)
        turned = isinstance(module, (nn.Embedding, Conv1D))
        out[name] = (delta.T if turned else delta.flatten(1)).double()
    return out


def products(folder: Path, scaling: float) -> dict[str, Tensor]:
    """s B A of every linear module, from the tensors of the file and nothing else; float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [
        name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")
    ]
    return {
        plain(name): scaling
        * tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
