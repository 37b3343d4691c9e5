"""`modules_to_save`: whole modules (heads, projectors) that travel with an adapter,
and what a merge does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import Tensor

from sapmerge.errors import IncompatibleAdaptersError, MethodError
from sapmerge.io.adapter import Adapter
from sapmerge.io.config import HEADS
from sapmerge.merging.inputs import in_content_order

__all__ = ["HeadPolicy", "Heads", "plan_heads"]

HeadPolicy: TypeAlias = "str | Mapping[str, str] | None"
"""'mean', 'first', 'drop', or module -> label of the adapter to take it from."""

_CHOICES = (
    "modules_to_save='mean' (average them), 'first' (of the first adapter that has it), 'drop' "
    "(leave them out), or {'<module>': '<adapter>'}"
)


@dataclass(frozen=True)
class Heads:
    """What happens to every saved tensor.

    Args:
        modules: the saved modules of the output.
        chosen: tensor name -> [(adapter, weight)]: the tensor is sum w T / sum w.
        dropped: the saved modules that are left out.
        policy: what was asked for; "first" as the adapters that were first.
    """

    modules: tuple[str, ...]
    chosen: Mapping[str, Sequence[tuple[Adapter, float]]]
    dropped: tuple[str, ...]
    policy: HeadPolicy = None

    def reweighed(self, weights_in: Callable[[str], Mapping[str, float]]) -> Heads:
        """The same with the weights that a method has made of those that were given. Who is left
        out of the merge is left out of the means of heads, too.

        Args:
            weights_in: module -> label -> weight.

        Raises:
            MethodError: nobody is left who has the head.
        """
        if self.policy != "mean":
            return self
        chosen: dict[str, list[tuple[Adapter, float]]] = {}
        for tensor, sources in self.chosen.items():
            weights = weights_in(tensor.rpartition(".")[0])
            chosen[tensor] = [(adapter, weights[adapter.label]) for adapter, _ in sources]
            if sum(weight for _, weight in chosen[tensor]) == 0:
                raise MethodError(
                    f"modules_to_save='mean': the weights that the method gives the adapters with "
                    f"{tensor!r} sum to zero ({', '.join(a.label for a, _ in sources)}); choose an "
                    "adapter for it, or 'drop'"
                )
        return replace(self, chosen=chosen)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> its shape in the output."""
        return {
            name: tuple(sources[0][0].saved[name].shape) for name, sources in self.chosen.items()
        }

    def tensors(self) -> Mapping[str, Callable[[], Tensor]]:
        """Tensor name -> a function that reads and averages it."""
        return {name: partial(_average, name, sources) for name, sources in self.chosen.items()}


def plan_heads(adapters: Sequence[Adapter], weights: Sequence[float], policy: HeadPolicy) -> Heads:
    """Apply a policy to the saved modules of all adapters; headers only.

    Raises:
        MethodError: there are saved modules and no policy, or the policy names something unknown.
        IncompatibleAdaptersError: "mean" over tensors of different shapes.
    """
    _check_not_adapted_too(adapters, policy)
    heads = _plan(adapters, weights, policy)
    return heads if heads.policy is not None else replace(heads, policy=policy)


def _check_not_adapted_too(adapters: Sequence[Adapter], policy: HeadPolicy) -> None:
    """Refuse a module that has a LoRA in one adapter and was saved whole in another:
    PEFT would use one of both.
    """
    adapted = {
        module.owner: adapter.label for adapter in adapters for module in adapter.modules.values()
    }
    saved = {
        tensor.rpartition(".")[0]: adapter.label for adapter in adapters for tensor in adapter.saved
    }
    both = sorted(adapted.keys() & saved.keys())
    if both and policy != "drop":
        name = both[0]
        raise IncompatibleAdaptersError(
            f"module {name!r} has a LoRA in {adapted[name]!r} and was saved whole in "
            f"{saved[name]!r}: an output holds one of both, and PEFT would not use the other. "
            "modules_to_save='drop' keeps the LoRA; or merge the LoRA into its base with PEFT, "
            "and save the module whole in both"
        )
    whole = {tensor: adapter.label for adapter in adapters for tensor in adapter.saved}
    parts = {
        vector.name: adapter.label for adapter in adapters for vector in adapter.vectors.values()
    }
    both = sorted(whole.keys() & parts.keys())
    if both and policy != "drop":
        name = both[0]
        raise IncompatibleAdaptersError(
            f"tensor {name!r} has trained rows or a trained bias in {parts[name]!r} and was saved "
            f"whole in {whole[name]!r}: PEFT loads no adapter with both. modules_to_save='drop' "
            "keeps the former; or save the module whole in both"
        )


