"""Every method merged, applied and evaluated; the model is what it was after each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, cast

import torch

from sapmerge.comparing.bench import Bench, check_alike, check_bench, metric_of, statistics_in
from sapmerge.comparing.kept import KeptResults
from sapmerge.comparing.table import BASE, Comparison, MethodResult
from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.core.scalars import plain
from sapmerge.core.undo import guarded
from sapmerge.errors import MethodError
from sapmerge.io.machine import at_terminal
from sapmerge.losses import Loss
from sapmerge.merging.calling import check_method
from sapmerge.merging.inputs import Adapters, as_given, check_numbers
from sapmerge.merging.opened import open_merge
from sapmerge.method_names import method_named
from sapmerge.parts.scaling import MatchEnergy

__all__ = ["MethodLike", "compare"]

MethodLike: TypeAlias = "Method | str"
"""A method, its name, or a recipe."""


@guarded
def compare(
    adapters: Adapters,
    methods: Sequence[MethodLike] | Mapping[str, MethodLike],
    anchor_loader: Any = None,
    model: Any = None,
    *,
    evaluate: Callable[[Any], Any],
    metric: str | None = None,
    maximize: bool = True,
    matched: bool = True,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    scale: float = 1.0,
    loss: Loss | None = None,
    modules_to_save: Any = None,
    base_model: str | None = None,
    device: torch.device | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Merge with every method, evaluate each merge on the model, and say which are better.

    The adapters are opened once, and what methods have in common is computed once: updates as they
    were read, norms, Gram matrices, statistics over the anchors, and the merge of which a matched
    length is a multiple. Up to half a gigabyte of the adapters' updates and as much of a merge are
    held; what is beyond is read or merged again. Each merge is applied to the model without loss of
    rank, as `Merged.apply_to` does, in eval mode and without gradients; then weights, buffers and
    training modes are what they were.

    Args:
        adapters: as in `merge`.
        methods: methods, names or recipes: "ties", sm.ties(0.5), "Chain(Mean())"; or a mapping
            label -> any of these.
        anchor_loader: as in `merge`, for methods that read anchors.
        model: the base model, loaded.
        evaluate: model -> a number; or one number per sample (1 right, 0 wrong), which gives
            intervals and tells what is within noise; or a mapping name -> either.
        metric: the name that the leaderboard goes by; the first one by default.
        maximize: whether more is better.
        matched: evaluate every method at matched length, too: `MatchEnergy(method)`, so that no
            method wins by its length alone.
        weights: as in `merge`.
        scale: as in `merge`.
        loss: as in `merge`.
        modules_to_save: as in `merge`.
        base_model: as in `merge`.
        device: as in `merge`.
        folder: keep results there, and take those of an earlier run from there.
        progress: False: no bar. None: one if stderr is a terminal.

    Returns:
        A `Comparison`: `print` gives the leaderboard, `best` its first row. A method that the merge
        refuses has its reason there and no score.

    Raises:
        MethodError: no methods, an unknown name, or a metric that returns no numbers.
        SapmergeError: adapters that cannot be read.

    Example:
        >>> import sapmerge as sm
        >>> table = sm.compare(["art", "sketch"], ["mean", "ties"], model=model, evaluate=accuracy)
        ... # doctest: +SKIP
        >>> print(table)  # doctest: +SKIP
    """
    check_bench(model, evaluate, "compare")
    plan = _plan(methods, matched, lambda one: check_method(one, anchor_loader, model))
    scale = plain(scale)
    check_numbers(scale, None)
    inputs: dict[str, Any] = {
        "weights": as_given(weights),
        "loss": loss,
        "modules_to_save": modules_to_save,
        "base_model": base_model,
        "device": device,
    }
    with ExitStack() as stack:
        cache = statistics_in(folder, anchor_loader, loss, stack)
        opened = open_merge(adapters, anchor_loader, model, **inputs, progress=False, cache=cache)
        call = {**inputs, "scale": scale}
        anchors = None if anchor_loader is None or folder is None else list(anchor_loader)
        settings = [[(a.label, a.digest) for a in opened.adapters], sorted(call.items()), anchors]
        kept = KeptResults(folder, settings, model, evaluate)
        bench, results = Bench(opened, model, evaluate, scale, matched), list[MethodResult]()
        for name, length, method in _with_bar(plan, progress):
            found = kept.get(method, name, length)
            if found is None:
                found = bench.result(name, length, method)
                if not found.problem:
                    kept.put(method, found)
            if method is None:
                metric_of(found, metric)  # before anything is merged
            elif not found.problem:
                check_alike(results[0], found)
            results.append(found)
    return Comparison(tuple(results), metric_of(results[0], metric), maximize)


_Planned: TypeAlias = "tuple[str, str, Method | None]"


def _plan(methods: object, matched: bool, checked: Callable[[Any], Method]) -> list[_Planned]:
    """(name, length, method), the base model first."""
    if isinstance(methods, str) or not isinstance(methods, (Sequence, Mapping)) or not methods:
        raise MethodError(f"compare takes a list of methods, or label -> method; got {methods!r}")
    if isinstance(methods, Mapping):
        table = cast("Mapping[object, object]", methods)
        named = [(str(label), one) for label, one in table.items()]
    else:
        given = cast("Sequence[object]", methods)
        named = [(one if isinstance(one, str) else "", one) for one in given]
    plan: list[_Planned] = [(BASE, "", None)]
    for label, one in named:
        method = checked(method_named(one) if isinstance(one, str) else one)
        name = label or recipe(method)
        plan.append((name, "own", method))
        if matched and not isinstance(method, MatchEnergy):
            plan.append((name, "matched", MatchEnergy(method)))
    return plan


def _with_bar(plan: Sequence[_Planned], progress: bool | None) -> Iterator[_Planned]:
    if not (at_terminal() if progress is None else progress):
        yield from plan
        return
    from tqdm import tqdm  # of peft's dependencies

    bar = tqdm(plan, unit="merge", leave=False)
    for one in bar:
        bar.set_description(" ".join(one[:2]).strip())
        yield one
