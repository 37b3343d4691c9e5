"""The model card of an output: the Hub's fields, what was merged, the recipe; no local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sapmerge.display.summary import percent, span
from sapmerge.display.words import title_of
from sapmerge.io.adapter import Adapter
from sapmerge.io.records import is_folder
from sapmerge.merging import licences
from sapmerge.merging.command import command_of
from sapmerge.merging.inputs import in_content_order
from sapmerge.merging.report import LayerReport, Report
from sapmerge.merging.run import Run

__all__ = ["card_of", "hub_id"]

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_CACHED = re.compile(r"models--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")
_SCHEME = re.compile(r"hf://([^@\s]+)(?:@([\w.-]+))?")
_LEFT_OUT = "the stored adapter keeps less than 90 % of the merged update's energy"


def card_of(
    run: Run,
    rows: Sequence[LayerReport],
    report: Report | None,
    said: Mapping[str, Any] | None,
    written: Mapping[str, object],
) -> str:
    """README.md of an output: the same bytes for the same inputs in any order.

    Args:
        report: of the merge; without it weights are those that were given.
        said: of the anchors, see `anchored`.
        written: how it was written, where that is not the usual way.
    """
    from sapmerge.version import __version__

    base = run.base.name if run.base.name and _is_id(run.base.name) else None
    head = ["library_name: peft", "tags: [lora, merge, sapmerge]"]
    if base:
        head += [f"base_model: {json.dumps(base)}", "base_model_relation: merge"]
    stated = licences.stated(run.adapters)
    head += licences.fields(stated)
    energy = sum(row.norm**2 for row in rows)
    kept = sum(row.energy_kept * row.norm**2 for row in rows) / energy if energy else 1.0
    ranks = span(row.rank for row in rows)
    recipe = {key: value for key, value in run.recipe.items() if key != "base_model"}
    count = len(run.adapters)
    parts = f"{count} adapter{'s' if count != 1 else ''}"
    notes = [f"{_LEFT_OUT}."] if kept < 0.9 else []
    notes += _remarks(run, report)
    text = [
        "# Merged LoRA adapter",
        "",
        f"Made by sapmerge {__version__} from {parts}"
        + (f" of [{base}](https://huggingface.co/{base})" if base else "")
        + f": {len(rows)} layers, rank {ranks}, energy kept {percent(kept)}.",
        "",
        *(line for note in notes for line in (f"**Note:** {note}", "")),
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base, path)",
        "```",
        "",
        "## Merged adapters",
        "",
        "| adapter | weight | layers | energy share | sha256 |",
        "|---|--:|--:|--:|---|",
        *_inputs(run, rows, report),
        "",
        f"Energy share: of the squared norms of the weighted updates. {licences.sentence(stated)}",
        "",
        *([] if said is None else _anchors(said)),
        "## Recipe",
        "",
        *_fenced(json.dumps(recipe, indent=2, sort_keys=True), "json"),
        "",
        *_fenced(command_of({**run.recipe, "base_model": base}, _places(run), written), "sh"),
        "",
        "`sapmerge reproduce` makes it again from the adapters above and compares the bits.",
        "",
    ]
    return "\n".join(["---", *head, "---", *text])


def _in_order(run: Run) -> list[tuple[Adapter, float]]:
    return sorted(zip(run.adapters, run.weights, strict=True), key=lambda p: in_content_order(*p))


def _places(run: Run) -> list[tuple[str, str]]:
    """Label and place of every adapter: of the Hub, or a word for the reader's own folder."""
    places: list[tuple[str, str]] = []
    for adapter, _ in _in_order(run):
        found = hub_id(adapter.source)
        own = re.sub(r"[^A-Z0-9]+", "_", adapter.label.upper())
        place = own if found is None else f"hf://{found[0]}" + f"@{found[1]}" * bool(found[1])
        places.append((adapter.label, place))
    return places


def _remarks(run: Run, report: Report | None) -> list[str]:
    """What a user of the output should know."""
    if report is None:
        return []
    weights = report.weights
    out = [a.label for a, weight in _in_order(run) if weight != 0 and weights[a.label] == 0]
    loud = sorted(a.label for a in report.adapters if a.outlier is not None and abs(a.outlier) > 5)
    notes = [f"the method left out {', '.join(out)}."] if out else []
    notes += [f"far from the others in norm: {', '.join(loud)}."] if loud else []
    dropped = ", ".join(sorted(report.dropped_modules))
    return notes + ([f"modules of the adapters that are left out: {dropped}."] if dropped else [])


def _anchors(said: Mapping[str, Any]) -> list[str]:
    """The section of a merge with anchors."""
    model = said["model"]
    lines = [
        "## Anchors",
        "",
        f"{said['count']} in {said['batches']} batches, sha256 `{said['anchors'][:16]}`"
        + (f"; weights of the model `{model[:16]}`." if model else "."),
        "",
        "| at | loss |",
        "|---|--:|",
        *(f"| {place} | {_number(loss)} |" for place, loss in said["losses"].items()),
        "",
    ]
    decided = {key: value for key, value in said["decided"].items() if key != "weights"}
    listed = [f"* {title_of(key)}: {_told(value)}" for key, value in decided.items()]
    return [*lines, *listed, *([""] if listed else [])]


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, float]", value).items()
        return ", ".join(f"{key} {_number(number)}" for key, number in entries)
    return _number(value) if isinstance(value, float) else ", ".join(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _inputs(run: Run, rows: Sequence[LayerReport], report: Report | None) -> list[str]:
    energies = {a.label: sum(row.energies.get(a.label, 0.0) for row in rows) for a in run.adapters}
    total = sum(energies.values())
    shares = {label: energy / total if total else None for label, energy in energies.items()}
    used = {a.label: weight for a, weight in _in_order(run)}
    if report is not None:
        used = report.weights
        shares = {a.label: a.energy_share if total else None for a in report.adapters}
    lines: list[str] = []
    for adapter, _ in _in_order(run):
        found = hub_id(adapter.source)
        name = adapter.label
        if found is not None:
            repository, revision = found
            place = f"https://huggingface.co/{repository}/tree/{revision or 'main'}"
            name = f"[{repository}]({place})"
        share, weight = percent(shares[adapter.label]), f"{used[adapter.label]:.4g}"
        row = (name, weight, len(adapter.modules), share, f"`{adapter.digest[:16]}`")
        lines.append("| " + " | ".join(str(cell) for cell in row) + " |")
    return lines


def hub_id(source: str) -> tuple[str, str | None] | None:
    """The repository on the Hub, and its revision, that an adapter was read from; None for
    others. Told by `hf://user/name@revision` and by the layout of the Hub's cache.

    Example:
        >>> from sapmerge.merging.card import hub_id
        >>> hub_id("hf://user/name@v1")
        ('user/name', 'v1')
    """
    if scheme := _SCHEME.fullmatch(source):
        return (scheme[1], scheme[2]) if _is_name(scheme[1]) else None
    if cached := _CACHED.search(source):
        name = cached[1].replace("--", "/")  # the cache writes / as --, which no id has
        return (name, cached[2]) if _is_name(name) else None
    return None


def _is_name(text: str) -> bool:
    """Whether the Hub allows the name."""
    fine = _ID.fullmatch(text) is not None and "--" not in text and ".." not in text
    return fine and not text.endswith(".git")


def _is_id(base: str) -> bool:
    """Whether the base is named by a Hub id: a folder of that name is what transformers would
    load instead, so it is one too.
    """
    return _is_name(base) and not is_folder(base)


def _fenced(text: str, language: str) -> list[str]:
    """A block of code, with a fence that the text does not contain."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence]
