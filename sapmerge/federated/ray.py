"""Scoring by Ray actors (extra `ray`): the shards of `score`, started again where one dies.

This module imports without Ray; using it says what to install.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from sapmerge.core.protocols import Method
from sapmerge.errors import MethodError, SapmergeError
from sapmerge.federated.extras import package
from sapmerge.federated.shards import score as score_shard
from sapmerge.losses import Loss
from sapmerge.merging.inputs import load_adapters

__all__ = ["score"]

_STORE = 100 << 20  # bytes: results go through the cache, not through Ray's object store
_ATTEMPTS = 2

Folders: TypeAlias = "Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]"


class _Scorer:
    """An actor: anchors and a model of its own, and one share after another."""

    def __init__(
        self, folders: Any, digests: Sequence[str], setup: Callable[[], tuple[Any, Any]], many: int
    ) -> None:
        torch.set_num_threads(many)
        self.adapters = load_adapters(folders)
        for adapter, digest in zip(self.adapters, digests, strict=True):
            if adapter.digest != digest:
                raise MethodError(
                    f"adapter {adapter.label!r} is another one here than where the run was started"
                )
        self.anchors, self.model = setup()

    def score(self, shard: tuple[int, int], method: Method | None, **options: Any) -> bool:
        return score_shard(self.adapters, self.anchors, self.model, method, shard=shard, **options)


def score(
    adapters: Folders,
    setup: Callable[[], tuple[Any, Any]],
    method: Method | None = None,
    *,
    cache: str | os.PathLike[str],
    actors: int = 2,
    cpus: float = 1.0,
    gpus: float = 0.0,
    loss: Loss | None = None,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    device: torch.device | str | None = None,
) -> bool:
    """Fill the cache of a merge, with actors side by side; see `sapmerge.federated.score`.

    Every actor opens the adapters and makes a model itself: paths and digests are sent, never
    tensors. One that dies is started again, twice, and goes on where the cache ends. What needs
    all adapters runs in one actor at the end. The cache has the bytes that one process would leave
    with the same number of threads.

    Args:
        adapters: folders that every machine sees.
        setup: () -> (anchors, model), on the actor's machine.
        method, loss, weights, device: those of the merge.
        cache: a folder that every machine sees.
        actors: how many, each with one share of the adapters.
        cpus, gpus: that Ray sets aside for an actor.

    Returns:
        Whether everything that the merge needs is in the cache now.

    Raises:
        MethodError: adapters that are not folders, or are others on another machine.
        SapmergeError: Ray is not installed; an actor died three times; whatever the merge
            would refuse.

    Example:
        >>> from sapmerge.federated import ray
        >>> ray.score(["art", "sketch"], setup, cache="cache", actors=2)  # doctest: +SKIP
    """
    if actors < 1:
        raise MethodError(f"actors is a whole number from 1 on; got {actors!r}")
    folders = _absolute(adapters)
    digests = [adapter.digest for adapter in load_adapters(folders)]
    ray: Any = package("ray", "ray")
    own = not ray.is_initialized()
    if own:
        ray.init(
            num_cpus=math.ceil(actors * cpus),
            include_dashboard=False,
            object_store_memory=_STORE,
            log_to_driver=False,
        )
    try:
        kind = ray.remote(_Scorer).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=_ATTEMPTS, max_task_retries=_ATTEMPTS
        )
        crew = [
            kind.remote(folders, digests, setup, torch.get_num_threads()) for _ in range(actors)
        ]
        options = {
            "cache": os.path.abspath(cache),
            "loss": loss,
            "weights": weights,
            "device": device,
        }
        try:
            ray.get([a.score.remote((i, actors), method, **options) for i, a in enumerate(crew)])
            done = bool(ray.get(crew[0].score.remote((0, 1), method, **options)))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, SapmergeError) else error from None
        except ray.exceptions.RayActorError as error:
            raise SapmergeError(
                f"an actor died {_ATTEMPTS + 1} times ({error}); what is done is in the cache: "
                "run it again"
            ) from error
        for actor in crew:
            ray.kill(actor)
        return done
    finally:
        if own:
            ray.shutdown()


def _absolute(adapters: Any) -> Any:
    """The folders by absolute paths; an actor has another working folder."""
    if isinstance(adapters, Mapping):
        return {str(label): _path(folder) for label, folder in adapters.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(adapters, (str, os.PathLike)):
        raise MethodError("adapters are a list of folders, or a mapping label -> folder")
    return [_path(folder) for folder in adapters]


def _path(folder: object) -> str:
    if not isinstance(folder, (str, os.PathLike)):
        raise MethodError(
            f"actors open adapters by their folders; got a {type(folder).__name__}: save it first"
        )
    return os.path.abspath(os.fspath(folder))
