"""`routed`: adapters that stay apart, and a router that mixes them for every token.

check adapters -> the router sees every layer, or is trained -> attach to a model, save, or fold
into one adapter
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sapmerge.anchors.freezing import frozen
from sapmerge.anchors.loading import Batches
from sapmerge.core.layer import Layer
from sapmerge.core.lowrank import weighted_sum
from sapmerge.core.torch_state import pinned
from sapmerge.core.updates import Update
from sapmerge.errors import MethodError
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import shown
from sapmerge.io.routed import read_routed, write_routed
from sapmerge.losses import Loss, loss_for
from sapmerge.merging.inputs import (
    Adapters,
    Base,
    check_mergeable,
    load_adapters,
    with_base,
)
from sapmerge.merging.merge import Merged, merge
from sapmerge.merging.spelling import one_spelling, say_what_is_not_shared
from sapmerge.merging.stream import AdapterLayers
from sapmerge.methods.averaging import task_arithmetic
from sapmerge.models import device_of
from sapmerge.naming import without_wrappers
from sapmerge.routing.checkpoint import (
    adapters_of,
    card_of,
    config_of,
    router_of,
    router_settings,
    states_of,
)
from sapmerge.routing.learning import learn
from sapmerge.routing.live import Attached, Stack, check_modules, hooked, sites_of
from sapmerge.routing.routers import FixedRouter, LearnedRouter, Router, RouterLike, router_from

__all__ = ["Routed", "routed"]


@pinned
def routed(
    adapters: Adapters,
    anchor_loader: Any = None,
    model: Any = None,
    *,
    router: RouterLike = "uniform",
    loss: Loss | None = None,
    base_model: str | None = None,
    modules_to_save: Literal["drop"] | None = None,
) -> Routed:
    """Keep K adapters apart, and mix them per token: y = W x + sum_k p_k(x) D_k x in every layer.

    With `router="uniform"` that is the mean, exactly; with all weight on one adapter it is that
    adapter.

    Args:
        adapters: as for `merge`; LoRA of linear layers, of any ranks.
        anchor_loader: a re-iterable of batches, for `LearnedRouter`.
        model: the base model, for `LearnedRouter`, for names, and for kinds of adapters that need
            its weights.
        router: "uniform", "arrow", or `FixedRouter`, `ArrowRouter`, `LearnedRouter` with their
            arguments; or an object of your own with their two functions.
        loss: (model, batch) -> scalar, for the anchors; by default by what the model is.
        base_model: the base that the adapters are for, when they name different ones.
        modules_to_save: "drop" leaves heads and projectors that were saved whole out; they cannot
            be routed.

    Returns:
        A `Routed`; all factors are in memory from its first use on.

    Raises:
        SapmergeError: anything that is wrong with the input, before any work is done.

    Example:
        >>> import sapmerge as sm
        >>> mixed = sm.routed(["medical", "legal"], router="arrow")  # doctest: +SKIP
        >>> with mixed.attach(model):  # doctest: +SKIP
        ...     model(**batch)
    """
    chosen = router_from(router)
    learning = isinstance(chosen, LearnedRouter)
    if learning and (anchor_loader is None or model is None):
        raise MethodError(
            "a LearnedRouter is trained: routed(adapters, anchor_loader, model, "
            "router=LearnedRouter())"
        )
    if anchor_loader is not None and not learning:
        raise MethodError(
            f"{type(chosen).__name__} learns nothing: leave the anchors out, or take "
            "LearnedRouter()"
        )
    if model is not None and not hasattr(model, "named_modules"):
        raise MethodError(f"model must be a torch module; got a {type(model).__name__}")
    model = without_wrappers(model)
    opened = one_spelling(load_adapters(adapters, model), model)
    base = check_mergeable(opened, base_model)
    if model is None:
        say_what_is_not_shared(opened)
    _check_rest(opened, modules_to_save)
    stream = AdapterLayers.of(with_base(opened, model), [1.0] * len(opened), torch.device("cpu"))
    check_modules(stream.modules)
    sites = None if model is None else sites_of(model, stream.modules)
    stacks: dict[str, Stack] = {}
    states: dict[str, Tensor] = {}
    for layer in stream:
        stacks[layer.name], states[layer.name] = Stack.of(layer), chosen.state(layer)
    if isinstance(chosen, LearnedRouter):
        assert sites is not None
        states = learn(chosen, model, anchor_loader, sites, stacks, states, loss)
    return Routed(chosen, stream, base, stacks, states)


@dataclass(frozen=True, eq=False)
class Routed:
    """Adapters that stay apart, and a router. Make one with `routed` or `Routed.load`.

    Args:
        router: how tokens are weighed.
        stream: the layers, adapters sorted by content.
        base: the base model that they are for.
        stacks: layer -> stacked factors.
        states: layer -> what the router knows of it.
    """

    router: Router
    stream: AdapterLayers = field(repr=False)
    base: Base
    stacks: Mapping[str, Stack] = field(repr=False)
    states: Mapping[str, Tensor] = field(repr=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the adapters, sorted by content: the columns of the router's weights."""
        return tuple(adapter.label for adapter in self.stream.adapters)

    def weigh(self, name: str, x: Tensor) -> Tensor:
        """The weights (tokens, K) that the router gives in a layer, in the order of `labels`.

        Args:
            name: of the layer.
            x: what goes into it, (tokens, n).
        """
        if name not in self.states:
            raise MethodError(f"no adapter has a layer {name!r}")
        return self.router.weigh(self.states[name].to(x.device, x.dtype), x)

    def attach(self, model: Any) -> Attached:
        """Put the adapters into a model, beside whatever it does: forward hooks, and no weight is
        changed.

        Args:
            model: the base model, or a PeftModel of it (whose own active adapters go on).

        Returns:
            Something with `remove()`, or for a `with` block.

        Raises:
            ModelMismatchError: the model lacks a layer.
        """
        return hooked(
            sites_of(without_wrappers(model), self.stream.modules), self.stacks, self.weigh
        )

    @pinned
    def usage(
        self, loader: Any, model: Any, loss: Loss | None = None
    ) -> dict[str, dict[str, float]]:
        """The mean weight that the tokens of some batches give to every adapter: layer -> label ->
        share.

        Args:
            loader: a re-iterable of batches.
            model: the base model.
            loss: (model, batch) -> anything, which runs the model; the anchors' loss by default.
        """
        sums = {name: torch.zeros(len(self.labels), dtype=torch.float64) for name in self.states}
        counts = dict.fromkeys(self.states, 0)

        def weigh(name: str, x: Tensor) -> Tensor:
            weights = self.weigh(name, x)
            sums[name] += weights.sum(0).double().cpu()
            counts[name] += len(weights)
            return weights

        sites = sites_of(without_wrappers(model), self.stream.modules)
        batches = Batches(loader, device_of(model))
        with frozen(model) as base, hooked(sites, self.stacks, weigh):
            run = loss_for(base, loss)
            for batch in batches:
                run(base, batch)
        return {
            name: {label: float(s) / max(counts[name], 1) for label, s in zip(self.labels, total)}
            for name, total in sums.items()
        }

    def fold(
        self,
        weights: Mapping[str, float] | Mapping[str, Mapping[str, float]] | None = None,
        rank: int | float | str | None = None,
    ) -> Merged:
        """One plain adapter, sum_k w_k D_k: what is left when all tokens get the same weights.

        Args:
            weights: label -> weight; or layer -> label -> weight, e.g. from `usage`. A label that
                is not named gets 0. None: those of a `FixedRouter`.
            rank: as for `merge`.

        Returns:
            As `merge` does: `fold().save_pretrained("one")` is a PEFT checkpoint.

        Raises:
            MethodError: an unknown label or layer, or no weights for a router whose weights depend
                on the token.
        """
        if weights is None and not isinstance(self.router, FixedRouter):
            raise MethodError(
                f"the weights of {type(self.router).__name__} depend on the token; say which to "
                "fold with, e.g. fold(routed.usage(loader, model))"
            )
        if weights is None:
            weights = dict(zip(self.labels, map(float, next(iter(self.states.values())))))
        per_layer = any(isinstance(value, Mapping) for value in weights.values())
        rows = cast("Mapping[str, Mapping[str, float]]", weights if per_layer else {"": weights})
        unknown = sorted({label for row in rows.values() for label in row} - set(self.labels))
        if unknown or (per_layer and set(rows) != set(self.states)):
            raise MethodError(
                f"weights name the adapters {sorted(self.labels)}, for all layers or for each; "
                f"got {shown(unknown or sorted(set(rows) ^ set(self.states)))}"
            )
        numbers = [1.0 if per_layer else float(rows[""].get(label, 0.0)) for label in self.labels]
        return merge(
            self.stream.adapters,
            method=_PerLayer(rows) if per_layer else task_arithmetic(),
            weights=numbers,
            rank=rank,
            base_model=self.base.name,
            modules_to_save="drop",
            progress=False,
        )

    def save_pretrained(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a folder that `Routed.load` reads: stacked factors, the router, a card. It appears
        whole or not at all.

        It is no PEFT checkpoint, and none is taken for one. Factors are float32, whatever the
        inputs were.

        Args:
            path: the folder to write.
            overwrite: replace an earlier one.

        Raises:
            OutputExistsError: `path` exists.
            MethodError: the router is of a class of your own.
        """
        router_settings(self.router)
        config = config_of(self.stream, self.router, (self.base.name, self.base.revision))
        factors = {
            f"{name}.{part}": getattr(stack, part)
            for name, stack in self.stacks.items()
            for part in "AB"
        }
        write_routed(path, config, factors, self.states, card_of(config), overwrite)

    @classmethod
    @pinned
    def load(cls, path: str | os.PathLike[str]) -> Routed:
        """Read a folder of `save_pretrained`: nothing in it is believed, every tensor and key has
        to fit.

        Raises:
            AdapterFormatError, AdapterConfigError, NonFiniteError: the message names the folder and
                what is wrong.
        """
        config, factors, states = read_routed(path)
        where = f"routed adapters {shown(os.fsdecode(path))}"
        adapters = adapters_of(config, factors, where)
        router = router_of(config, states, where)
        modules = {name: m for adapter in adapters for name, m in adapter.modules.items()}
        stream = AdapterLayers(
            tuple(adapters),
            (1.0,) * len(adapters),
            dict(sorted(modules.items())),
            torch.device("cpu"),
        )
        stacks = {layer.name: Stack.of(layer) for layer in stream}
        base = Base(adapters[0].base_model, adapters[0].revision)
        return cls(router, stream, base, stacks, states_of(config, stacks, states, where))


@dataclass(frozen=True)
class _PerLayer:
    """A merger: sum_k w_k D_k with other weights in every layer."""

    weights: Mapping[str, Mapping[str, float]]

    def __call__(self, layer: Layer) -> Update:
        row = self.weights[layer.name]
        return weighted_sum(layer, tuple(float(row.get(label, 0.0)) for label in layer.adapters))


def _check_rest(adapters: Sequence[Adapter], modules_to_save: Literal["drop"] | None) -> None:
    """Refuse what is no matrix: heads unless they are to be dropped, biases and token rows in any
    case.
    """
    if modules_to_save not in (None, "drop"):
        raise MethodError(f"modules_to_save is None or 'drop'; got {modules_to_save!r}")
    for adapter in adapters:
        if adapter.saved and modules_to_save is None:
            raise MethodError(
                f"adapter {adapter.label!r} saves {sorted(adapter.saved)[0]!r} whole, which has "
                "no router; modules_to_save='drop' leaves it out"
            )
        if adapter.vectors:
            raise MethodError(
                f"adapter {adapter.label!r} changes {sorted(adapter.vectors)[0]!r}, no matrix, "
                "which has no router; merge these adapters instead"
            )
