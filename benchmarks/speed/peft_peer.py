"""PEFT's `add_weighted_adapter`, on a model that has nothing but the linear layers.
Memory is counted from there.
"""

from __future__ import annotations

import warnings
from typing import Any

from safetensors import safe_open
from torch import nn

from speed.child import Clock

__all__ = ["run"]


def run(job: dict[str, Any], clock: Clock) -> None:
    """Load, merge, save. With samples, all layers are loaded and saved,
    and the merge of a few is scaled.
    """
    import peft  # noqa: F401 - before memory is counted

    warnings.simplefilter("ignore")
    shapes = _shapes(job["adapters"][0])
    model = _skeleton(shapes)
    clock.restart_memory()
    names = [f"a{k}" for k in range(len(job["adapters"]))]
    with clock.part("load"):
        peft_model = _load(model, job["adapters"], names)
    if not job["samples"]:
        with clock.part("merge"):
            _merge(peft_model, names, job)
    for module, sample in job["samples"].items():
        one = _load(_skeleton({module: shapes[module]}), sample["adapters"], names)
        with clock.part("merge", sample["times"]):
            _merge(one, names, job)
        one.save_pretrained(f"{job['out']}/{module}", selected_adapters=["merged"])
    with clock.part("save"):
        # Where only samples were merged, an input stands for the result: it has the same size.
        peft_model.save_pretrained(
            job["out"], selected_adapters=[names[0] if job["samples"] else "merged"]
        )


def _load(model: nn.Module, adapters: list[str], names: list[str]) -> Any:
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], adapters[1:], strict=True):
        peft_model.load_adapter(folder, adapter_name=name)
    return peft_model


def _merge(peft_model: Any, names: list[str], job: dict[str, Any]) -> None:
    weight = 1.0 / len(names) if job["options"]["mean"] else 1.0
    peft_model.add_weighted_adapter(
        names,
        [weight] * len(names),
        "merged",
        combination_type=job["method"],
        svd_rank=job["rank"],
        density=job["options"]["density"],
        svd_full_matrices=job["options"]["full_matrices"],
    )


def _shapes(folder: str) -> dict[str, tuple[int, int]]:
    """Module -> (outputs, inputs), from the header of an adapter."""
    found: dict[str, tuple[int, int]] = {}
    with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(".lora_A.weight"):
                outputs = file.get_slice(key.replace("lora_A", "lora_B")).get_shape()[0]
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                found[name] = (outputs, file.get_slice(key).get_shape()[1])
    return found


def _skeleton(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Nested modules with a linear layer under every name;
    its weights are never touched, so they take no memory.
    """
    root = nn.Module()
    for name, (m, n) in shapes.items():
        at, *path = root, *name.split(".")
        for step in path[:-1]:
            if not hasattr(at, step):
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        at.add_module(path[-1], nn.utils.skip_init(nn.Linear, n, m, bias=False))
    return root
