"""What is fuzzed: functions of bytes. Each returns quietly,
or raises because a promise was broken.

A `SapmergeError` is no finding; any other exception, a message that is no fit,
and a wrong result are.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch

from sapmerge.errors import SapmergeError, SapmergeWarning
from sapmerge.io.adapter import Adapter
from sapmerge.io.config import settings
from sapmerge.io.contents import sort_contents
from sapmerge.io.files import DEFAULT_LIMITS, HeldWeights, RegularFile
from sapmerge.io.folder import BESIDE
from sapmerge.io.header import DTYPES, open_weights
from sapmerge.io.measuring import Entry
from sapmerge.io.strict_json import parse
from tests.corpus import oracle
from tests.corpus.build import CONFIG, WEIGHTS, good_config, good_tensors, header_of, stored

from .kinds import RAN, beside_seed, kinds_seed

_PARTS = re.compile(r"mm_projector|multi_modal_projector|vision|lm_head|embed|newline")
SPLIT = b"\0\0SPLIT\0\0"
_folder = Path(
    tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
)
_held = HeldWeights(
    {name: torch.ones(tensor.shape) for name, tensor in good_tensors().items()}, "weights"
)


class Broken(AssertionError):
    """A promise of the reader does not hold."""


def quiet(work: Callable[[], None]) -> bool:
    """Whether `work` accepts its input; messages of refusals and warnings are looked at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            work()
            accepted = True
        except SapmergeError as error:
            _check_message(str(error))
            accepted = False
    for item in caught:
        if issubclass(item.category, SapmergeWarning):
            _check_message(str(item.message))
    return accepted


def _check_message(text: str) -> None:
    if len(text) > 2000 or not text.isprintable():
        raise Broken(f"message of {len(text)} characters: {text[:300]!r}")


def config(data: bytes) -> None:
    """The bytes of a config, beside good tensors. Accepted: the scalings are the oracle's."""

    def work() -> None:
        table = parse(data, "config", DEFAULT_LIMITS)
        contents = sort_contents(_held, settings(table, "config"), table, "config", DEFAULT_LIMITS)
        for module in contents.modules.values():
            rank = oracle.by_pattern(_table(table, "rank_pattern"), module.spelled, table["r"])
            alpha = oracle.by_pattern(
                _table(table, "alpha_pattern"), module.spelled, table["lora_alpha"]
            )
            if rank != module.rank or abs(
                module.scaling - alpha / (rank**0.5 if table.get("use_rslora") else rank)
            ) > 1e-12 * abs(module.scaling):
                raise Broken(
                    f"{module.spelled} has scaling {module.scaling}, alpha {alpha}, rank {rank}"
                )

    quiet(work)


def _table(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def header(data: bytes) -> None:
    """The text of a header, with zeros for the tensors.
    What is accepted, safetensors accepts, and sees the same.
    """
    path = _folder / "header"
    size = 4096 if len(data) % 3 else 2304
    content = len(data).to_bytes(8, "little") + data + bytes(size)
    path.write_bytes(content)
    seen: dict[str, tuple[int, ...]] = {}

    def work() -> None:
        with RegularFile(str(path), "weights") as file:
            seen.update(
                {
                    name: entry.shape
                    for name, entry in open_weights(file, str(path), DEFAULT_LIMITS).entries.items()
                }
            )

    if quiet(work):
        theirs = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(content)}
        if theirs != seen:
            raise Broken(f"safetensors sees {theirs}, the reader {seen}")


