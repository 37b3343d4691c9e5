"""Results of an earlier run, under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sapmerge.anchors.digest import digest, digest_of_model
from sapmerge.comparing.metric import Score
from sapmerge.comparing.table import MethodResult
from sapmerge.core.part import recipe
from sapmerge.core.protocols import Method
from sapmerge.errors import AnchorError, MethodError
from sapmerge.io.records import read_record, write_record
from sapmerge.models import base_of
from sapmerge.version import __version__

__all__ = ["KeptResults", "identity"]


def identity(value: Any, what: str) -> str:
    """The digest of something by its content.

    Raises:
        MethodError: its content cannot be told.
    """
    try:
        return digest(value)
    except AnchorError as error:
        raise MethodError(
            f"folder=...: whether {what} is that of an earlier run cannot be told ({error}); "
            "compare without a folder"
        ) from None


class KeptResults:
    """A folder with one file per result. A result is used again only if the version of the
    library, the adapters, their weights, the base model, the anchors, the loss, the metric and the
    method are the same, by content.

    What functions find by global names is not looked into: after a change there, take another
    folder.

    Args:
        folder: it is made if it does not exist; None keeps nothing.
        call: everything but the method and the metric.
        model: the base.
        evaluate: the metric.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        call: Sequence[Any],
        model: Any,
        evaluate: Callable[..., Any],
    ) -> None:
        self._folder = None if folder is None else os.path.join(os.fspath(folder), "results")
        if self._folder is None:
            return
        os.makedirs(self._folder, exist_ok=True)
        self._common = [
            __version__,
            torch.__version__,
            digest_of_model(base_of(model)),
            identity(list(call), "what is merged"),
            identity(evaluate, "the metric"),
        ]

    def get(self, method: Method | None, name: str, length: str) -> MethodResult | None:
        """The result of an earlier run under the name of this one."""
        if self._folder is None:
            return None
        data = read_record(self._path(method))
        if data is None:
            return None
        scores = {
            metric: Score(
                one["value"], None if one["samples"] is None else np.asarray(one["samples"])
            )
            for metric, one in data["scores"]
        }
        return MethodResult(
            name, length, data["recipe"], scores, data["norm"], data["seconds"], kept=True
        )

    def put(self, method: Method | None, result: MethodResult) -> None:
        """Keep a result."""
        if self._folder is None:
            return
        scores = [
            (
                metric,
                {
                    "value": one.value,
                    "samples": None if one.samples is None else np.asarray(one.samples).tolist(),
                },
            )
            for metric, one in result.scores.items()
        ]
        data = {"recipe": result.recipe, "norm": result.norm, "seconds": result.seconds}
        write_record(self._path(method), {**data, "scores": scores})

    def _path(self, method: Method | None) -> str:
        assert self._folder is not None
        what = "" if method is None else [recipe(method), identity(method, "a method")]
        key = json.dumps([*self._common, what])
        return os.path.join(self._folder, f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json")
