"""The prefix of a network: what runs before the first adapted layer is the same for every adapter,
and runs once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from sapmerge.anchors.calls import Call, Traces, version_of
from sapmerge.anchors.hooks import removed
from sapmerge.core.undo import restoring

__all__ = ["Prefix"]


class Prefix:
    """Outputs of modules that run before the first adapted one,
    kept from one pass over the anchors for the next.

    The modules are the largest in which nothing is adapted: whole blocks, whole towers. A kept
    output stands in only for the same call on the same batch with inputs that are equal, bit for
    bit; so nothing is assumed about the order in which a model or a loss runs its parts,
    and a loss that draws random numbers is computed anew each time.

    A module runs each time if its output may depend on more than its inputs, or someone may notice
    that it did not run: it or a part of it changes an attribute, a buffer, an argument or the
    random state; an argument is more than plain data (a cache of keys and values);
    an input asks for a gradient; a part of it has hooks.

    Args:
        targets: the adapted modules.
        budget: bytes that may be kept; what comes later in the network is computed again.
    """

    def __init__(self, targets: Iterable[nn.Module], budget: int) -> None:
        self._targets, self._budget = list(targets), budget
        self._calls: dict[tuple[int, int, int], Call | None] = {}
        self._counts: dict[int, int] = {}
        self._weights: object = None
        self._storages: dict[int, int] = {}
        self._batch: int | None = None
        self._reached = self._inside = False
        self.embedded: dict[str, list[Tensor]] | None = None
        """What stands in for the inputs of a tower that no adapter touches:
        its embeddings, batch by batch.
        """

    def __getstate__(self) -> tuple[list[nn.Module], int]:
        return self._targets, self._budget  # what is kept is of modules of this process

    def __setstate__(self, state: tuple[list[nn.Module], int]) -> None:
        Prefix.__init__(self, *state)

    @property
    def kept(self) -> int:
        """The bytes that are kept."""
        return sum(self._storages.values())

    def check(self, base: nn.Module) -> None:
        """If a weight changed (by applying the merged adapter, say), nothing is kept any more."""
        before, self._weights = self._weights, _weights(base)
        if self._weights != before:
            self._calls, self._storages, self.embedded = {}, {}, None

    @contextmanager
    def reused(self, base: nn.Module) -> Generator[None]:
        """Modules of `base` hand out what is kept of them; they are as they were on the way out."""
        with ExitStack() as stack:
            if not any(
                isinstance(module, (torch.jit.ScriptModule, nn.DataParallel))
                for module in base.modules()
            ):
                stack.enter_context(
                    removed(
                        functools.partial(t.register_forward_pre_hook, self._reach)
                        for t in self._targets
                    )
                )
                for module in _largest(base, set(self._targets)):
                    stack.enter_context(_replaced(module, self._reusing(module, module.forward)))
            yield

    def on(self, batch: int | None) -> None:
        """Which batch runs next; None: one of which nothing is kept."""
        self._batch = batch
        self.start()

    def start(self) -> None:
        """The batch runs from the start."""
        self._counts, self._reached, self._inside = {}, False, False

    def _reach(self, module: nn.Module, inputs: Any) -> None:
        self._reached = True

    def _reusing(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The module's `forward`, which is left out where its output is kept."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._batch is None or self._reached or self._inside or _looked_into(module):
                return forward(*args, **kwargs)
            number = self._counts[id(module)] = self._counts.get(id(module), 0) + 1
            place = (self._batch, id(module), number)
            kept = self._calls.get(place)
            if kept is not None:
                if kept.equals(args, kwargs):
                    return kept.output()
                self._calls[place] = None  # it differs between passes: not tried again
            self._inside = True
            try:
                if place in self._calls:
                    return forward(*args, **kwargs)
                output, call = self._run(module, forward, args, kwargs)
                if call is not None:
                    self._calls[place] = call
                return output
            finally:
                self._inside = False

        return run

    def _run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Call | None]:
        """The output of a module, and the call if it can stand in for the next one."""
        call, before = Call.of(args, kwargs), Traces.of(module)
        output = forward(*args, **kwargs)
        if call is None or self._reached or not before.same(Traces.of(module)):
            return output, None
        call = call.returning(output, args, kwargs)
        if call is None:
            return output, None
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in call.tensors())}
        new = {where: size for where, size in storages.items() if where not in self._storages}
        if self.kept + sum(new.values()) > self._budget:
            return output, None
        self._storages |= new
        return output, call


def _largest(module: nn.Module, targets: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules inside that hold matrices to multiply with, and nothing adapted."""
    for child in module.children():
        if child in targets:
            continue
        containers = (nn.ModuleList, nn.ModuleDict)  # they are not called themselves
        if isinstance(child, containers) or any(part in targets for part in child.modules()):
            yield from _largest(child, targets)
        elif any(
            parameter.ndim > 1
            for part in child.modules()
            if not isinstance(part, nn.Embedding)
            for parameter in part.parameters(recurse=False)
        ):
            yield child


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Another `forward` for a module."""
    own = vars(module).get("forward")
    with restoring() as undo:
        undo.add(functools.partial(_restore, module, own))
        module.forward = forward
        yield


def _restore(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is not None:
        module.forward = own
    elif "forward" in vars(module):
        del module.forward


def _looked_into(module: nn.Module) -> bool:
    """Whether someone sees what runs inside of a module: then it has to."""
    everywhere = vars(nn.modules.module)
    if everywhere["_global_forward_hooks"] or everywhere["_global_forward_pre_hooks"]:
        return True
    return any(
        bool(own["_forward_pre_hooks"])
        or "forward" in own
        or not all(map(_idle, own["_forward_hooks"].values()))
        for own in (vars(part) for part in module.modules() if part is not module)
    )


def _idle(hook: Any) -> bool:
    """Whether it is a hook of transformers, which stays in a model for good and collects
    outputs when asked to.
    """
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    collector = hook.__globals__.get("_active_collector")
    return collector is not None and not collector.get()


def _weights(base: nn.Module) -> object:
    """What changes when a weight of the model is replaced or written to."""
    tensors = cast("list[Tensor]", [*base.parameters(), *base.buffers()])
    return [(tensor.data_ptr(), version_of(tensor)) for tensor in tensors]
