"""The model card of an output: the Hub's fields, what was merged, the recipe; no local paths."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from sapmerge.display.summary import percent, span
from sapmerge.io.records import is_folder
from sapmerge.merging.inputs import in_content_order
from sapmerge.merging.report import LayerReport
from sapmerge.merging.run import Run

__all__ = ["card_of", "hub_id"]

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_CACHED = re.compile(r"models--([\w.-]+)[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")
_SCHEME = re.compile(r"hf://([^@\s]+)(?:@([\w.-]+))?")
_LEFT_OUT = "the stored adapter keeps less than 90 % of the merged update's energy"


def card_of(run: Run, rows: Sequence[LayerReport]) -> str:
    """README.md of an output: the same bytes for the same inputs in any order."""
    from sapmerge.version import __version__

    base = run.base.name if run.base.name and _is_id(run.base.name) else None
    head = ["library_name: peft", "tags: [lora, merge, sapmerge]"]
    if base:
        head += [f"base_model: {json.dumps(base)}", "base_model_relation: merge"]
    energy = sum(row.norm**2 for row in rows)
    kept = sum(row.energy_kept * row.norm**2 for row in rows) / energy if energy else 1.0
    ranks = span(row.rank for row in rows)
    recipe = {key: value for key, value in run.recipe.items() if key != "base_model"}
    count = len(run.adapters)
    parts = f"{count} adapter{'s' if count != 1 else ''}"
    text = [
        "# Merged LoRA adapter",
        "",
        f"Made by sapmerge {__version__} from {parts}"
        + (f" of [{base}](https://huggingface.co/{base})" if base else "")
        + f": {len(rows)} layers, rank {ranks}, energy kept {percent(kept)}.",
        "",
        *([f"**Note:** {_LEFT_OUT}.", ""] if kept < 0.9 else []),
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
        *_inputs(run, rows),
        "",
        "## Recipe",
        "",
        *_fenced(json.dumps(recipe, indent=2, sort_keys=True), "json"),
        "",
        "`sapmerge reproduce` makes it again from the adapters above and compares the bits.",
        "",
    ]
    return "\n".join(["---", *head, "---", *text])


def _inputs(run: Run, rows: Sequence[LayerReport]) -> list[str]:
    energies = {a.label: sum(row.energies.get(a.label, 0.0) for row in rows) for a in run.adapters}
    total = sum(energies.values())
    listed = sorted(zip(run.adapters, run.weights, strict=True), key=lambda p: in_content_order(*p))
    lines: list[str] = []
    for adapter, weight in listed:
        found = hub_id(adapter.source)
        name = adapter.label
        if found is not None:
            repository, revision = found
            place = f"https://huggingface.co/{repository}/tree/{revision or 'main'}"
            name = f"[{repository}]({place})"
        share = percent(energies[adapter.label] / total if total else None)
        row = (name, f"{weight:g}", len(adapter.modules), share, f"`{adapter.digest[:16]}`")
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
