"""The packages of the extra `demo`, imported when they are needed and not before."""

from __future__ import annotations

import importlib
from typing import Any

from sapmerge.errors import SapmergeError

__all__ = ["extra", "require_extras"]


def extra(module: str) -> Any:
    """Import a module of the extra `demo`.

    Raises:
        SapmergeError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise SapmergeError(
            f"the demo needs {package}, which cannot be imported ({error}); install it with: "
            'pip install "sapmerge[demo]"'
        ) from error


def require_extras() -> None:
    """Import all of them, so that a missing one is an error before any work.

    Raises:
        SapmergeError: one is not installed.
    """
    for module in ("sklearn.datasets", "matplotlib", "transformers", "peft"):
        extra(module)
