"""One method merged, applied and evaluated; the model is what it was afterwards."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sapmerge.anchors.digest import digest
from sapmerge.comparing.metric import Score, read_scores
from sapmerge.comparing.table import MethodResult
from sapmerge.core.layer import Layer
from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.core.torch_state import pinned
from sapmerge.core.undo import restoring
from sapmerge.core.updates import Dense, LowRank, Update
from sapmerge.errors import AnchorError, MethodError, SapmergeError, SapmergeWarning
from sapmerge.losses import Loss
from sapmerge.merging.merge import Merged
from sapmerge.merging.opened import Opened
from sapmerge.merging.run import Run
from sapmerge.parts.scaling import MatchEnergy

__all__ = ["Bench", "check_alike", "check_bench", "metric_of", "statistics_in"]


_ROOM = 1 << 29
"""Bytes of merged updates that are held for the same merge at another length."""


class _Remembered:
    """A prepared method whose updates are held, as far as they fit, to be scaled later."""

    def __init__(self, method: Method) -> None:
        self._method, self._room = method, _ROOM
        self._updates: dict[str, Update] = {}

    def __call__(self, layer: Layer) -> Update:
        update = self._updates.get(layer.name)
        if update is None:
            update = self._method(layer)
            # what a function of the user's returns instead is refused where layers are merged
            known = isinstance(update, (LowRank, Dense))  # pyright: ignore[reportUnnecessaryIsInstance]
            if known and update.nbytes <= self._room:
                self._room -= update.nbytes
                self._updates[layer.name] = update
        return update


@dataclass(frozen=True, eq=False)
class Bench:
    """What is the same for every method of a comparison, opened once: the updates of the adapters
    that are read for one method, their norms and Gram matrices serve the others.

    Args:
        opened: adapters and anchors, without a method.
        model: the base, loaded.
        evaluate: the metric.
        scale: of every merge, as in `merge`.
        matched: whether each method is followed by `MatchEnergy` of it.
    """

    opened: Opened
    model: nn.Module
    evaluate: Callable[[Any], Any]
    scale: float = 1.0
    matched: bool = False
    _last: list[Run] = field(default_factory=list[Run], init=False, repr=False)

    def result(
        self, name: str, length: str, method: Method | None, scale: float | None = None
    ) -> MethodResult:
        """The scores of a method, or of the base model for None; what the merge refuses has its
        reason.

        Args:
            name: as the leaderboard says it.
            length: its own, or the matched one.
            method: to merge with.
            scale: instead of that of all.
        """
        start, norm, entered = time.perf_counter(), 0.0, False
        text = "" if method is None else recipe(method)
        with _as_it_was(self.model), self.opened.stream.holding():
            try:
                if method is None:
                    scores = self._scores()
                else:
                    run = self._run(method, self.scale if scale is None else scale)
                    with Merged(run).applied(self.model) as report:
                        entered = True
                        norm = sum(layer.norm**2 for layer in report.layers) ** 0.5
                        scores = self._scores()
            except SapmergeError as error:
                if method is None or entered:
                    raise
                return MethodResult(name, length, text, problem=str(error))
        return MethodResult(name, length, text, scores, norm, time.perf_counter() - start)

    def _run(self, method: Method, scale: float) -> Run:
        """A merge. `MatchEnergy` of the method before is that merge times a factor."""
        last = self._last.pop() if self._last else None
        if isinstance(method, MatchEnergy) and last is not None and last.method is method.method:
            return _matched(last, method)
        with warnings.catch_warnings():
            # others of the comparison read them
            warnings.filterwarnings("ignore", "the anchors were not used", SapmergeWarning)
            run = self.opened.run(method, scale)
        if self.matched:
            run = replace(run, prepared=_Remembered(run.prepared))
            self._last.append(run)
        return run

    def _scores(self) -> dict[str, Score]:
        self.model.eval()
        with torch.no_grad():
            return read_scores(self.evaluate(self.model))


@pinned
def _matched(run: Run, method: MatchEnergy) -> Run:
    """The merge again, at the mean length of its inputs."""
    return replace(run, method=method, prepared=MatchEnergy(run.prepared).prepare(run.stream))


def check_bench(model: Any, evaluate: Any, who: str) -> None:
    """Refuse what no comparison can be run with.

    Raises:
        MethodError: no loaded model, or a metric that is no function.
    """
    if not hasattr(model, "named_modules"):
        raise MethodError(f"{who} needs the loaded base model: model=...")
    if not callable(evaluate):
        raise MethodError(f"evaluate is a function of the model; got a {type(evaluate).__name__}")


def metric_of(base: MethodResult, metric: str | None) -> str:
    """The metric that decides: the one that was named, or else the first.

    Raises:
        MethodError: the model's scores have no such metric.
    """
    if metric is not None and metric not in base.scores:
        raise MethodError(f"evaluate gives {list(base.scores)}, and no {metric!r}")
    return metric or next(iter(base.scores))


def check_alike(base: MethodResult, found: MethodResult) -> None:
    """Whether a metric gave a merge what it gave the base model.

    Raises:
        MethodError: other names, or another number of samples, which are compared one by one.
    """
    if base.scores.keys() != found.scores.keys():
        raise MethodError(
            f"evaluate gives {list(found.scores)} for {found.name}, and {list(base.scores)} for "
            "the base model"
        )
    for name, score in found.scores.items():
        one, other = score.count, base.scores[name].count
        if one != other:
            raise MethodError(
                f"evaluate gives {one} samples of {name!r} for {found.name}, and {other} for the "
                "base model: methods are compared on the same samples"
            )


def statistics_in(
    folder: str | os.PathLike[str] | None, loader: Iterable[Any] | None, loss: Loss | None,
    stack: ExitStack,
) -> str | None:  # fmt: skip
    """Where statistics over the anchors are kept for the methods to come: in the folder, or a
    temporary one. None without anchors, or with anchors that cannot be told by their content.
    """
    if loader is None:
        return None
    if folder is not None:
        return os.path.join(os.fspath(folder), "statistics")
    try:
        digest([list(loader), loss])
    except AnchorError:
        return None
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="sapmerge-"))


@contextmanager
def _as_it_was(model: nn.Module) -> Generator[None]:
    """Buffers and training modes are put back: a metric may change them."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def put_back() -> None:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

    with restoring() as undo:
        undo.add(put_back)
        yield
