"""Parameters of methods searched on a metric, by Optuna (extra `search`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias, cast

import torch

from sapmerge.comparing.bench import Bench, check_alike, check_bench, metric_of, statistics_in
from sapmerge.comparing.table import BASE, Comparison, MethodResult
from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.core.scalars import plain
from sapmerge.display.tables import table
from sapmerge.errors import MethodError
from sapmerge.io.machine import at_terminal
from sapmerge.losses import Loss
from sapmerge.merging.calling import check_method
from sapmerge.merging.inputs import Adapters, as_given, check_numbers
from sapmerge.merging.opened import open_merge
from sapmerge.method_names import factory_of

__all__ = ["SearchResult", "SearchTrial", "Space", "search"]

Space: TypeAlias = "Mapping[str, Mapping[str, Any]] | Callable[[Any], Method]"
"""Method's name -> argument -> (low, high), a list of choices, or a value; or trial -> method."""

_SHOWN = 8


@dataclass(frozen=True, eq=False)
class SearchTrial:
    """One point of the space.

    Args:
        method: that was merged with.
        scale: that multiplied the merged update.
        parameters: what was chosen, by name.
        result: the scores, or why the merge was refused.
    """

    method: Method
    scale: float
    parameters: Mapping[str, Any]
    result: MethodResult


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found. `print` gives the first rows and what to do next.

    Args:
        trials: in the order in which they were made.
        table: the same points as a leaderboard, each once, with the base model.
        seed: of the sampler.
    """

    trials: tuple[SearchTrial, ...]
    table: Comparison
    seed: int

    @property
    def best(self) -> SearchTrial:
        """The trial with the best score, the first of equal ones:
        `merge(adapters, method=found.best.method, scale=found.best.scale)`.

        Raises:
            MethodError: the merge refused all of them.
        """
        first = self.table.best
        return next(trial for trial in self.trials if trial.result is first)

    def __str__(self) -> str:
        metric, best = self.table.metric, self.best
        rows = [*self.table.rows[:_SHOWN], *(r for r in self.table.results if r.name == BASE)]
        lines = [
            table(
                ["method", metric],
                [[row.name, f"{row.scores[metric].value:.4g}"] for row in rows],
            ),
            "",
            f"{best.result.name} was chosen on {metric!r}, the best of {len(self.trials)} trials "
            f"(seed {self.seed}).",
        ]
        if len(self.table.within_noise) > 1:
            lines.append(
                f"{len(self.table.within_noise)} of {len(self.table.rows)} points are within noise "
                "of each other."
            )
        lines.append(
            "Its score is flattering, as it was chosen by it: report one from data that the search "
            "has not seen."
        )
        return "\n".join(lines)


def search(
    adapters: Adapters,
    space: Space,
    anchor_loader: Any = None,
    model: Any = None,
    *,
    evaluate: Callable[[Any], Any],
    trials: int = 30,
    seed: int = 0,
    scale: float | tuple[float, float] = 1.0,
    metric: str | None = None,
    maximize: bool = True,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    loss: Loss | None = None,
    modules_to_save: Any = None,
    base_model: str | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> SearchResult:
    """Search the parameters of methods for the best score on a metric, by Optuna's TPE sampler.

    Each point is merged, applied to the model without loss of rank and evaluated as in `compare`;
    then the model is what it was. A point that comes up again is not evaluated again.

    Args:
        adapters: as in `merge`.
        space: method's name -> argument -> range: (low, high), both included, of whole numbers if
            both are; a list of choices; or a value that is fixed. Several methods compete. For
            compositions, a function: Optuna's trial -> method.
        anchor_loader: as in `merge`, for methods that read anchors.
        model: the base model, loaded.
        evaluate: as in `compare`: model -> a number, one per sample, or name -> either. On
            held-out data, and not on those that the result will be reported on.
        trials: how many points are tried.
        seed: of the sampler; one seed gives one search.
        scale: multiplies the merged update; a range (low, high) is searched, too.
        metric: the name that counts; the first one by default.
        maximize: whether more is better.
        weights: as in `merge`.
        loss: as in `merge`.
        modules_to_save: as in `merge`.
        base_model: as in `merge`.
        device: as in `merge`.
        progress: False: no bar. None: one if stderr is a terminal.

    Returns:
        A `SearchResult`: `best` has the method, its scale and its parameters.

    Raises:
        MethodError: Optuna is not installed; a method or argument that does not exist, a range
            that is none; no trials.
        SapmergeError: adapters that cannot be read.

    Example:
        >>> import sapmerge as sm
        >>> space = {"ties": {"density": (0.05, 1.0)}, "mean": {}}
        >>> found = sm.search(["art", "sketch"], space, model=model, evaluate=accuracy, trials=20)
        ... # doctest: +SKIP
        >>> merged = sm.merge(["art", "sketch"], method=found.best.method)  # doctest: +SKIP
    """
    check_bench(model, evaluate, "search")
    if isinstance(trials, bool) or trials < 1:
        raise MethodError(f"trials is a number from 1 on; got {trials!r}")
    scale = plain(scale)
    if isinstance(scale, tuple):
        _check_range(scale, "scale")
    else:
        check_numbers(scale, None)
    _check(space)
    optuna = _optuna()
    numbers = as_given(weights)
    made, known = list[SearchTrial](), dict[tuple[str, float], MethodResult]()
    with ExitStack() as stack:
        opened = open_merge(
            adapters,
            anchor_loader,
            model,
            weights=numbers,
            loss=loss,
            modules_to_save=modules_to_save,
            base_model=base_model,
            device=device,
            progress=False,
            cache=statistics_in(None, anchor_loader, loss, stack),
        )
        bench = Bench(opened, model, evaluate)
        base = bench.result(BASE, "", None)
        name = metric_of(base, metric)
        stack.enter_context(_quiet(optuna))
        study = optuna.create_study(
            direction="maximize" if maximize else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        for _ in _with_bar(trials, progress):
            trial = study.ask()
            method = check_method(_method(space, trial), anchor_loader, model)
            size = trial.suggest_float("scale", *scale) if isinstance(scale, tuple) else scale
            point = recipe(method), size
            if point not in known:
                called = point[0] if size == 1 else f"{size:.4g} x {point[0]}"
                known[point] = bench.result(called, "own", method, scale=size)
            result = known[point]
            made.append(SearchTrial(method, size, dict(trial.params), result))
            if result.problem:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                check_alike(base, result)
                study.tell(trial, result.scores[name].value)
    return SearchResult(tuple(made), Comparison((base, *known.values()), name, maximize), seed)


def _check(space: object) -> None:
    """Refuse a space that names what does not exist."""
    if callable(space):
        return
    if not isinstance(space, Mapping) or not space:
        raise MethodError(
            "a space is method's name -> argument -> range, or a function trial -> method; got "
            f"{space!r}"
        )
    for name, arguments in cast("Mapping[str, Any]", space).items():
        taken = signature(factory_of(name)).parameters
        if not isinstance(arguments, Mapping):
            raise MethodError(f"space[{name!r}] is a mapping argument -> range; got {arguments!r}")
        for argument, values in cast("Mapping[str, Any]", arguments).items():
            if argument not in taken:
                known = ", ".join(taken) or "no arguments"
                raise MethodError(f"the method {name!r} has no {argument}; it takes {known}")
            if isinstance(values, tuple):
                _check_range(cast("tuple[Any, ...]", values), f"{name}.{argument}")
            elif values == []:
                raise MethodError(f"{name}.{argument}: a list of choices holds at least one")


def _check_range(values: tuple[Any, ...], what: str) -> None:
    fine = len(values) == 2 and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one)
        for one in values
    )
    if not fine or not values[0] < values[1]:
        raise MethodError(f"{what}: a range is (low, high), low < high; got {values!r}")


def _method(space: Space, trial: Any) -> Method:
    """The method of a trial."""
    if not isinstance(space, Mapping):
        return space(trial)
    table = cast("Mapping[str, Mapping[str, Any]]", space)
    names = list(table)
    name = trial.suggest_categorical("method", names) if len(names) > 1 else names[0]
    return factory_of(name)(
        **{
            argument: _value(trial, f"{name}.{argument}", values)
            for argument, values in table[name].items()
        }
    )


def _value(trial: Any, name: str, values: Any) -> Any:
    if isinstance(values, list):
        choices = cast("list[Any]", values)
        return choices[trial.suggest_categorical(name, list(range(len(choices))))]
    if not isinstance(values, tuple):
        return values
    low, high = cast("tuple[Any, Any]", values)
    whole = isinstance(low, int) and isinstance(high, int)
    return trial.suggest_int(name, low, high) if whole else trial.suggest_float(name, low, high)


def _optuna() -> Any:
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MethodError(
            'search needs Optuna, which is not installed: pip install "sapmerge[search]"'
        ) from None
    return cast("Any", optuna)


@contextmanager
def _quiet(optuna: Any) -> Generator[None]:
    """Without a line of Optuna's per trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _with_bar(trials: int, progress: bool | None) -> Any:
    if not (at_terminal() if progress is None else progress):
        return range(trials)
    from tqdm import tqdm  # of peft's dependencies

    return tqdm(range(trials), unit="trial", leave=False)
