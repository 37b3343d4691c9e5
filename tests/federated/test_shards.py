"""Scoring by shards: the same bytes as one process, no model in the end,
and what is missing is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge import federated as fed
from tests.federated.helpers import uploads, zoo

# random adapters
pytestmark = pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")


class Counted:
    """A loss that counts how often the model runs; the count is no part of what it is."""

    passes = 0


def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    Counted.passes += 1
    return model(batch).square().mean()


BATCHES = [torch.arange(10).reshape(2, 5), torch.arange(5, 15).reshape(2, 5)]

METHODS = {
    "sap": lambda: sm.sap(),
    "sap_original": lambda: sm.sap_original(),
    "weighed": lambda: sm.WeighByAnchors(sm.mean()),
    "clipped": lambda: sm.ClipNorms(sm.sap_original(), ratio=1.0),
}


def merged(folders: list[Path], out: Path, method: sm.Method, **options: Any) -> bytes:
    Counted.passes = 0
    made = sm.merge(folders, BATCHES, zoo(), method=method, loss=loss, **options)
    made.save_pretrained(out)
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_shards_and_one_process_make_the_same_bytes(name: str, tmp_path: Path) -> None:
    folders, method = uploads(tmp_path, 5), METHODS[name]()
    whole = merged(folders, tmp_path / "whole", method)
    alone = Counted.passes - len(BATCHES)  # the last ones are of the merged adapter, for the report
    cache, passes = tmp_path / "cache", []
    for number in (2, 0, 1):
        Counted.passes = 0
        complete = fed.score(
            folders, BATCHES, zoo(), method, cache=cache, shard=(number, 3), loss=loss
        )
        passes.append(Counted.passes)
        assert complete == (number == 1), (
            "the last one finds the others' results, and does what needs all"
        )
    assert min(passes) > 0
    assert sum(passes) <= alone, "nothing runs twice"
    Counted.passes = 0
    assert fed.score(folders, BATCHES, zoo(), method, cache=cache, loss=loss)
    assert Counted.passes == 0
    assert merged(folders, tmp_path / "sharded", method, cache=cache, cache_only=True) == whole
    assert Counted.passes == 0


def test_a_repeated_shard_runs_nothing(tmp_path: Path) -> None:
    folders = uploads(tmp_path, 4)
    fed.score(folders, BATCHES, zoo(), cache=tmp_path / "cache", shard=(0, 2), loss=loss)
    Counted.passes = 0
    fed.score(folders, BATCHES, zoo(), cache=tmp_path / "cache", shard=(0, 2), loss=loss)
    assert Counted.passes == 0


def test_what_the_cache_lacks_is_said(tmp_path: Path) -> None:
    folders, cache = uploads(tmp_path, 3), tmp_path / "cache"
    fed.score(folders, BATCHES, zoo(), sm.sap_original(), cache=cache, shard=(0, 2), loss=loss)
    with pytest.raises(sm.AnchorError, match="the cache lacks gradients at adapter 'client"):
        merged(folders, tmp_path / "out", sm.sap_original(), cache=cache, cache_only=True)
    fed.score(folders, BATCHES, zoo(), sm.sap_original(), cache=cache, loss=loss)
    # other adapters beside them change nothing of these
    with pytest.raises(sm.AnchorError, match="the cache lacks"):
        merged(
            [*folders, uploads(tmp_path / "more", 4)[3]],
            tmp_path / "out",
            sm.sap_original(),
            cache=cache,
            cache_only=True,
        )
    with pytest.raises(sm.AnchorError, match="the cache lacks the loss"):
        merged(folders, tmp_path / "out", sm.sap(), cache=cache, cache_only=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(sm.MethodError, match="cache_only=True needs cache"):
        sm.merge(folders, BATCHES, zoo(), method=sm.sap(), cache_only=True)
    with pytest.raises(sm.MethodError, match="0 <= i < n"):
        fed.score(folders, BATCHES, zoo(), cache=cache, shard=(2, 2), loss=loss)


def test_plans() -> None:
    def said(method: sm.Method) -> list[tuple[str, bool]]:
        return [(stage.what, stage.shards) for stage in fed.plan(method)]

    singles = [("losses of single adapters", True), ("gradients of single adapters", True)]
    assert said(sm.mean()) == []
    assert said(sm.sap_original()) == singles[1:]
    assert said(sm.sap()) == singles[:1]
    assert said(sm.sap(density=0.5)) == singles
    assert said(sm.regmean()) == [("inputs at single adapters", False)]
    assert not any(stage.cached for stage in fed.plan(sm.tune((sm.sap_original(),)))[:2])
