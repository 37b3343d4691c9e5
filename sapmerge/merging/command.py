"""The command of the shell that makes a merge again: what a model card shows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sapmerge.losses import NAMED

__all__ = ["command_of"]


def command_of(
    recipe: Mapping[str, Any], adapters: Sequence[tuple[str, str]], written: Mapping[str, object]
) -> str:
    """`sapmerge merge ...` of a recipe; upper-case words are the reader's own.

    Args:
        recipe: of the merge.
        adapters: label and place of every adapter.
        written: how the output was written, where that is not the usual way.

    Example:
        >>> recipe = {"method": "Chain(Mean())", "weights": {"a": 1.0, "b": 2.0}, "scale": 1.0}
        >>> print(command_of(recipe, [("a", "A"), ("b", "B")], {}))
        sapmerge merge a=A b=B -o OUT \\
            --method 'Chain(Mean())' \\
            --weights a=1,b=2
    """
    head = " ".join(["sapmerge merge", *(f"{label}={place}" for label, place in adapters)])
    flags: list[tuple[str, object]] = [("method", recipe["method"])]
    weights: Mapping[str, float] = recipe["weights"]
    if any(weight != 1 for weight in weights.values()):
        pairs = ",".join(f"{label}={weights[label]:.17g}" for label, _ in adapters)
        flags.append(("weights", pairs))
    if recipe.get("scale", 1.0) != 1:
        flags.append(("scale", recipe["scale"]))
    flags.append(("rank", recipe.get("rank")))
    policy = recipe.get("modules_to_save")
    if isinstance(policy, Mapping):
        chosen = cast("Mapping[str, str]", policy)
        policy = ",".join(f"{module}={label}" for module, label in sorted(chosen.items()))
    flags += [("modules-to-save", policy), ("base-model", recipe.get("base_model"))]
    if recipe.get("loss") is not None:
        head = f"{head} --anchors IMAGES --model BASE"
        flags.append(("loss", recipe["loss"] if recipe["loss"] in NAMED else None))
    flags += [("names", written.get("names")), ("serving", written.get("serving"))]
    flags.append(("save-dtype", written.get("dtype")))
    lines = [f"--{name} {shlex.quote(str(value))}" for name, value in flags if value is not None]
    if written.get("uniform_rank") is False:
        lines.append("--no-uniform-rank")
    return " \\\n    ".join([f"{head} -o OUT", *lines])
