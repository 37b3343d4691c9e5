"""Structure-aware mutation: what comes out is nearly right, which random bytes never are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from sapmerge.io.config import NEUTRAL, READ, REFUSED

from .kinds import mutate_beside, mutate_kinds
from .targets import SPLIT

KEYS = sorted([*READ, *NEUTRAL, *REFUSED, "unheard_of", "", "\x1b[2J", "k" * 3000, "R", "r "])
WORDS = [
    "q_proj",
    "v_proj",
    "k_proj",
    "proj",
    "layers",
    "model",
    "lm_head",
    "embed_tokens",
    "",
    ".",
    "..",
    "self_attn",
    "0",
    "99",
    "weight",
    "bias",
    "base_layer",
    "original_module",
    "modules_to_save",
    "default",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "é",
    "\u202e",
    "\x07",
    "base_model",
    "visual",
]
NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    4,
    8,
    16,
    4.0,
    0.5,
    1e-40,
    1e38,
    1e300,
    2**31,
    2**63,
    2**64,
    10**19,
    10**30,
    True,
    False,
    None,
]
PATTERNS = [
    ".*",
    "q_proj",
    ".*_proj",
    "(q|v)_proj",
    "(a+)+",
    "(",
    "[",
    "a{9}",
    "(?!x).*",
    r"\w+\.",
    "(.*)*x",
    "(?:q_proj|v_proj)",
    "^",
    "$",
    r"\d",
    "(?i)Q_PROJ",
    "(?P<a>.)",
    r".*(?<=q)_proj",
]
TYPES = ["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "U8", "C64"]
_NO_JSON = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 400,
    "'x'",
    "[" * 40,
    "{" * 40,
    '{"a":1,"a":2}',
    '"\\ud800"',
    "\\u0000",
    "//",
    "\ufeff",
]


def mutate(target: str, data: bytes, rng: random.Random) -> bytes:
    """A few changes of the kinds that the target knows, now and then one of bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        data = _raw(data, rng) if rng.random() < 0.08 else _MUTATORS[target](data, rng)
    return data[:200_000]


def _raw(data: bytes, rng: random.Random) -> bytes:
    """One change of bytes."""
    changed, at = bytearray(data), rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0 and at < len(changed):
        changed[at] = rng.randrange(256)
    elif kind == 1:
        changed[at:at] = rng.choice(_NO_JSON).encode()
    elif kind == 2:
        del changed[at : at + rng.choice((1, 2, 8, 64))]
    else:
        other = rng.randrange(len(data) + 1)
        changed[at:at] = data[other : other + rng.choice((1, 8, 64, 512))]
    return bytes(changed)


