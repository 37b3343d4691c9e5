"""What a merge is made of before there is a method: adapters, base, heads, the stream of layers.
`compare` opens it once for many methods.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sapmerge.core.part import prepare, recipe
from sapmerge.core.protocols import Method
from sapmerge.core.torch_state import pinned
from sapmerge.errors import IncompatibleAdaptersError, warn
from sapmerge.io.adapter import Adapter
from sapmerge.io.base_folder import BaseFolder
from sapmerge.io.machine import at_terminal
from sapmerge.io.modules import BaseWeights
from sapmerge.losses import Loss
from sapmerge.merging.copies import check_copies
from sapmerge.merging.heads import HeadPolicy, Heads, plan_heads
from sapmerge.merging.inputs import (
    Adapters,
    Base,
    check_device,
    check_mergeable,
    load_adapters,
    resolve_weights,
    weights_of,
    with_base,
)
from sapmerge.merging.meaning import say_of_inputs, written_base
from sapmerge.merging.missing import say_what_is_missing
from sapmerge.merging.needs import check_needs
from sapmerge.merging.run import Run
from sapmerge.merging.serving import shapes_of
from sapmerge.merging.spelling import Own, one_spelling, say_what_is_not_shared
from sapmerge.merging.stream import AdapterLayers
from sapmerge.merging.tokens import say_other_tokens
from sapmerge.merging.vectors import check_vectors, plan_vectors, used_weights
from sapmerge.models import find_modules, find_saved
from sapmerge.naming import without_wrappers

__all__ = ["Opened", "open_merge"]


@dataclass(frozen=True, eq=False)
class Opened:
    """The inputs of a merge, opened and checked.

    Args:
        adapters: in the user's order.
        weights: one per adapter.
        base: the base model that the output is for.
        heads: what happens to modules saved whole.
        stream: the layers, with anchors if there are any.
        model: the base model at hand, or None.
        held: weights of the base, of the model or of its folder.
        shapes: of the base's weights, by its own names.
        progress: whether to show a bar.
    """

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    base: Base
    heads: Heads
    stream: AdapterLayers
    model: Any
    held: BaseWeights | None
    shapes: Mapping[str, tuple[int, int]]
    progress: bool

    @pinned
    def run(self, method: Method, scale: float = 1.0, rank: int | float | str | None = None) -> Run:
        """The merge by a method, after its checks and its pre-pass.

        Raises:
            SapmergeError: the method cannot work on these adapters.
        """
        stream = self.stream
        check_needs(method, stream)
        said = say_of_inputs(stream, method)
        with stream.holding():
            prepared = prepare(method, stream)
        if stream.anchors is not None and not stream.anchors.used:
            warn(f"the anchors were not used: {recipe(method)} reads no gradients and no losses")
        vectors = plan_vectors(prepared, stream.adapters, stream.weights, float(scale), self.held)
        if self.model is not None:
            check_vectors(vectors, self.model)

        def used(module: str) -> dict[str, float]:
            labels = [adapter.label for adapter in stream.adapters]
            return dict(zip(labels, used_weights(prepared, stream.weights, module), strict=True))

        return Run(
            adapters=self.adapters,
            weights=self.weights,
            base=self.base,
            heads=self.heads.reweighed(used),
            vectors=vectors,
            method=method,
            scale=float(scale),
            rank=rank,
            stream=stream,
            prepared=prepared,
            own_names=Own.of(self.model),
            shapes=self.shapes,
            said=said,
            progress=self.progress,
        )


@pinned
def open_merge(
    adapters: Adapters,
    anchor_loader: Any,
    model: Any,
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    loss: Loss | None = None,
    modules_to_save: HeadPolicy = None,
    base_model: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_only: bool = False,
) -> Opened:
    """Open and check everything but the method; the arguments are those of `merge`, `model` a
    module, a `BaseFolder` or None.

    Raises:
        SapmergeError: anything that is wrong with the input.
    """
    folder = model if isinstance(model, BaseFolder) else None
    model = without_wrappers(None if folder is not None else model)
    opened = one_spelling(load_adapters(adapters, model, weights), model)
    numbers = resolve_weights(weights, opened)
    base = written_base(check_mergeable(opened, base_model), opened, base_model, folder or model)
    _check_one_form(opened)
    if model is None:  # else the names are settled
        say_what_is_not_shared(opened)
    heads = plan_heads(opened, numbers, modules_to_save)
    say_other_tokens(opened, heads)
    if folder is not None:
        folder.conv1d = any(adapter.fan_in_fan_out for adapter in opened)
    opened = with_base(opened, folder or model)
    check_copies(opened, weights_of(folder or model))
    say_what_is_missing(opened, folder or model)
    stream = AdapterLayers.of(opened, numbers, check_device(device))
    show = at_terminal() if progress is None else progress
    if anchor_loader is not None:
        stream = stream.with_anchors(anchor_loader, model, loss, cache)
        assert stream.anchors is not None
        stream.anchors.cache_only, stream.anchors.passes.shown = cache_only, show
    elif folder is not None:
        folder.check(stream.modules.values(), heads.shapes())
    elif model is not None:
        find_modules(model, stream.modules)
        find_saved(model, heads.shapes())
    return Opened(
        adapters=tuple(opened),
        weights=tuple(numbers),
        base=base,
        heads=heads,
        stream=stream,
        model=model,
        held=weights_of(folder or model),
        shapes=shapes_of(folder or model),
        progress=show,
    )


def _check_one_form(adapters: Sequence[Adapter]) -> None:
    """Refuse a weight that is adapted in two forms: it would be two layers, of which no method sees
    both, and a checkpoint has one name for them.

    Raises:
        IncompatibleAdaptersError: it is a parameter here and a module there.
    """
    plain = {
        name: adapter.label
        for adapter in adapters
        for name, module in adapter.modules.items()
        if module.kind != "parameter"
    }
    for adapter in adapters:
        for module in adapter.modules.values():
            if (
                module.kind == "parameter"
                and module.parameter == "weight"
                and module.owner in plain
            ):
                raise IncompatibleAdaptersError(
                    f"the weight of {module.owner!r} is adapted by target_parameters in "
                    f"{adapter.label!r}, and by target_modules in {plain[module.owner]!r}: train "
                    "both in one way, or merge one of them into the base with PEFT"
                )
