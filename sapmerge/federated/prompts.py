"""The mean of soft prompts: PromptFL's server, for PEFT's prompts and CoOp's context vectors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sapmerge.core.linalg import norm
from sapmerge.core.scalars import plain
from sapmerge.errors import IncompatibleAdaptersError, MethodError
from sapmerge.io.prompts import SoftPrompt, read_prompt
from sapmerge.io.writing import CheckpointWriter

__all__ = ["Prompts", "average_prompts"]

_AGREE = (
    "peft_type",
    "num_virtual_tokens",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "num_transformer_submodules",
    "base_model_name_or_path",
)


_MOST = 1e30
"""Samples: so few that the sum of any number of clients is finite."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """An averaged prompt.

    Args:
        config: of PEFT, as the clients had it; None for context vectors.
        tensors: `prompt_embeddings` (virtual tokens, width), or `ctx`; and modules saved whole.
        report: per client its share and the distance of its prompt from the mean, and the share of
            the norm that is left: 1 if all agree, 1 / sqrt(K) for unrelated prompts.
    """

    config: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]
    report: Mapping[str, Any] = field(repr=False)

    def save_pretrained(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder that PEFT reads; for context vectors one whose
        `adapter_model.safetensors` holds `ctx`.

        Raises:
            OutputExistsError: `path` exists.
        """
        with CheckpointWriter(path, overwrite=overwrite) as writer:
            for name, tensor in self.tensors.items():
                writer.add(name, tensor)
            config = {"peft_type": "CONTEXT"} if self.config is None else dict(self.config)
            writer.commit(config=config, metadata={}, card="# Mean of soft prompts\n")


def average_prompts(
    checkpoints: Sequence[object] | Mapping[str, object],
    samples: Sequence[float] | Mapping[str, float] | None = None,
    modules_to_save: Literal["mean", "drop"] | None = None,
) -> Prompts:
    """The mean of soft prompts by samples, in float64, rounded once to the clients' dtype.

    What is averaged are the prompts that the model sees: PEFT saves them after their encoder. A
    prompt has an order: clients must have started from one prompt,
    and their virtual tokens are averaged place by place.

    Args:
        checkpoints: folders of PEFT (prompt, p-, prefix or CPT tuning) or (config, state_dict); or
            CoOp's `ctx`, as a state dict or a safetensors file. CoOp's `token_prefix` and
            `token_suffix` belong to class names and are left out. Or a mapping label -> any of
            these.
        samples: per client, 1 by default.
        modules_to_save: heads saved beside PEFT's prompts: "mean" or "drop".

    Raises:
        IncompatibleAdaptersError: prompts of different kinds, bases or shapes, or contexts of
            different class lists.
        MethodError: no checkpoints, wrong samples, or heads and no policy.

    Source: Guo et al., "PromptFL: let federated participants cooperatively learn prompts instead of
    models", https://arxiv.org/abs/2208.11625. The official loop keeps references to one state dict,
    so that its average is the last client's prompt; and it does not weigh by samples.
    pFedPrompt's global part is this mean, too.
    """
    named = (
        checkpoints
        if isinstance(checkpoints, Mapping)
        else {f"client{k}": c for k, c in enumerate(checkpoints)}
    )
    prompts = [read_prompt(checkpoint, label) for label, checkpoint in named.items()]
    if not prompts:
        raise MethodError("there are no prompts to average: the list is empty")
    weights = _weights([prompt.label for prompt in prompts], samples)
    _check(prompts)
    heads = sorted({name for prompt in prompts for name in prompt.tensors if name != prompt.name})
    if heads and modules_to_save not in ("mean", "drop"):
        raise MethodError(
            f"the checkpoints hold whole modules ({heads[:3]}); say modules_to_save='mean' or "
            "'drop'"
        )
    names = [prompts[0].name, *(heads if modules_to_save == "mean" else ())]
    # In the order of content, so that no bit of the result depends on that of the clients.
    order = sorted(range(len(prompts)), key=lambda k: (prompts[k].digest, weights[k]))
    tensors = {
        name: _mean([prompts[k] for k in order], [weights[k] for k in order], name)
        for name in names
    }
    first = prompts[0].config
    config = None if first is None else {**first, "inference_mode": True}
    if config is not None and modules_to_save == "drop":
        config["modules_to_save"] = None
    return Prompts(config, tensors, _report(prompts, weights, tensors[names[0]]))