def _value(rng: random.Random, old: Any = None, depth: int = 0) -> Any:
    """Something that may stand where `old` stands."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(PATTERNS) + rng.choice(["", *PATTERNS])
    if kind == 2:
        return [rng.choice(WORDS) for _ in range(rng.randrange(4))]
    if kind == 3:
        return {rng.choice(PATTERNS + WORDS): rng.choice(NUMBERS) for _ in range(rng.randrange(4))}
    if kind == 4 and depth < 40:
        return (
            [_value(rng, old, depth + 1)]
            if rng.random() < 0.5
            else {"a": _value(rng, old, depth + 1)}
        )
    if kind == 5 and isinstance(old, int | float) and abs(old) < 1e100:
        return old * rng.choice((-1, 0, 2, 0.5, 1000, 1e30)) + rng.choice((0, 1, -1))
    if kind == 6 and isinstance(old, list):
        return rng.sample(old, rng.randrange(len(old) + 1)) + rng.choice(
            ([], [rng.choice(WORDS)], old)
        )
    if kind == 7 and isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        return old[:at] + rng.choice(WORDS + PATTERNS) + old[at + rng.randrange(3) :]
    return rng.choice(WORDS)


def _config_table(table: Any, rng: random.Random) -> None:
    if not isinstance(table, dict):
        return
    kind = rng.randrange(5)
    if kind == 0 and table:
        del table[rng.choice(sorted(table))]
    elif kind == 1 and table:
        key = rng.choice(sorted(table))
        table[key] = _value(rng, table[key])
    elif kind == 2:
        table[rng.choice(("rank_pattern", "alpha_pattern"))] = {
            rng.choice(PATTERNS + WORDS): rng.choice((4, 4, 8, 0.5, -1, 2))
            for _ in range(rng.randrange(5))
        }
    elif kind == 3:
        table["target_modules"] = rng.choice(
            [
                rng.choice(PATTERNS),
                rng.choice(PATTERNS) + rng.choice(PATTERNS),
                rng.sample(WORDS, 3),
            ]
        )
    else:
        key = rng.choice(KEYS)
        table[key] = _value(rng, table.get(key))


def _config(data: bytes, rng: random.Random) -> bytes:
    try:
        table = json.loads(data)
        _config_table(table, rng)
    except (ValueError, RecursionError):
        return _raw(data, rng)
    return json.dumps(table, allow_nan=True, ensure_ascii=rng.random() < 0.7).encode(
        "utf-8", "surrogatepass"
    )


def _name(old: str, rng: random.Random) -> str:
    """Another tensor name, with parts dropped, doubled, swapped or foreign."""
    parts = old.split(".")
    at = rng.randrange(len(parts))
    kind = rng.randrange(4)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts[at] = rng.choice(WORDS)
    elif kind == 2:
        parts.insert(at, rng.choice([*WORDS, parts[at]]))
    else:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    return ".".join(parts)


def _shape(old: list[Any], rng: random.Random) -> list[Any]:
    shape = list(old)
    kind = rng.randrange(5)
    if kind == 0 and shape:
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 4, 8, 16, 17, 2**40, 2**63, -1))
    elif kind == 1:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((1, 1, 3, 0)))
    elif kind == 2 and shape:
        shape.pop(rng.randrange(len(shape)))
    else:
        shape.reverse()
    return shape


def _header(data: bytes, rng: random.Random) -> bytes:
    try:
        table = json.loads(data)
        names = [name for name, value in table.items() if isinstance(value, dict)]
        name = rng.choice(names)
        entry = table[name]
        kind = rng.randrange(9)
        if kind == 0:
            table = {
                (_name(own, rng) if own == name else own): value for own, value in table.items()
            }
        elif kind == 1:
            entry["dtype"] = rng.choice([*TYPES, "F128", "f32", "", 3])
        elif kind == 2:
            entry["shape"] = _shape(entry["shape"], rng)
        elif kind == 3:
            entry["data_offsets"] = [
                value + rng.choice((0, 1, -1, 4, 64, -64, 2**63)) for value in entry["data_offsets"]
            ]
        elif kind == 4:
            table["__metadata__"] = rng.choice(
                ({}, {"format": "pt"}, {"a": 1}, {"a": "é" * 9}, [], {"a": {}})
            )
        elif kind == 5:
            other = rng.choice(names)
            table[name], table[other] = table[other], table[name]
        elif kind == 6:
            del table[name]
        elif kind == 7:
            entry[rng.choice(("strides", "dtype", "shape"))] = rng.choice(
                (None, [], {}, "F32", [1, 2], 0)
            )
        text = json.dumps(
            table, separators=rng.choice(((",", ":"), (", ", ": "), (" ,\n", "\t: ")))
        )
        if kind == 8:  # the same name twice, which no table can hold
            text = text[:-1] + "," + json.dumps({rng.choice((name, _name(name, rng))): entry})[1:]
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):
        return _raw(data, rng)
    return (text + " " * rng.choice((0, 0, 1, 8))).encode("utf-8", "surrogatepass")


def _keys(data: bytes, rng: random.Random) -> bytes:
    try:
        table, listed = json.loads(data)
        if rng.random() < 0.3:
            _config_table(table, rng)
        else:
            at = rng.randrange(len(listed))
            kind = rng.randrange(6)
            if kind == 0:
                listed[at][0] = _name(listed[at][0], rng)
            elif kind == 1:
                listed[at][1] = rng.choice(TYPES)
            elif kind == 2:
                listed[at][2] = _shape(listed[at][2], rng)
            elif kind == 3:
                del listed[at]
            elif kind == 4:
                listed.append([_name(listed[at][0], rng), "F32", listed[at][2]])
            else:  # a whole module under another name
                old, new = listed[at][0].split(".")[-3], rng.choice(WORDS)
                listed += [
                    [name.replace(old, new), dtype, shape]
                    for name, dtype, shape in listed
                    if old in name
                ]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return _raw(data, rng)
    return json.dumps([table, listed]).encode()


def _folder(data: bytes, rng: random.Random) -> bytes:
    config, split, weights = data.partition(SPLIT)
    kind = rng.randrange(4)
    if not split or len(weights) < 8:
        return _raw(data, rng)
    if kind == 0:
        return _config(config, rng) + SPLIT + weights
    length = int.from_bytes(weights[:8], "little")
    text, body = weights[8 : 8 + length], weights[8 + length :]
    if kind == 1 and text:
        text = _header(text, rng)
        return config + SPLIT + len(text).to_bytes(8, "little") + text + body
    if kind == 2 and len(body) >= 4:
        at = rng.randrange(len(body) // 4) * 4
        number = rng.choice(
            (
                b"\0\0\xc0\x7f",
                b"\0\0\x80\x7f",
                b"\xff\xff\x7f\x7f",
                b"\1\0\0\0",
                bytes(4),
                b"\0\0\x80\xff",
            )
        )
        return config + SPLIT + weights[: 8 + length] + body[:at] + number + body[at + 4 :]
    return config + SPLIT + _raw(weights, rng)


def _kinds(data: bytes, rng: random.Random) -> bytes:
    changed = mutate_kinds(data, rng) if rng.random() < 0.7 else None
    return _keys(data, rng) if changed is None else changed


def _beside(data: bytes, rng: random.Random) -> bytes:
    return mutate_beside(data, rng) if rng.random() < 0.7 else _raw(data, rng)


_MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "config": _config,
    "header": _header,
    "keys": _keys,
    "folder": _folder,
    "banks": _kinds,
    "dora": _kinds,
    "beside": _beside,
}
