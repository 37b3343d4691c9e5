"""One method merged, applied and evaluated; the model is what it was afterwards."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sapmerge.anchors.digest import digest
from sapmerge.comparing.metric import Score, read_scores
from sapmerge.comparing.table import MethodResult
from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.core.undo import restoring
from sapmerge.errors import AnchorError, MethodError, SapmergeError, SapmergeWarning
from sapmerge.losses import Loss
from sapmerge.merging.merge import Merged, merge

__all__ = ["Bench", "check_bench", "metric_of", "statistics_in"]


@dataclass(frozen=True, eq=False)
class Bench:
    """What is the same for every method of a comparison.

    Args:
        adapters: opened.
        loader: of the anchors, or None.
        model: the base, loaded.
        evaluate: the metric.
        call: further arguments of `merge`.
        cache: folder of the anchors' statistics, or None.
    """

    adapters: Any
    loader: Any
    model: nn.Module
    evaluate: Callable[[Any], Any]
    call: Mapping[str, Any]
    cache: str | None

    def result(self, name: str, length: str, method: Method | None, **more: Any) -> MethodResult:
        """The scores of a method, or of the base model for None; what the merge refuses has its
        reason.

        Args:
            name: as the leaderboard says it.
            length: its own, or the matched one.
            method: to merge with.
            more: arguments of `merge` instead of those of the call.
        """
        start, norm, entered = time.perf_counter(), 0.0, False
        text = "" if method is None else recipe(method)
        with _as_it_was(self.model):
            try:
                if method is None:
                    scores = self._scores()
                else:
                    with self._merged(method, more).applied(self.model) as report:
                        entered = True
                        norm = sum(layer.norm**2 for layer in report.layers) ** 0.5
                        scores = self._scores()
            except SapmergeError as error:
                if method is None or entered:
                    raise
                return MethodResult(name, length, text, problem=str(error))
        return MethodResult(name, length, text, scores, norm, time.perf_counter() - start)

    def _merged(self, method: Method, more: Mapping[str, Any]) -> Merged:
        """Without the warning that a method reads no anchors: others of the comparison do."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the anchors were not used", SapmergeWarning)
            return merge(
                self.adapters, self.loader, self.model, method=method, cache=self.cache,
                progress=False, **{**self.call, **more},
            )  # fmt: skip

    def _scores(self) -> dict[str, Score]:
        self.model.eval()
        with torch.no_grad():
            return read_scores(self.evaluate(self.model))


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
