"""Rows of embeddings that are averaged though they are rows of different tokens."""

from __future__ import annotations

from collections.abc import Sequence

from sapmerge.errors import warn
from sapmerge.io.adapter import Adapter
from sapmerge.io.added_tokens import added_tokens
from sapmerge.io.files import shown
from sapmerge.io.keys import EMBEDDINGS
from sapmerge.merging.heads import Heads

__all__ = ["say_other_tokens"]

_SHOWN = 3


def say_other_tokens(adapters: Sequence[Adapter], heads: Heads) -> None:
    """Warn where two adapters have added different tokens in one row, and both bring something to
    that row: embeddings saved whole and averaged, trained token rows, or a LoRA on embeddings.

    The tokenizers beside the adapters tell; without one nothing is said.
    """
    rows = {a.label: found for a in adapters if (found := _rows(a, heads)) is not None}
    if len(rows) < 2:
        return
    tokens = {
        a.label: added_tokens(a.folder)
        for a in adapters
        if a.label in rows and a.folder is not None
    }
    first: dict[int, str] = {}  # row -> who has named it
    apart: list[str] = []
    for label, named in tokens.items():
        for row in sorted(named):
            if rows[label] and row not in rows[label]:
                continue
            other = first.setdefault(row, label)
            if tokens[other][row] != named[row]:
                apart.append(
                    f"row {row} is {shown(tokens[other][row], 40)} in {other!r} and "
                    f"{shown(named[row], 40)} in {label!r}"
                )
    if apart:
        more = f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
        warn(
            f"the adapters have added different tokens: {'; '.join(apart[:_SHOWN])}{more}. They "
            "are merged as one token. Train them with one tokenizer, or take the embeddings of "
            "one: modules_to_save={'embed_tokens': '...'}"
        )


def _rows(adapter: Adapter, heads: Heads) -> frozenset[int] | None:
    """The rows of embeddings that an adapter brings something to; empty for all, None for none."""
    averaged = {
        tensor.rpartition(".")[0]
        for tensor, sources in heads.chosen.items()
        if len(sources) > 1 and any(source is adapter for source, _ in sources)
    }
    adapted = {module.owner for module in adapter.modules.values()}
    if any(EMBEDDINGS.fullmatch(name) for name in averaged | adapted):
        return frozenset()
    trained = frozenset(row for vector in adapter.vectors.values() for row in vector.rows)
    return trained or None
