"""Checks that no folder can reach: old libraries, disks that fail, limits and clocks."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import torch

import sapmerge as sm
from sapmerge.errors import (
    AdapterConfigError,
    AdapterFormatError,
    AdapterSecurityError,
    InputChangedError,
    LimitExceededError,
    MethodError,
    NonFiniteError,
    SapmergeError,
)
from sapmerge.io.adapter import Adapter
from sapmerge.io.files import Limits, RegularFile
from sapmerge.io.regex_safety import why_slow
from tests.versions import needs_pickles

from .base import tiny
from .build import PREFIX, QA, Q, good_config, with_tensors, write
from .configs import BOMB, BOMBS, LEGAL, magnitudes
from .outside import archive, good


def state(**changes: Any) -> dict[str, Any]:
    return good() | changes


def test_an_empty_path() -> None:
    with pytest.raises(AdapterFormatError, match="empty path"):
        Adapter.load("")


def test_paths_of_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    assert Adapter.load(os.fsencode(tmp_path / "one")).label == "one"  # type: ignore[arg-type]


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    adapter = Adapter.from_state_dict(good_config(), good())
    with pytest.raises(MethodError, match="no module"):
        adapter.update("x")
    with pytest.raises(MethodError, match="no saved tensor"):
        adapter.saved_tensor("x")
    with pytest.raises(MethodError, match="no vector"):
        adapter.vector("x")
    with pytest.raises(MethodError, match="label"):
        adapter.relabelled("a b")


def test_an_old_torch_does_not_unpickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(lambda _: good())(tmp_path / "x")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(AdapterSecurityError, match=r"2\.9\.1"):
        Adapter.load(tmp_path / "x", allow_pickle_weights=True)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(tensors=3), "at most 3"),
        (Limits(name_length=20), "tensor name"),
        (Limits(config_bytes=10), "at most 10"),
        (Limits(config_depth=1), "deeper than 1"),
        (Limits(rank_above_shape=False), None),
    ],
)
def test_limits_in_memory(limits: Limits, words: str | None) -> None:
    if words is None:
        Adapter.from_state_dict(good_config(), good(), limits=limits)
    else:
        with pytest.raises(LimitExceededError, match=words):
            Adapter.from_state_dict(good_config(), good(), limits=limits)


def test_limits_of_a_file(tmp_path: Path) -> None:
    write(tmp_path)
    for limits, words in (
        (Limits(header_bytes=50), "at most 50"),
        (Limits(tensors=3), "more than 3"),
        (Limits(name_length=9), "at most 9"),
    ):
        with pytest.raises(LimitExceededError, match=words):
            Adapter.load(tmp_path, limits=limits)


def test_the_clock_of_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    config = good_config(target_modules=".*_proj")
    with pytest.raises(LimitExceededError, match="longer than 0"):
        Adapter.from_state_dict(config, good(), limits=Limits(pattern_seconds=0))

    class Slow:
        def match(self, name: str, timeout: float) -> None:
            raise TimeoutError

    monkeypatch.setattr(regex, "compile", lambda _: Slow())
    with pytest.raises(LimitExceededError, match="longer than 2"):
        Adapter.from_state_dict(config, good())


def test_patterns_are_counted() -> None:
    """With all the time in the world: the number decides."""
    patterns = {f"(q|k){number}": 4 for number in range(513)}
    with pytest.raises(LimitExceededError, match="more than 512 patterns in target_modules"):
        Adapter.from_state_dict(
            good_config(rank_pattern=patterns), good(), limits=Limits(pattern_seconds=600)
        )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (7, "'int' is no config; pass a dict or a LoraConfig"),
        (good_config(revision=object()), r"cannot be written as JSON \('object is not JSON'\)"),
        (good_config(revision={1j: 2}), r"cannot be written as JSON \('keys must be str"),
    ],
)
def test_configs_in_memory_that_are_none(config: Any, words: str) -> None:
    with pytest.raises(AdapterConfigError, match=words):
        Adapter.from_state_dict(config, good())


def test_a_live_model_without_the_adapter() -> None:
    with pytest.raises(MethodError, match=r"the model has no adapter 'x'; it has \[\]"):
        Adapter.from_peft_model(tiny(), "x")


def test_a_live_model_that_was_rescaled() -> None:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    model: Any = peft.get_peft_model(tiny(), config)  # type: ignore[arg-type]
    model.base_model.model.model.layers[1].self_attn.q_proj.set_scale("default", 3.0)
    words = r"layers\.1\.self_attn\.q_proj' is scaled by 6 in the live model, by 2 in its config"
    with pytest.raises(AdapterConfigError, match=words):
        Adapter.from_peft_model(model, "default")


def test_a_row_without_a_direction(tmp_path: Path) -> None:
    """DoRA divides by the norm of a row of the base and its update."""
    with_tensors(magnitudes(), use_dora=True)(tmp_path)
    model = tiny()
    factors = good()
    with torch.no_grad():  # scaling 2
        product = 2 * factors[f"{Q}.lora_B.weight"] @ factors[QA]
        model.model.layers[0].self_attn.q_proj.weight[3] = -product[3]  # type: ignore[index]
    words = "layers.0.self_attn.q_proj.lora_magnitude_vector'.*and its update cancel"
    with pytest.raises(NonFiniteError, match=words):
        dict(sm.merge([tmp_path], method=sm.mean(), model=model).updates())


@needs_pickles
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"": torch.ones(2, dtype=torch.int64)}, r"has dtype int64 and shape \(2,\)"),
        ({"": torch.ones(0, 2)}, r"has dtype float32 and shape \(0, 2\)"),
        ({"model.": torch.ones(2), f"{PREFIX}model.": torch.ones(2)}, "is a duplicate"),
    ],
)
def test_a_projector_beside_the_adapter(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    write(tmp_path)
    named = {f"{head}mm_projector.weight": tensor for head, tensor in tensors.items()}
    torch.save(named, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(AdapterFormatError, match=rf"non_lora_trainables\.bin: tensor .*{words}"):
        Adapter.load(tmp_path, allow_pickle_weights=True)


@pytest.mark.parametrize(
    "bomb",
    [
        BOMB,
        *BOMBS,
        r"(a?){30}a{30}",
        "a?" * 20 + "a" * 20,
        r"(x+x+)+y",
        r"(.{1,40}){1,40}x",
        r"(?=(.+)+x)q",
        r"(.*)\1\1\1\1\1\1x",
    ],
)
def test_bombs_are_told_by_their_form(bomb: str) -> None:
    assert why_slow(bomb)


@pytest.mark.parametrize(
    "pattern",
    [
        *LEGAL,
        r"[a-z_]+(\.[a-z_0-9]+)+",
        "(q|k|v)_proj",
        r"(ab|cd)*x",
        r"layers\.\d{1,3}\..*",
        "q.?_proj",
    ],
)
def test_useful_patterns_are_not(pattern: str) -> None:
    assert why_slow(pattern) is None


def test_a_disk_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345678")

    class Failing(io.RawIOBase):
        def seek(self, *_: int) -> int:
            return 0

        def readinto(self, _: Any) -> int:
            raise OSError(5, "Input/output error")

    with RegularFile(str(path), "the file") as file:
        with pytest.raises(InputChangedError, match="became shorter"):
            file.read(4, 8)
        real, file._raw = file._raw, Failing()  # type: ignore[assignment]
        with pytest.raises(AdapterFormatError, match="Input/output error"):
            file.read(0, 8)
        real.close()


def test_a_file_that_becomes_a_fifo_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: real(tmp_path / "fifo", *rest))
    with pytest.raises(AdapterSecurityError, match="FIFO"):
        Adapter.load(tmp_path)


def test_in_memory_tensors_that_are_not_plain() -> None:
    class Lazy(torch.Tensor):
        pass

    for tensor in (
        torch.ones(4, 16).as_subclass(Lazy),
        torch.ones(4, 16, device="meta"),
        np.ones((4, 16)),
        torch.ones(4, 16).to_sparse(),
    ):
        with pytest.raises(SapmergeError, match="lora_A"):
            Adapter.from_state_dict(good_config(), state(**{QA: tensor}))


def test_a_repository_that_changes_between_two_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def download(repo_id: str, filename: str, **_: Any) -> str:
        write(tmp_path / filename)
        return str(tmp_path / filename / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(AdapterFormatError, match="changed between two downloads"):
        Adapter.from_hub("user/name")
