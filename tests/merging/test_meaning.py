"""Merges that are valid and can hardly be meant are said, before any work where possible."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import sapmerge as sm
from sapmerge.io.base_names import is_path
from sapmerge.merging import stream
from tests.kinds import helpers as h
from tests.kinds.helpers import QV, edit, train

NAME = "base_model_name_or_path"


def told(paths: Any, save: Path | None = None, **settings: Any) -> str:
    """What `merge`, and saving, warn of."""
    settings.setdefault("method", sm.mean())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merged = sm.merge([str(path) for path in paths], **settings)
        if save is not None:
            merged.save_pretrained(save)
    return "\n".join(str(w.message) for w in found if issubclass(w.category, sm.SapmergeWarning))


def named(path: Path, base: str | None = "org/base") -> Path:
    return edit(path, lambda c: c | {NAME: base})


def scaled(path: Path, factor: float) -> Path:
    """The same adapter with another lora_B."""

    def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: t * factor if "lora_B" in key else t for key, t in held.items()}

    return edit(path, tensors=change)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    one, two = (train(tmp_path, h.llama, k, r=4, target_modules=QV) for k in (1, 2))
    return named(one), named(two)


def test_an_ordinary_merge_says_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert told(pair, save=tmp_path / "out") == ""
    assert told(pair, weights=[1, 0.01], save=tmp_path / "weighted") == "", "that was asked for"
    assert told([pair[0], pair[0]], save=tmp_path / "twice") == ""


def test_an_adapter_that_was_never_trained(pair: tuple[Path, Path], tmp_path: Path) -> None:
    get_peft_model(h.llama(), LoraConfig(target_modules=QV)).save_pretrained(tmp_path / "fresh")
    text = told([named(tmp_path / "fresh"), pair[0]])
    assert "'fresh-edited" in text
    assert "zero in all its 4 layers" in text


def test_two_that_cancel(pair: tuple[Path, Path], tmp_path: Path) -> None:
    turned = scaled(pair[0], -1.0)
    text = told([pair[0], turned], save=tmp_path / "out")
    assert f"{turned.name!r}" in text
    assert text.count("cancel") == 1, "once, and before the work"
    assert "cancel" in told([pair[0], scaled(pair[0], 1.001)], weights=[1, -1])
    assert "cancel" not in told([pair[0], scaled(pair[0], -0.9)], save=tmp_path / "some is left")


def test_three_that_cancel_are_said_when_the_result_is_known(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    both = tmp_path / "both"
    sm.merge([str(p) for p in pair], method=sm.task_arithmetic(), rank="exact").save_pretrained(
        both
    )
    three = [*pair, scaled(both, -1.0)]
    assert "cancel" not in told(three)
    assert "cancel" in told(three, save=tmp_path / "out")
    third = named(train(tmp_path, h.llama, 3, r=4, target_modules=QV))
    assert "cancel" not in told([*pair, third], save=tmp_path / "others")


def test_one_that_drowns_the_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    loud = scaled(pair[1], 100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = {
            a.label: a.energy_share
            for a in sm.merge([pair[0], loud], method=sm.mean()).report.adapters
        }
    text = told([pair[0], loud], save=tmp_path / "out")
    found = re.search(r"brings ([\d.]+)% of the energy", text)
    assert found is not None
    assert float(found[1]) / 100 == pytest.approx(shares[loud.name], abs=1e-4)
    assert text.count("energy") == 1, "once"
    assert "energy" not in told([pair[0], loud], method=sm.CapShare(sm.mean(), 0.6))
    assert "energy" not in told([pair[0], loud], weights=[1, 0.01])


def test_what_does_not_fit_is_not_read_twice(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is said when the layers were merged."""
    loud, reads = scaled(pair[1], 100.0), [0]
    update = sm.Adapter.update

    def counted(self: sm.Adapter, name: str) -> sm.Update:
        reads[0] += 1
        return update(self, name)

    monkeypatch.setattr(sm.Adapter, "update", counted)
    assert "energy" in told([pair[0], loud], save=tmp_path / "held")
    assert reads == [8]
    monkeypatch.setattr(stream, "_HELD", 0)
    assert "energy" not in told([pair[0], loud])
    assert reads == [8]
    assert "energy" in told([pair[0], loud], save=tmp_path / "out")
    assert reads == [16]


