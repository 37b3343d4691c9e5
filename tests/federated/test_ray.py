"""Scoring by Ray actors: the bytes of one process, also where an actor is killed."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import sapmerge as sm
from sapmerge.federated import ray, score
from tests.federated.helpers import uploads, zoo

# random adapters
pytestmark = pytest.mark.filterwarnings(
    "ignore::sapmerge.errors.SapmergeWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)

BATCHES = [torch.arange(10).reshape(2, 5), torch.arange(5, 15).reshape(2, 5)]


def setup() -> tuple[Any, Any]:
    return BATCHES, zoo()


def loss(model: Any, batch: torch.Tensor, dies: str) -> torch.Tensor:
    """Kills the process that comes to its third pass, once: the first who makes the file."""
    passes = getattr(model, "passes", 0)
    object.__setattr__(model, "passes", passes + 1)
    if passes == 2 and not os.path.exists(dies):
        with open(dies, "xb"):
            os._exit(1)
    return model(batch).square().mean()


def merged(folders: list[Path], out: Path, method: sm.Method, **options: Any) -> bytes:
    sm.merge(folders, *setup(), method=method, **options).save_pretrained(out)
    return (out / "adapter_model.safetensors").read_bytes()


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sm.SapmergeError, match=r'pip install "sapmerge\[ray\]"'):
        ray.score(uploads(tmp_path, 2), setup, cache=tmp_path / "cache")


def test_actors_get_folders(tmp_path: Path) -> None:
    adapter = sm.Adapter.load(uploads(tmp_path, 1)[0])
    with pytest.raises(sm.MethodError, match="by their folders"):
        ray.score([adapter], setup, cache=tmp_path / "cache")  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["sap_original", "sap"])
def test_serial_shards_and_actors_make_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folders, method = uploads(tmp_path, 4), getattr(sm, name)()
    (tmp_path / "nobody").touch()
    alive = partial(loss, dies=str(tmp_path / "nobody"))
    whole = merged(folders, tmp_path / "whole", method, loss=alive)
    for number in range(2):
        score(folders, *setup(), method, cache=tmp_path / "shards", shard=(number, 2), loss=alive)
    options: dict[str, Any] = {"loss": alive, "cache": tmp_path / "shards", "cache_only": True}
    assert merged(folders, tmp_path / "sharded", method, **options) == whole

    killing = partial(loss, dies=str(tmp_path / "dies"))
    assert ray.score(folders, setup, method, cache=tmp_path / "actors", actors=2, loss=killing)
    assert (tmp_path / "dies").exists(), "nobody was killed"
    options = {"loss": killing, "cache": tmp_path / "actors", "cache_only": True}
    assert merged(folders, tmp_path / "by-actors", method, **options) == whole
