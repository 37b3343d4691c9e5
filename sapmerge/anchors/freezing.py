"""The base model while anchors run through it:
frozen, for one thread, and what it was afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sapmerge.core.torch_state import model_state
from sapmerge.core.undo import restoring
from sapmerge.errors import AnchorError
from sapmerge.models import MERGED, device_of, exclusive, merged_into, tuner_layers

__all__ = ["BaseWeights", "frozen"]


@contextmanager
def frozen(model: Any) -> Generator[nn.Module]:
    """The base model in eval mode, its own adapters off, no parameter asking for a gradient;
    all is put back after.

    Other threads wait: see `sapmerge.models.exclusive`.

    Raises:
        AnchorError: an adapter of the model is merged into its weights: they are not the base's; or
            the model was made in inference mode.
    """
    with exclusive(model) as base:
        if any(parameter.is_inference() for parameter in base.parameters()):
            raise AnchorError(
                "the base model was made inside torch.inference_mode(), where nothing has a "
                "gradient: load it outside"
            )
        tuners = tuner_layers(base)
        active = [module for module in tuners if not module.disable_adapters]
        if merged_into(tuners):
            raise AnchorError(MERGED)
        with restoring() as undo:
            undo.add(partial(_put_back, _changed_by_running(base)))
            undo.add(
                partial(
                    _ask,
                    {parameter: parameter.requires_grad for parameter in base.parameters()},
                )
            )
            undo.add(partial(_train, {module: module.training for module in base.modules()}))
            for module in active:
                undo.add(partial(_switch, module, True))
                _switch(module, False)
            base.eval()
            base.requires_grad_(False)
            with model_state(device_of(base)):
                yield base


def _ask(asking: Mapping[nn.Parameter, bool]) -> None:
    for parameter, was in asking.items():
        parameter.requires_grad_(was)


def _train(training: Mapping[nn.Module, bool]) -> None:
    for module, was in training.items():
        module.training = was


def _changed_by_running(base: nn.Module) -> list[tuple[Tensor, int, Tensor]]:
    """Tensors that a forward pass may write to also in eval mode, their versions and values.

    Those are the buffers, and the weights of an embedding with `max_norm`,
    which shortens the rows that it looks up.
    """
    return [
        (tensor, tensor._version, tensor.detach().clone())  # pyright: ignore[reportPrivateUsage]
        for tensor in [*base.buffers(), *_shortened(base)]
        if not (tensor.is_meta or tensor.is_inference())
    ]


def _shortened(base: nn.Module) -> list[Tensor]:
    """The weights of embeddings with `max_norm`."""
    return [
        module.weight
        for module in base.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]


def _put_back(before: Sequence[tuple[Tensor, int, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, version, value in before:
            if tensor._version != version:  # pyright: ignore[reportPrivateUsage]
                tensor.copy_(value)


def _switch(tuner: nn.Module, on: bool) -> None:
    """PEFT's switch of one layer; it also touches `requires_grad`."""
    cast("Callable[[bool], None]", tuner.enable_adapters)(on)


class BaseWeights:
    """Whether the parameters of the base model are those that a merge began with.

    Another thread, or a training in between, may change them from one pass to the next: gradients
    and losses would be of several models, and nobody would see it.
    """

    def __init__(self) -> None:
        self._base: nn.Module | None = None
        self._seen: list[tuple[int, int]] = []

    def note(self, base: nn.Module) -> None:
        """The parameters are these now."""
        self._base, self._seen = base, self._of(base)

    def __getstate__(self) -> tuple[nn.Module | None, bool]:
        base = self._base
        return base, base is not None and self._of(base) == self._seen

    def __setstate__(self, state: tuple[nn.Module | None, bool]) -> None:
        """In another process, or in a copy, the parameters lie elsewhere."""
        self._base, intact = state
        self._seen = self._of(self._base) if self._base is not None and intact else []

    def check(self, base: nn.Module) -> None:
        """Refuse others.

        Raises:
            AnchorError: a parameter was replaced or written to.
        """
        if self._of(base) != self._seen:
            raise AnchorError(
                "the base model's weights were changed since the merge began (by a training, or "
                "by another thread), so losses and gradients would be of two models: merge again, "
                "with a model that nobody changes"
            )

    @staticmethod
    def _of(base: nn.Module) -> list[tuple[int, int]]:
        own = {id(tensor) for tensor in _shortened(base)}  # passes write to them, and put them back
        return [
            (parameter.data_ptr(), parameter._version)  # pyright: ignore[reportPrivateUsage]
            for name, parameter in base.named_parameters()
            if "lora_" not in name and "modules_to_save." not in name and id(parameter) not in own
        ]
