"""The folder of a routed composition: stacked factors, one router file, what they mean, and a card.

* routed.json: labels, ranks, names, the router's settings, and the sha256 of the two files below
* factors.safetensors: <layer>.A (R, n) and <layer>.B (m, R), float32, scaling folded in; R is the
  sum of the ranks
* router.safetensors: <layer>, (K,) or (K, n), float32
* README.md: the card
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from sapmerge.errors import AdapterFormatError, NonFiniteError
from sapmerge.io.atomic import StagedFolder
from sapmerge.io.files import DEFAULT_LIMITS, Limits, RegularFile, shown
from sapmerge.io.header import open_weights
from sapmerge.io.outputs import CARD_NAME, Kind
from sapmerge.io.strict_json import parse

__all__ = ["FACTORS", "ROUTED", "ROUTER", "read_routed", "write_routed"]

ROUTED, FACTORS, ROUTER = "routed.json", "factors.safetensors", "router.safetensors"
_CONFIG_BYTES = 1 << 26  # a line per layer, of which there may be thousands
_LIMITS = Limits(config_bytes=_CONFIG_BYTES)
_KIND = Kind("a folder of routed adapters", ROUTED, lambda _: (ROUTED, FACTORS, ROUTER, CARD_NAME))


def write_routed(
    path: str | os.PathLike[str],
    config: Mapping[str, object],
    factors: Mapping[str, Tensor],
    router: Mapping[str, Tensor],
    card: str,
    overwrite: bool = False,
) -> None:
    """Write the folder, whole or not at all.

    Args:
        overwrite: replace an earlier one.

    Raises:
        OutputExistsError: it exists.
        NonFiniteError: a tensor is NaN or infinite.
        OutputError: the disk refuses.
    """
    from safetensors.torch import save  # importing sapmerge stays cheap

    with StagedFolder(path, overwrite=overwrite, kind=_KIND) as folder:
        digests: dict[str, str] = {}
        for name, tensors in ((FACTORS, factors), (ROUTER, router)):
            for key, tensor in tensors.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise NonFiniteError(
                        f"{os.fspath(path)!r}: {key!r} of {name} is not finite; nothing is written"
                    )
            data = save({key: tensor.float().contiguous() for key, tensor in tensors.items()})
            digests[name] = hashlib.sha256(data).hexdigest()
            folder.write(name, data)
        text = json.dumps({**config, "sha256": digests}, indent=1, sort_keys=True, allow_nan=False)
        folder.write(ROUTED, f"{text}\n".encode("ascii"))
        folder.write(CARD_NAME, card.encode())
        folder.publish()


def read_routed(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The config, the factors and the router's tensors of a folder, all finite and float32.

    The config has the keys that `write_routed` was given; what is in them is for the caller to
    check.

    Raises:
        AdapterFormatError: a file is missing, or is not the one that was written.
        AdapterConfigError: routed.json is no JSON object.
        NonFiniteError: a value is NaN or infinite.
    """
    folder = os.path.abspath(os.fsdecode(path))
    where = f"routed adapters {shown(os.fsdecode(path))}"
    with RegularFile(os.path.join(folder, ROUTED), f"{where}, {ROUTED}") as file:
        raw = bytes(file.read(0, min(file.size, _CONFIG_BYTES + 1)))
    config = parse(raw, f"{where}, {ROUTED}", _LIMITS)
    digests = config.pop("sha256", None)
    found: list[dict[str, Tensor]] = []
    for name in (FACTORS, ROUTER):
        wanted = cast("dict[str, object]", digests).get(name) if isinstance(digests, dict) else None
        found.append(_tensors(os.path.join(folder, name), f"{where}, {name}", wanted))
    return cast("dict[str, Any]", config), found[0], found[1]


def _tensors(path: str, where: str, digest: object) -> dict[str, Tensor]:
    with RegularFile(path, where) as file:
        weights = open_weights(file, path, DEFAULT_LIMITS)
        weights.scan(file)
    if weights.sha256 != digest:
        raise AdapterFormatError(
            f"{where}: is not the file that {ROUTED} was written with (another sha256)"
        )
    for name, entry in weights.entries.items():
        if entry.dtype != torch.float32:
            raise AdapterFormatError(
                f"{where}: tensor {shown(name)} is {entry.dtype}; expected float32"
            )
        if weights.facts[name].bad:
            raise NonFiniteError(f"{where}: tensor {shown(name)} has NaN or infinite values")
    return {name: weights.read(name) for name in weights.entries}
