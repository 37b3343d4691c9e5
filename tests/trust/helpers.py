"""Adapters, models and interruptions for these tests."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SHAPES = {f"layers.{i}.{p}": (12, 8) for i in range(2) for p in ("q_proj", "v_proj")}


def write_adapter(
    path: Path,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (m, n) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(
            rank, n, generator=generator
        ).to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(
            m, rank, generator=generator
        ).to(dtype)
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    written = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": targets,
        "base_model_name_or_path": "org/base",
        **config,
    }
    (path / "adapter_config.json").write_text(json.dumps(written))
    return path


def tensors_of(path: Path) -> bytes:
    return (path / "adapter_model.safetensors").read_bytes()


class Small(nn.Module):
    """Two blocks with q_proj and v_proj, run one after the other."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layers = nn.ModuleList(
            nn.ModuleDict({p: nn.Linear(8, 12, bias=False) for p in ("q_proj", "v_proj")})
            for _ in range(2)
        )
        self.head = nn.Linear(12, 8)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = torch.tanh(self.head(block["q_proj"](x).sigmoid() * block["v_proj"](x)))
        return x


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 8, generator=generator) for _ in range(2)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that a merge must leave as it was."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "asking": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {
            name: (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                "forward" in vars(module),
            )
            for name, module in model.named_modules()
        },
    }


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    weights = one["weights"].keys() == other["weights"].keys() and all(
        torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items()
    )
    return weights and all(one[key] == other[key] for key in ("training", "asking", "hooks"))


def interrupted(action: Callable[[], object], files: tuple[str, ...], at: int) -> bool:
    """Ctrl-C when the `at`-th line of these files is reached; whether it was reached."""
    return _traced(action, files, at) >= at


def lines(action: Callable[[], object], files: tuple[str, ...]) -> int:
    """How many lines of these files an action runs."""
    return _traced(action, files, 0)


def places(action: Callable[[], object], files: tuple[str, ...]) -> Counter[tuple[str, int]]:
    """(file, line) -> how often an action comes there."""
    seen = Counter[tuple[str, int]]()
    _watched(action, files, seen, None)
    return seen


def interrupted_at(
    action: Callable[[], object], files: tuple[str, ...], place: tuple[str, int], nth: int
) -> bool:
    """Ctrl-C when a line is reached for the n-th time; whether it was."""
    seen = Counter[tuple[str, int]]()
    _watched(action, files, seen, (place, nth))
    return seen[place] >= nth


def _watched(
    action: Callable[[], object],
    files: tuple[str, ...],
    seen: Counter[tuple[str, int]],
    stop: tuple[tuple[str, int], int] | None,
) -> None:
    def stops(frame: FrameType) -> bool:
        place = frame.f_code.co_filename, frame.f_lineno
        seen[place] += 1
        return stop is not None and place == stop[0] and seen[place] == stop[1]

    _stepped(action, files, stops)


def _traced(action: Callable[[], object], files: tuple[str, ...], at: int) -> int:
    count = 0

    def stops(_: FrameType) -> bool:
        nonlocal count
        count += 1
        return count == at

    _stepped(action, files, stops)
    return count


def _stepped(
    action: Callable[[], object], files: tuple[str, ...], stops: Callable[[FrameType], bool]
) -> None:
    """Ctrl-C at the line of these files for which `stops` says so; it is asked before each."""

    def local(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and stops(frame):
            raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        return local if frame.f_code.co_filename.endswith(files) else None

    # An interruption by a trace comes also where no real one can, on the way out of
    # `without_interrupts`: its handler would stay.
    handler = signal.getsignal(signal.SIGINT)
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, handler)


Moment = tuple[str, int, str]
"""A file, a line, and what happens there: a function begins, or one of C returns."""
MANAGERS = ("/contextlib.py", "/signal.py", "/grad_mode.py", "/autocast_mode.py", "/_contextlib.py")
"""Where Python's and torch's own context managers are made."""


def moments(action: Callable[[], object], files: tuple[str, ...]) -> Counter[Moment]:
    """Where Python looks for signals, in these files and in `MANAGERS`, and how often."""
    seen = Counter[Moment]()
    _pressed(action, files, seen, None)
    return seen


def pressed(
    action: Callable[[], object], files: tuple[str, ...], moment: Moment, nth: int
) -> Counter[Moment]:
    """A real Ctrl-C when a moment comes for the n-th time; also while they are delayed. The
    KeyboardInterrupt is the caller's to catch.
    """
    seen = Counter[Moment]()
    _pressed(action, files, seen, (moment, nth))
    return seen


def _pressed(
    action: Callable[[], object],
    files: tuple[str, ...],
    seen: Counter[Moment],
    stop: tuple[Moment, int] | None,
) -> None:
    def profile(frame: FrameType, event: str, arg: object) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "c_return") or not (file.endswith((*files, *MANAGERS))):
            return
        moment = file, frame.f_lineno, f"{event} {getattr(arg, '__name__', '')}"
        seen[moment] += 1
        if stop is not None and moment == stop[0] and seen[moment] == stop[1]:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
