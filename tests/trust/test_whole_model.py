"""`save_merged` obeys the rules of `save_pretrained`: whole or not at all, next to its inputs,
readable, and the same bytes whatever torch is set to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sapmerge as sm
from tests.io.test_writing import snapshot
from tests.trust.helpers import SHAPES, Small, interrupted, write_adapter
from tests.trust.test_state import STATES

FILES = ("merging/whole.py", "io/whole.py", "io/atomic.py", "io/base_folder.py", "io/outputs.py")


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]


def write_base(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Two shards, their index, and two files that are copied."""
    path.mkdir(parents=True)
    tensors = {name: tensor.to(dtype) for name, tensor in Small().state_dict().items()}
    parts = [
        {name: tensor for name, tensor in tensors.items() if name.startswith("layers.0")},
        {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.0")},
    ]
    where: dict[str, str] = {}
    for number, part in enumerate(parts):
        save_file(part, path / f"model-{number}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(part, f"model-{number}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (path / "config.json").write_text('{"model_type": "small"}')
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def merged(paths: list[Path], **more: Any) -> sm.Merged:
    return sm.merge(paths, method=sm.mean(), **more)


def test_the_weights_are_those_of_a_merge_in_memory(
    paths: list[Path], base: Path, tmp_path: Path
) -> None:
    merged(paths).save_merged(base, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = tensor.double()
        if name.removesuffix(".weight") in SHAPES:
            for path in paths:
                stored = load_file(path / "adapter_model.safetensors")
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                factors = (stored[f"{key}{letter}.weight"].double() for letter in "BA")
                product = next(factors) @ next(factors)
                wanted = wanted + 2.0 * product / len(paths)
        assert torch.allclose(after[name].double(), wanted, atol=1e-5), name


def test_the_record_tells_every_file(paths: list[Path], base: Path, tmp_path: Path) -> None:
    (base / "sapmerge.json").write_text("{}")  # the base is an output itself
    (base / "adapter_config.json").write_text("{}")  # and would be loaded on top
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    merged(paths, weights=[1.0, 2.0]).save_merged(base, out := tmp_path / "out")
    record = json.loads((out / "sapmerge.json").read_text())
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}
    del found["sapmerge.json"]
    assert record["files"] == found
    assert sorted(found) == [
        "config.json",
        "model-0.safetensors",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert [entry["weight"] for entry in record["inputs"]] in ([1.0, 2.0], [2.0, 1.0])
    assert {entry["digest"] for entry in record["inputs"]} == {
        sm.Adapter.load(path).digest for path in paths
    }
    assert (record["version"], record["recipe"]["method"]) == (sm.__version__, "Chain(Mean())")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_no_output(
    paths: list[Path], base: Path, tmp_path: Path, overwrite: bool
) -> None:
    done, before = merged(paths), snapshot(tmp_path)
    (tmp_path / "link").symlink_to("base")
    for path in (base, tmp_path, paths[0], tmp_path / "base" / ".." / "a", tmp_path / "link"):
        with pytest.raises(sm.OutputError):
            done.save_merged(base, path, overwrite=overwrite)
    (tmp_path / "link").unlink()
    assert snapshot(tmp_path) == before


def test_only_an_earlier_output_is_replaced(paths: list[Path], base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged(paths).save_merged(base, out)
    first = weights(out)
    with pytest.raises(sm.OutputExistsError):
        merged(paths).save_merged(base, out)
    merged(paths, scale=2.0).save_merged(base, out, overwrite=True)
    assert not torch.equal(weights(out)["layers.0.q_proj.weight"], first["layers.0.q_proj.weight"])
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.raises(sm.OutputError, match=r"more than a merged model: 'notes\.txt'"):
        merged(paths).save_merged(base, out, overwrite=True)
    assert snapshot(out) == before
    other = write_base(tmp_path / "other")
    for folder in (other, paths[1]):
        with pytest.raises(sm.OutputError, match=r"is not a merged model|one of the inputs"):
            merged(paths).save_merged(base, folder, overwrite=True)
    with pytest.raises(sm.OutputError, match="is not an adapter"):
        merged(paths).save_pretrained(out, overwrite=True)


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"files": []}', '{"files": {}}', ""])
def test_a_record_that_says_nothing_owns_nothing(
    paths: list[Path], base: Path, tmp_path: Path, record: str
) -> None:
    merged(paths).save_merged(base, out := tmp_path / "out")
    (out / "sapmerge.json").write_text(record)
    before = snapshot(out)
    with pytest.raises(sm.OutputError, match="more than a merged model"):
        merged(paths).save_merged(base, out, overwrite=True)
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32, torch.bool]
)
def test_quantised_weights_are_refused(
    paths: list[Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = write_base(tmp_path / "base", dtype)
    with pytest.raises(sm.ModelMismatchError, match="quantised"):
        merged(paths).save_merged(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_base_is_kept_and_rounded_once(
    paths: list[Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = write_base(tmp_path / "base", dtype)
    done = merged(paths)
    done.save_merged(base, tmp_path / "out")
    updates = {f"{name}.weight": update.dense() for name, update in done.updates()}
    wide = torch.promote_types(dtype, torch.float32)
    for name, tensor in weights(tmp_path / "out").items():
        old = weights(base)[name]
        wanted = old if name not in updates else (old.to(wide) + updates[name]).to(dtype)
        assert torch.equal(tensor, wanted), name


def test_what_overflows_is_refused(paths: list[Path], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", torch.float16)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(sm.NonFiniteError, match=r"layers\.0\.q_proj"):
        merged(paths, scale=1e6).save_merged(base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_head_that_the_base_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", modules_to_save=["other"])
    file = path / "adapter_model.safetensors"
    head = {"base_model.model.other.weight": torch.zeros(8, 12)}
    save_file(load_file(file) | head, file)
    with pytest.raises(sm.ModelMismatchError, match="has no such tensor"):
        merged([path], modules_to_save="mean").save_merged(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_overflows_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", torch.float16)
    path = write_adapter(tmp_path / "a", modules_to_save=["head"])
    file = path / "adapter_model.safetensors"
    head = {"weight": torch.full((8, 12), 1e6), "bias": torch.zeros(8)}
    save_file(
        load_file(file) | {f"base_model.model.head.{key}": value for key, value in head.items()},
        file,
    )
    with pytest.raises(sm.NonFiniteError, match=r"head\.weight"):
        merged([path], modules_to_save="mean").save_merged(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_changes_bytes_is_noticed(
    paths: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = os.pwrite, sorted(os.listdir(tmp_path))

    def lying(file: int, data: Any, offset: int) -> int:
        changed = bytearray(data)
        if offset > 0 and changed:
            changed[0] ^= 1
        return real(file, changed, offset)

    monkeypatch.setattr(os, "pwrite", lying)
    with pytest.raises(sm.OutputError, match="does not hold what was written"):
        merged(paths).save_merged(base, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("file", FILES)
def test_ctrl_c_leaves_no_output(paths: list[Path], base: Path, tmp_path: Path, file: str) -> None:
    out, done = tmp_path / "out", merged(paths)
    before = snapshot(tmp_path)
    step, at = 3, 1
    while interrupted(lambda: done.save_merged(base, out), (file,), at):
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "base"}, at
        at += step
    assert at > step
    assert out.exists()
    done.save_merged(base, out, overwrite=True)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.partition("/")[0] for name in after} == {"a", "b", "base", "out"}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_torch_decides_on_no_bit(
    paths: list[Path], base: Path, tmp_path: Path, name: str
) -> None:
    state: dict[str, Callable[[], AbstractContextManager[Any]]] = STATES
    merged(paths).save_merged(base, tmp_path / "wanted")
    with state[name]():
        merged(paths).save_merged(base, tmp_path / "out")
    for file in (tmp_path / "wanted").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_large_index_is_read(paths: list[Path], base: Path, tmp_path: Path) -> None:
    """Models with many experts have lists of several MB."""
    index = base / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] |= {f"unused.{k}": "model-0.safetensors" for k in range(40_000)}
    index.write_text(json.dumps(table))
    assert index.stat().st_size > 1 << 20
    merged(paths).save_merged(base, tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(base).keys()
