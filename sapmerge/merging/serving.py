"""Outputs for engines: what of a merge an engine can serve, and in which form it needs it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sapmerge.errors import MethodError, OutputError
from sapmerge.io.adapter import Adapter
from sapmerge.io.base_folder import BaseFolder
from sapmerge.io.engines import (
    NAMES_OF_KINDS,
    NEW_TOWER,
    TOWER,
    Engine,
    engine_of,
    problems_in,
    together,
)
from sapmerge.merging.form import Form
from sapmerge.merging.run import Run
from sapmerge.merging.spelling import written_names
from sapmerge.naming import Names

__all__ = ["check", "served_form", "served_rank", "shapes_of", "zeros_for"]


def check(path: str | os.PathLike[str], serving: str) -> list[str]:
    """What an engine would refuse, drop or apply with another strength, of any PEFT adapter.

    Args:
        path: its folder.
        serving: "vllm", "sglang", "llama.cpp", "tgi" or "diffusers".

    Returns:
        One line per problem; empty if the engine serves the adapter as PEFT does.

    Raises:
        MethodError: another engine.
        SapmergeError: whatever `Adapter.load` refuses.

    Example:
        >>> import sapmerge as sm
        >>> sm.check("merged", "llama.cpp")  # doctest: +SKIP
        []
    """
    engine = engine_of(serving)
    return problems_in(Adapter.load(path), engine)


def shapes_of(base: Any) -> dict[str, tuple[int, int]]:
    """Module -> (outputs, inputs) of its weight in a model or a folder, by its own names."""
    if base is None:
        return {}
    return base.shapes() if isinstance(base, BaseFolder) else Names(base).shapes()


def served_form(run: Run, form: Form) -> Form:
    """The form that an engine wants; the same without one.

    Raises:
        MethodError: several ranks for an engine.
        OutputError: a part of the merge that the engine does not load.
    """
    if form.serving is None:
        return form
    engine = engine_of(form.serving)
    if not form.uniform_rank:
        raise MethodError(
            f"serving={form.serving!r} needs one rank in all modules: uniform_rank=True"
        )
    names = written_names(run.adapters, form.names, run.own_names)
    if form.names is None and engine.older and any(map(NEW_TOWER.fullmatch, _mine(run, names))):
        form = replace(form, names="transformers 4")
        names = written_names(run.adapters, form.names, run.own_names)
    _check_servable(run, engine, names)
    return form


def _mine(run: Run, names: Mapping[str, str]) -> list[str]:
    """The adapted modules, as the output spells them."""
    owners = (module.owner for module in run.stream.modules.values())
    return [names.get(owner, owner) for owner in owners]


def _check_servable(run: Run, engine: Engine, names: Mapping[str, str]) -> None:
    def refuse(what: str, name: str, advice: str) -> OutputError:
        return OutputError(f"{engine.title} does not serve {what}: {name!r}; {advice}")

    whole = "merge it into the base instead: save_merged(base, path) or apply_to(model)"
    if run.heads.chosen:
        name = next(iter(run.heads.chosen)).rpartition(".")[0]
        advice = f"modules_to_save='drop' leaves it out, or {whole}"
        raise refuse("a module saved whole (modules_to_save)", name, advice)
    if run.vectors.changes:
        change = run.vectors.changes[0]
        raise refuse("token rows" if change.rows else "a bias", change.name, whole)
    for module in run.stream.modules.values():
        name = names.get(module.owner, module.owner)
        if module.kind not in engine.kinds:
            raise refuse(NAMES_OF_KINDS[module.kind], name, whole)
        if not engine.towers and TOWER.fullmatch(name):
            raise refuse("modules outside of the language model", name, whole)


def served_rank(serving: str | None, rank: int) -> int:
    """The rank that an output for an engine gets: the next that it takes.

    Raises:
        OutputError: the engine takes none so large.
    """
    ranks = () if serving is None else engine_of(serving).ranks
    found = next((one for one in ranks if one >= rank), None)
    if ranks and found is None:
        raise OutputError(
            f"{engine_of(serving or '').title} takes adapters of rank {ranks[-1]} at most, and "
            f"this one has rank {rank}: merge with rank={ranks[-1]}"
        )
    return found or rank


def zeros_for(run: Run, form: Form, names: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """The modules that get factors of zero because an engine stacks them with others, and the
    shapes of their weights.

    Raises:
        MethodError: a shape is not known.
    """
    if form.serving is None:
        return {}
    shapes = {names.get(m.owner, m.owner): m.shape for m in run.stream.modules.values()}
    known = run.shapes if form.names is None else None
    return together(shapes, engine_of(form.serving), known)
