"""Rows of different tokens are not averaged without a word; the tokenizers beside the adapters
tell.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import sapmerge as sm
from sapmerge.io.added_tokens import added_tokens
from tests.kinds import helpers as h
from tests.kinds.helpers import QV, edit, train

FORMS = {
    "added_tokens.json": lambda rows: {token: row for row, token in rows.items()},
    "tokenizer_config.json": lambda rows: {
        "added_tokens_decoder": {str(row): {"content": token} for row, token in rows.items()}
    },
    "tokenizer.json": lambda rows: {
        "version": "1.0",
        "added_tokens": [{"id": row, "content": token} for row, token in rows.items()],
    },
}


def with_tokens(path: Path, rows: dict[int, str], files: Any = FORMS) -> Path:
    out = edit(path, lambda c: c | {"base_model_name_or_path": "org/base"})
    for name in files:
        (out / name).write_text(json.dumps(FORMS[name](rows)))
    return out


def told(paths: list[Path], **settings: Any) -> str:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sm.merge([str(path) for path in paths], method=sm.mean(), **settings)
    return "\n".join(str(w.message) for w in found if issubclass(w.category, sm.SapmergeWarning))


@pytest.fixture
def saved(tmp_path: Path) -> list[Path]:
    both = ["embed_tokens", "lm_head"]
    return [
        train(tmp_path, h.llama, k, r=4, target_modules=QV, modules_to_save=both) for k in (1, 2)
    ]


@pytest.mark.parametrize("file", FORMS)
def test_every_file_of_a_tokenizer_tells(saved: list[Path], file: str) -> None:
    tool, think = {62: "<tool>", 63: "<pad>"}, {62: "<think>", 63: "<pad>"}
    apart = [with_tokens(saved[0], tool, [file]), with_tokens(saved[1], think, [file])]
    assert added_tokens(str(apart[0])) == tool
    text = told(apart, modules_to_save="mean")
    assert f"row 62 is '<tool>' in {apart[0].name!r} and '<think>' in {apart[1].name!r}" in text
    assert "row 63" not in text
    assert "row 62" not in told(apart, modules_to_save="drop")
    assert "row 62" not in told(apart, modules_to_save="first")
    same = [with_tokens(path, tool, [file]) for path in saved]
    assert "row" not in told(same, modules_to_save="mean")


def test_only_trained_rows_count(tmp_path: Path) -> None:
    rows = {"embed_tokens": [3, 5]}
    paths = [
        train(tmp_path, h.llama, k, r=4, target_modules=QV, trainable_token_indices=rows)
        for k in (1, 2)
    ]
    tokens = [{3: "<a>", 5: "<b>", 9: "<c>"}, {3: "<a>", 5: "<x>", 9: "<y>"}]
    text = told([with_tokens(p, t) for p, t in zip(paths, tokens, strict=True)])
    assert "row 5 is '<b>'" in text
    assert "row 9" not in text


def test_without_embeddings_no_tokenizer_is_opened(tmp_path: Path) -> None:
    paths = [train(tmp_path, h.llama, k, r=4, target_modules=QV) for k in (1, 2)]
    apart = [with_tokens(p, {62: f"<{k}>"}) for k, p in enumerate(paths)]
    assert told(apart) == ""


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b'{"added_tokens": [1, {"id": []}]}'])
def test_a_broken_tokenizer_is_no_tokenizer(saved: list[Path], content: bytes) -> None:
    broken = with_tokens(saved[0], {}, [])
    for name in FORMS:
        (broken / name).write_bytes(content)
    assert added_tokens(str(broken)) == {}
    told([broken, with_tokens(saved[1], {62: "<tool>"})], modules_to_save="mean")
    shutil.rmtree(broken)