class _Headers:
    """Weights of which only the header is there."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.where, self.entries, self.facts = "weights", entries, {}

    def read(self, name: str) -> torch.Tensor:
        raise Broken(f"{name} was read before it was sorted")


def keys(data: bytes) -> None:
    """[[name, dtype, shape], ...] and a config. Accepted:
    every tensor is used, and no tensor twice.
    """
    try:
        table, listed = json.loads(data)
        entries = {name: Entry(DTYPES[dtype], tuple(shape), 0, 0) for name, dtype, shape in listed}
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    if not all(
        isinstance(size, int) and size >= 0 for entry in entries.values() for size in entry.shape
    ):
        return
    if not all(isinstance(name, str) for name in entries):
        return

    def work() -> None:
        config = parse(json.dumps(table).encode(), "config", DEFAULT_LIMITS)
        contents = sort_contents(
            _Headers(entries), settings(config, "config"), config, "config", DEFAULT_LIMITS
        )  # type: ignore[arg-type]
        experts = {n: m for n, m in contents.modules.items() if m.kind == "parameter"}
        for name, module in experts.items():
            rows = entries[contents.tensors[name][0]].shape[0]
            if module.experts * module.rank != rows or module.expert >= module.experts:
                raise Broken(
                    f"{name} is one of {module.experts} of rank {module.rank}, {rows} rows"
                )
        later = {name for name, module in experts.items() if module.expert > 0}  # of one bank
        tensors = contents.tensors.items()
        used = [name for key, names in tensors if key not in later for name in names]
        if sorted(used) != sorted(entries):
            raise Broken(f"used {sorted(used)} of {sorted(entries)}")

    quiet(work)


def folder(data: bytes) -> None:
    """Config, separator, weights. Accepted: every update is finite and the oracle's."""
    config_bytes, _, weights = data.partition(SPLIT)
    (_folder / CONFIG).write_bytes(config_bytes)
    (_folder / WEIGHTS).write_bytes(weights)

    def work() -> None:
        adapter = Adapter.load(_folder)
        wanted = oracle.of_folder(_folder)
        if {module.spelled for module in adapter.modules.values()} != set(wanted):
            raise Broken(f"{sorted(adapter.modules)} instead of {sorted(wanted)}")
        for name, module in adapter.modules.items():
            update = adapter.update(name)
            got = (update.B.double() @ update.A.double()).numpy()
            size = float(np.linalg.norm(wanted[module.spelled]))
            if (
                not np.isfinite(got).all()
                or np.linalg.norm(got - wanted[module.spelled]) > 1e-5 * size + 1e-37
            ):
                raise Broken(f"the update of {name} is wrong")

    quiet(work)


def beside(data: bytes) -> None:
    """The pickle beside an adapter of LLaVA. Accepted: nothing but finite parts of a projector, a
    tower or the embeddings; and no code ran.
    """
    place = _folder / "llava"
    place.mkdir(exist_ok=True)
    (place / CONFIG).write_text(json.dumps(good_config()))
    (place / WEIGHTS).write_bytes(stored(good_tensors()))
    (place / BESIDE).write_bytes(data)
    plain = set(Adapter.load(_good()).modules)

    def work() -> None:
        adapter = Adapter.load(place, allow_pickle_weights=True)
        if set(adapter.modules) != plain:
            raise Broken(f"the modules are {sorted(adapter.modules)}")
        for name in adapter.saved:
            if not _PARTS.search(name) or not bool(adapter.saved_tensor(name).isfinite().all()):
                raise Broken(f"{name} was read")

    quiet(work)
    if os.path.exists(RAN):
        raise Broken("code of the pickle ran")


def _good() -> Path:
    place = _folder / "good"
    if not place.exists():
        place.mkdir()
        (place / CONFIG).write_text(json.dumps(good_config()))
        (place / WEIGHTS).write_bytes(stored(good_tensors()))
    return place


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "config": config,
    "header": header,
    "keys": keys,
    "folder": folder,
    "banks": keys,
    "dora": keys,
    "beside": beside,
}


def seed(target: str) -> bytes:
    """A good input."""
    if target == "beside":
        return beside_seed()
    if target in ("banks", "dora"):
        return kinds_seed(target)
    tensors = good_tensors()
    text = json.dumps(good_config()).encode()
    if target == "config":
        return text
    if target == "header":
        return json.dumps(header_of(tensors), separators=(",", ":")).encode()
    if target == "keys":
        listed = [[name, tensor.dtype, tensor.shape] for name, tensor in tensors.items()]
        return json.dumps([good_config(), listed]).encode()
    return text + SPLIT + stored(tensors)