def test_a_base_that_nobody_names(pair: tuple[Path, Path]) -> None:
    nameless = [named(path, None) for path in pair]
    assert "names its base model" in told(nameless)
    assert told(nameless, base_model="org/base") == ""
    assert told(nameless, model=h.llama()) == "", "the model tells whether they fit"
    assert told([pair[0], nameless[1]]) == "", "the other one does"


@pytest.mark.parametrize("path", ["/home/someone/models/llama", "C:\\models\\llama", "./llama"])
def test_a_path_is_not_copied_into_the_output(
    pair: tuple[Path, Path], tmp_path: Path, path: str
) -> None:
    paths, out = [named(one, path) for one in pair], tmp_path / "out"
    assert repr(path) in told(paths, save=out)
    assert json.loads((out / "adapter_config.json").read_text())[NAME] is None
    for file in out.iterdir():
        assert path.encode() not in file.read_bytes().replace(b"\\\\", b"\\"), file.name
    assert told(paths, base_model="org/base", save=tmp_path / "named") == ""
    assert 'base_model: "org/base"' in (tmp_path / "named" / "README.md").read_text()


def test_a_path_that_is_here_is_kept_in_the_config(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """AutoPeftModel loads the base from there; the card does not tell."""
    (tmp_path / "base").mkdir()
    here = str(tmp_path / "base")
    text = told([named(one, here) for one in pair], save=tmp_path / "out")
    assert "but the config does" in text
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())[NAME] == here
    assert here not in (tmp_path / "out" / "README.md").read_text()


def test_which_names_are_paths() -> None:
    paths = ["/a", "~/a", "../a/b", "D:/a", "\\\\host\\a", "a/b/c", "file:///a", "runs\\a"]
    assert [name for name in paths if not is_path(name)] == []
    assert [
        name for name in ("gpt2", "org/base", "org/base/", "org/v1.5-7b") if is_path(name)
    ] == []


def layer_0(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in held.items() if "layers.0." in key}


@pytest.mark.parametrize("given", ["model", "folder"])
def test_half_of_a_checkpoint(pair: tuple[Path, Path], tmp_path: Path, given: str) -> None:
    base: Any = h.llama()
    if given == "folder":
        base.save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
    half = edit(pair[0], tensors=layer_0)
    text = told([half], model=base)
    assert f"{half.name!r} is half of a checkpoint" in text
    assert "'model.layers.1.self_attn.q_proj', 'model.layers.1.self_attn.v_proj' of" in text
    assert told([pair[0]], model=base) == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c | {"layers_to_transform": [0]},
        lambda c: c | {"target_modules": [f"model.layers.0.self_attn.{name}" for name in QV]},
        lambda c: c | {"target_modules": r".*layers\.0\.self_attn\.(q|v)_proj"},
        lambda c: c | {"exclude_modules": r".*layers\.1\..*"},
    ],
)
def test_a_config_that_selects_a_part_is_no_half(
    pair: tuple[Path, Path], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    assert told([edit(pair[0], change, layer_0)], model=h.llama()) == ""


def test_a_tower_that_nobody_adapted_is_no_half(tmp_path: Path) -> None:
    """q_proj is in both towers of a CLIP; one that has none of them was frozen."""
    from tests.anchors import models

    model = models.clip()
    adapters, _ = models.adapters(model, [models.VISION_TARGETS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.merge(adapters, None, model, method=sm.mean())


def test_zero_is_told_exactly() -> None:
    """A norm that is tiny is no zero."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["l"]}
    factors = {
        "base_model.model.l.lora_A.weight": torch.full((1, 2), 1e-30),
        "base_model.model.l.lora_B.weight": torch.full((2, 1), 1e-30),
    }
    assert sm.Adapter.from_state_dict(config, factors).reach("l") == pytest.approx(2e-60)
    factors["base_model.model.l.lora_B.weight"] = torch.zeros(2, 1)
    assert sm.Adapter.from_state_dict(config, factors).reach("l") == 0
