"""Adapters in a model without changing a weight of it:
a forward hook adds the update's output to the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sapmerge.anchors.gradients import Call, TokenGradient, embed_scale, token_gradient
from sapmerge.anchors.parameters import Leaf, substituted
from sapmerge.core.linalg import finite
from sapmerge.core.undo import restoring, without_interrupts
from sapmerge.core.updates import LowRank, Update
from sapmerge.errors import AnchorError, NonFiniteError
from sapmerge.models import Site, weight_view

__all__ = ["Seen", "Watch", "attached", "check_base", "seeing"]

Sink: TypeAlias = Callable[[str, list[Call]], None]
"""(layer, all its calls that had a gradient): called once per backward pass,
as soon as the last of them is there.
"""


def check_base(base: nn.Module, sites: Mapping[str, Site]) -> None:
    """Refuse weights of which gradients mean nothing.

    Raises:
        AnchorError: a weight has no data.
        NonFiniteError: a weight is NaN or infinite.
    """
    names = {id(site.parameter): name for name, site in sites.items()}
    for name, site in sites.items():
        if site.parameter.is_meta and not hasattr(site.module, "_hf_hook"):
            raise AnchorError(
                f"the base model's weight of {name!r} is on the meta device, without data: load "
                "the model with its "
                "weights (accelerate's offloaded layers work, their hooks bring the weights in)"
            )
    for name, parameter in base.named_parameters():
        if type(parameter).__name__ == "FakeTensor":
            raise AnchorError(
                f"the base model's weight of {names.get(id(parameter), name)!r} is a FakeTensor, "
                "without values: load the model outside of FakeTensorMode"
            )
        if not (
            parameter.is_meta
            or not parameter.is_floating_point()
            or "lora_" in name
            or finite(parameter)
        ):
            raise NonFiniteError(
                f"the base model's weight of {names.get(id(parameter), name)!r} has NaN or "
                "infinite entries"
            )


@dataclass(eq=False)
class Watch:
    """What passes through the watched layers in one forward and one backward pass.

    A zero is added in every watched layer. It asks for a gradient, so a graph is built from the
    first watched layer on and not below it; and by differentiating with respect to it,
    nothing else receives a `.grad`.

    Args:
        sinks: layer -> what to do with its calls.
        hold: keep all calls until `deliver`, instead of handing them on during the backward pass.
        leaves: of layers that are watched in their weights (see `sapmerge.anchors.parameters`).
    """

    sinks: Mapping[str, Sink]
    hold: bool = False
    leaves: Sequence[Leaf] = ()
    _zeros: dict[torch.device, Tensor] = field(default_factory=dict[torch.device, Tensor])
    _expected: dict[str, int] = field(default_factory=dict[str, int])
    _calls: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]])
    _closed: bool = False

    def zero(self, name: str, device: torch.device) -> Tensor | None:
        """What is to be added in a layer, wherever the output depends on it;
        None if the layer is not watched.
        """
        if name not in self.sinks or not torch.is_grad_enabled():
            return None
        if device not in self._zeros:
            self._zeros[device] = torch.zeros((), device=device, requires_grad=True)
        return self._zeros[device]

    def see(self, name: str, x: Tensor, output: Tensor) -> None:
        """The output of a layer to which the zero was added."""
        # what checkpointing runs again during the backward pass was seen before
        if not self._closed:
            self._expected[name] = self._expected.get(name, 0) + 1
            x, version = x.detach(), x._version  # pyright: ignore[reportPrivateUsage]

            def received(g: Tensor) -> None:
                if not self._closed:
                    raise AnchorError(
                        f"the loss takes gradients itself, through layer {name!r}: what it "
                        "returns has to depend on the model's outputs, not on their derivatives"
                    )
                if x._version != version:  # pyright: ignore[reportPrivateUsage]
                    raise AnchorError(
                        f"the input of layer {name!r} is changed in place after it was used"
                    )
                self._calls.setdefault(name, []).append((x, g.detach()))
                if not self.hold and len(self._calls[name]) == self._expected[name]:
                    self.sinks[name](name, self._calls.pop(name))

            output.register_hook(received)  # pyright: ignore[reportUnknownMemberType]

    def backward(self, loss: Tensor) -> bool:
        """Run the backward pass; whether there is one: the loss has a graph, and a watched layer
        was run.
        """
        self._closed = True
        zeros = [*self._zeros.values(), *(leaf.zero for leaf in self.leaves)]
        if not (zeros and loss.requires_grad):
            return False
        gradients = torch.autograd.grad(loss, zeros, allow_unused=True)
        for leaf, gradient in zip(self.leaves, gradients[len(self._zeros) :], strict=True):
            if gradient is None:  # pyright: ignore[reportUnnecessaryComparison]
                continue
            for name, calls in leaf.calls(gradient).items():
                if self.hold:
                    self._calls[name] = calls
                else:
                    self.sinks[name](name, calls)
        return True

    def finite(self) -> bool:
        """Whether all gradients that are held are."""
        return all(finite(g) for calls in self._calls.values() for _, g in calls)

    def deliver(self) -> None:
        """Hand on what was held, and layers of which one call had no gradient."""
        while self._calls:
            name, calls = self._calls.popitem()
            self.sinks[name](name, calls)


@contextmanager
def attached(
    sites: Mapping[str, Site], updates: Mapping[str, Update], who: str, watch: Watch | None = None
) -> Generator[None]:
    """Add updates to the outputs of modules, and watch gradients;
    the hooks are gone on the way out.

    Args:
        sites: layer -> where its weight is.
        updates: layer -> update, for the layers that have one.
        who: what messages call the updates.
        watch: sees inputs and gradients of the outputs.

    Raises:
        NonFiniteError: the output of one of the layers is not finite.
            Later ones may hide it: attention can.
    """
    sinks: Mapping[str, Sink] = {} if watch is None else watch.sinks
    hidden = {name: site for name, site in sites.items() if not site.hooked}
    names = [name for name in {**updates, **sinks} if name not in hidden]
    watched = {name for name in sinks if name in hidden} if torch.is_grad_enabled() else set[str]()
    hooks = {name: _hook(name, updates.get(name), who, watch) for name in names}
    register = (
        partial(sites[name].module.register_forward_hook, hook) for name, hook in hooks.items()
    )
    with removed(register), substituted(hidden, updates, watched, who) as leaves:
        if watch is not None:
            watch.leaves = leaves
        yield


@contextmanager
def removed(register: Iterable[Callable[[], RemovableHandle]]) -> Generator[None]:
    """Hooks that are gone on the way out, also if not all of them came to be."""
    handles = list[RemovableHandle]()
    with restoring() as undo:
        undo.add(lambda: [handle.remove() for handle in handles])
        with without_interrupts():
            for one in register:
                handles.append(one())
        yield


def looked_at(
    name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any
) -> tuple[Tensor, Tensor]:
    """The input and the output of a layer, both tensors.

    Raises:
        AnchorError: they are not.
    """
    if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        raise AnchorError(
            f"anchors cannot look at layer {name!r} ({type(module).__name__}): its first argument "
            "and its output must be tensors"
        )
    return inputs[0], output


def _hook(
    name: str, update: Update | None, who: str, watch: Watch | None
) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        x, output = looked_at(name, module, inputs, output)
        zero = None if watch is None else watch.zero(name, output.device)
        if (
            isinstance(update, LowRank)
            and type(module) is nn.Linear
            and x.dtype == output.dtype == update.dtype
        ):
            output = _with_factors(x, output, update, zero)
        else:
            if update is not None:
                output = (output + _output_of(module, x, update)).to(output.dtype)
            if zero is not None:
                output = output + zero
        if not finite(output):
            raise NonFiniteError(
                f"the output of layer {name!r} on the anchors is NaN or infinite in {who}"
            )
        if watch is not None and zero is not None:
            watch.see(name, x, output)
        return output

    return hook


def _with_factors(x: Tensor, output: Tensor, update: LowRank, zero: Tensor | None) -> Tensor:
    """output + B (A x + zero) in one step: large outputs are written once,
    and the zero meets thin ones.
    """
    thin = x.reshape(-1, x.shape[-1]) @ update.A.T
    if zero is not None:
        thin = thin + zero
    flat = torch.addmm(output.reshape(-1, output.shape[-1]), thin, update.B.T)
    # A view would lose its hook if an activation changed it in place.
    return cast("Tensor", torch.ops.aten._unsafe_view.default(flat, output.shape))  # pyright: ignore


def _output_of(module: nn.Module, x: Tensor, update: Update) -> Tensor:
    """What the update alone makes of the module's input, in float32 or wider."""
    if isinstance(module, nn.Embedding):
        if isinstance(update, LowRank):
            return functional.embedding(x, update.A.T) @ update.B.T * embed_scale(module)
        return functional.embedding(x, update.dense().T) * embed_scale(module)
    dtype = torch.promote_types(x.dtype, update.dtype)
    x = x.to(dtype)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        run = cast("Callable[..., Tensor]", module._conv_forward)  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
        return run(x, weight_view(module, update.dense()).to(dtype), None)
    if isinstance(update, LowRank):
        return (x @ update.A.T.to(dtype)) @ update.B.T.to(dtype)
    return x @ update.dense().T.to(dtype)


Seen = Callable[[TokenGradient, int, int], None]
"""(inputs x of one call, with the outputs in the place of g; samples in the batch;
samples before it)
"""


@contextmanager
def seeing(
    sites: Mapping[str, Site], watched: Mapping[str, Seen], size: int, before: int
) -> Generator[None]:
    """Show the inputs of layers while a batch runs."""

    def hook(name: str, see: Seen) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            see(
                token_gradient(module, [looked_at(name, module, inputs, output)], size),
                size,
                before,
            )

        return look

    hidden = next((name for name in watched if not sites[name].hooked), None)
    if hidden is not None:
        raise AnchorError(
            f"the inputs of layer {hidden!r} cannot be seen: "
            f"{type(sites[hidden].module).__name__} uses its weight inside of its own forward "
            "pass. Take a method that does not look at inputs, or ByModule for the others"
        )
    with removed(
        partial(sites[name].module.register_forward_hook, hook(name, see))
        for name, see in watched.items()
    ):
        yield