def _weights(
    labels: Sequence[str], samples: Sequence[float] | Mapping[str, float] | None
) -> list[float]:
    if samples is None:
        numbers = [1.0] * len(labels)
    elif isinstance(samples, Mapping):
        if set(samples) != set(labels):
            raise MethodError(f"samples name {sorted(samples)}, the clients are {sorted(labels)}")
        numbers = [plain(samples[label]) for label in labels]
    else:
        numbers = [plain(number) for number in samples]
    if (
        len(numbers) != len(labels)
        or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers)  # pyright: ignore[reportUnnecessaryIsInstance]
        or not all(0 < number < _MOST for number in numbers)
    ):
        raise MethodError(
            f"{len(labels)} clients need as many positive numbers of samples; got {samples!r}"
        )
    total = sum(numbers)
    return [number / total for number in numbers]


def _check(prompts: Sequence[SoftPrompt]) -> None:
    first = prompts[0]
    for prompt in prompts[1:]:
        if (prompt.config is None) != (first.config is None):
            raise IncompatibleAdaptersError(
                f"{first.label!r} and {prompt.label!r}: one is PEFT's, one context vectors"
            )
        for field_name in _AGREE if first.config is not None else ():
            one, other = (
                p.config[field_name] if p.config and field_name in p.config else None
                for p in (first, prompt)
            )
            if one != other:
                raise IncompatibleAdaptersError(
                    f"{first.label!r} and {prompt.label!r} differ in {field_name}: {one!r} and "
                    f"{other!r}"
                )
        one, other = (tuple(p.tensors[p.name].shape) for p in (first, prompt))
        if one != other:
            classes = len(one) == 3 or len(other) == 3
            raise IncompatibleAdaptersError(
                f"{first.label!r} and {prompt.label!r}: prompts of shape {one} and {other}"
                + (
                    "; contexts of single classes can be averaged for one list of classes only"
                    if classes
                    else ""
                )
            )


def _mean(prompts: Sequence[SoftPrompt], weights: Sequence[float], name: str) -> Tensor:
    having = [
        (prompt, weight) for prompt, weight in zip(prompts, weights) if name in prompt.tensors
    ]
    shapes = {tuple(prompt.tensors[name].shape) for prompt, _ in having}
    if len(having) < len(prompts) or len(shapes) > 1:
        raise IncompatibleAdaptersError(
            f"{name!r} is not in all checkpoints, or of shapes {sorted(shapes)}"
        )
    dtype = having[0][0].tensors[name].dtype
    out = torch.zeros(having[0][0].tensors[name].shape, dtype=torch.float64)
    for prompt, weight in having:
        out += prompt.tensors[name].double() * weight
        dtype = torch.promote_types(dtype, prompt.tensors[name].dtype)
    return out.to(dtype)


def _report(
    prompts: Sequence[SoftPrompt], weights: Sequence[float], mean: Tensor
) -> dict[str, Any]:
    wide = mean.double()
    own = [prompt.tensors[prompt.name].double() for prompt in prompts]
    norms = sum(weight * norm(value) for weight, value in zip(weights, own))
    return {
        "clients": {
            prompt.label: {
                "share": weight,
                "digest": prompt.digest,
                "distance": norm(value - wide),
                "left out": list(prompt.buffers),
            }
            for prompt, weight, value in zip(prompts, weights, own)
        },
        "norm kept": norm(wide) / norms if norms else 1.0,
    }