def _plan(adapters: Sequence[Adapter], weights: Sequence[float], policy: HeadPolicy) -> Heads:
    owners = _Owners(adapters, weights)
    modules = owners.modules
    if policy is None and modules:
        owned = "; ".join(f"{module!r} in {owners.labels(module)}" for module in modules)
        raise MethodError(
            f"the adapters carry whole modules ({owned}); say what to do with them: {_CHOICES}"
        )
    if policy is None or policy == "drop":
        return Heads((), {}, modules)
    if policy == "first":
        first = {module: owners.of(module)[0] for module in modules}
        # "first" depends on the order of the adapters, which an output does not keep: name them.
        return replace(
            owners.take(first),
            policy={module: adapter.label for module, (adapter, _) in first.items()},
        )
    if policy == "mean":
        for tensor, sources in owners.tensors.items():
            shapes = {adapter.label: tuple(adapter.saved[tensor].shape) for adapter, _ in sources}
            if len(set(shapes.values())) > 1:
                raise IncompatibleAdaptersError(
                    f"modules_to_save='mean' cannot average {tensor!r}: shapes {shapes}; choose an "
                    "adapter for it"
                )
            if sum(weight for _, weight in sources) == 0:
                raise MethodError(
                    f"modules_to_save='mean': the weights of the adapters with {tensor!r} sum to "
                    "zero"
                )
        return Heads(modules, owners.tensors, ())
    if not isinstance(policy, Mapping):
        raise MethodError(f"modules_to_save={policy!r} is not a policy; write {_CHOICES}")
    return _by_name(owners, [adapter.label for adapter in adapters], policy)


class _Owners:
    """Which adapters have which saved tensors and modules, in the user's order."""

    def __init__(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
        saved: dict[str, list[tuple[Adapter, float]]] = {}
        for adapter, weight in zip(adapters, weights, strict=True):
            for tensor in adapter.saved:
                saved.setdefault(tensor, []).append((adapter, weight))
        declared = {name for adapter in adapters for name in _declared(adapter)}
        self.tensors = dict(sorted(saved.items()))
        self.module = {tensor: _module(tensor, declared) for tensor in self.tensors}
        self.modules = tuple(sorted(set(self.module.values())))

    def of(self, module: str) -> list[tuple[Adapter, float]]:
        return next(
            sources for tensor, sources in self.tensors.items() if self.module[tensor] == module
        )

    def labels(self, module: str) -> str:
        return ", ".join(adapter.label for adapter, _ in self.of(module))

    def take(self, chosen: Mapping[str, tuple[Adapter, float]]) -> Heads:
        """Every module from one adapter."""
        tensors = {
            tensor: [(chosen[module][0], 1.0)]
            for tensor, module in self.module.items()
            if tensor in chosen[module][0].saved
        }
        return Heads(self.modules, tensors, ())


def _by_name(owners: _Owners, labels: Sequence[str], policy: Mapping[str, str]) -> Heads:
    chosen: dict[str, tuple[Adapter, float]] = {}
    for wanted, label in policy.items():
        matching = [
            module for module in owners.modules if module == wanted or module.endswith(f".{wanted}")
        ]
        if not matching:
            raise MethodError(
                f"modules_to_save names {wanted!r}, but the saved modules are "
                f"{list(owners.modules)}"
            )
        if label not in labels:
            raise MethodError(
                f"modules_to_save takes {wanted!r} from {label!r}, but the adapters are "
                f"{list(labels)}"
            )
        for module in matching:
            having = [
                (adapter, weight) for adapter, weight in owners.of(module) if adapter.label == label
            ]
            if not having:
                raise MethodError(
                    f"{label!r} has no saved module {module!r}; it is in {owners.labels(module)}"
                )
            chosen[module] = having[0]
    left = [module for module in owners.modules if module not in chosen]
    if left:
        raise MethodError(f"modules_to_save says nothing about {left}; write {_CHOICES}")
    return owners.take(chosen)


def _declared(adapter: Adapter) -> Sequence[str]:
    """The names in the config, and those that PEFT adds for the task."""
    names = adapter.config.get("modules_to_save")
    declared = cast("Sequence[str]", names) if isinstance(names, (list, tuple)) else ()
    return (*declared, *HEADS.get(adapter.task_type or "", ()))


def _module(tensor: str, declared: set[str]) -> str:
    """The declared module that a saved tensor belongs to, e.g.
    "classifier" for "classifier.dense.weight".
    """
    path = tensor.split(".")
    for end in range(1, len(path)):
        prefix = ".".join(path[:end])
        if any(prefix == name or prefix.endswith(f".{name}") for name in declared):
            return prefix
    return ".".join(path[:-1])


def _average(name: str, sources: Sequence[tuple[Adapter, float]]) -> Tensor:
    if len(sources) == 1:
        return sources[0][0].saved_tensor(name)
    # bits must not depend on the order
    sources = sorted(sources, key=lambda source: in_content_order(*source))
    tensors = [adapter.saved_tensor(name) for adapter, _ in sources]
    total = sum(weight for _, weight in sources)
    out = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, (_, weight) in zip(tensors, sources, strict=True):
        out += tensor.double() * (weight / total)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return out.to(dtype)
