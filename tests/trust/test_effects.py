"""Nothing raises after the effect; weights are written where they are, and only there."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrizations, parametrize, prune

import sapmerge as sm
from sapmerge.io.files import DEFAULT_LIMITS
from sapmerge.io.held_values import HeldValues
from sapmerge.io.patterns import Budget, Tails
from sapmerge.merging.texts import _told_apart
from tests.trust.helpers import (
    SHAPES,
    Small,
    batches,
    interrupted,
    lines,
    loss,
    same,
    state,
    tensors_of,
    write_adapter,
)

FIRST = "layers.0.q_proj"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]


def expected(paths: list[Path], model: nn.Module) -> dict[str, Tensor]:
    """base + the mean of the adapters, from the factors in the files."""
    state = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    for path in paths:
        adapter = sm.Adapter.load(path)
        for name in SHAPES:
            state[f"{name}.weight"] += adapter.update(name).dense().double() / len(paths)
    return state


# ----------------------------------------------------------------------------------------
# what fails comes first


class Failing:
    """A loss that fails when the model is another one than at the start."""

    def __init__(self, model: nn.Module) -> None:
        self.weight = model.state_dict()[f"{FIRST}.weight"].clone()

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        if not torch.equal(model.state_dict()[f"{FIRST}.weight"], self.weight):
            raise ValueError("another model")
        return loss(model, batch)


def test_the_users_loss_does_not_run_on_the_merged_model_before_it_is_asked_for(
    paths: list[Path],
) -> None:
    model = Small()
    merged = sm.merge(
        paths, batches(), model, loss=Failing(model), method=sm.sap_original(density=1.0)
    )
    merged.apply_to(model)
    before = Small().state_dict()
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    assert sorted(changed) == sorted(f"{name}.weight" for name in SHAPES)
    with pytest.raises(ValueError, match="another model"):
        _ = merged.report


def test_the_losses_are_measured_before_the_output_is_there(
    paths: list[Path], tmp_path: Path
) -> None:
    model, out = Small(), tmp_path / "out"

    def fails_late(model: nn.Module, batch: Tensor) -> Tensor:
        if out.exists():
            raise ValueError("late")
        return loss(model, batch)

    merged = sm.merge(paths, batches(), model, loss=fails_late, method=sm.sap_original())
    merged.save_pretrained(out)
    assert sm.verify(out) == []
    assert merged.report.notes["anchor loss"]["merged adapter"] > 0  # measured before


def test_a_loss_that_fails_with_the_merged_adapter_leaves_no_output(
    paths: list[Path], tmp_path: Path
) -> None:
    model, last = Small(), list[float]()
    sm.merge(paths, batches(), model, loss=loss, method=sm.sap_original()).save_pretrained(
        tmp_path / "counted"
    )

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        last.append(0.0)
        if len(last) > calls:
            raise ValueError("late")
        return loss(model, batch)

    calls = 10**6
    merged = sm.merge(paths, batches(), model, loss=fails, method=sm.sap_original())
    calls = len(last) + 2
    with pytest.raises(ValueError, match="late"):
        merged.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    calls = 10**6
    merged.save_pretrained(tmp_path / "out")
    wanted, got = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("counted", "out")
    )
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_the_loss_at_the_merged_adapter_is_measured_when_the_report_is_read(
    paths: list[Path], tmp_path: Path
) -> None:
    model = Small()
    merged = sm.merge(paths, batches(), model, loss=loss, method=sm.sap_original(density=1.0))
    merged.apply_to(model)
    with torch.no_grad():
        wanted = sum(float(loss(model, batch)) for batch in batches()) / 2
    assert merged.report.notes["anchor loss"]["merged adapter"] == pytest.approx(wanted, rel=1e-6)
    with torch.no_grad():
        before = sum(float(loss(Small(), batch)) for batch in batches()) / 2
    assert merged.report.notes["anchor loss"]["base model"] == pytest.approx(before, rel=1e-6)


def sinks(tmp_path: Path) -> dict[str, tuple[nn.Module, Callable[[sm.Merged, nn.Module], None]]]:
    live = peft.get_peft_model(Small(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return {
        "apply": (Small(), lambda merged, model: merged.apply_to(model)),
        "save": (Small(), lambda merged, model: merged.save_pretrained(tmp_path / "out")),
        "add": (live, lambda merged, model: merged.add_to(model, "merged")),
    }


@pytest.mark.parametrize("name", ["save", "add"])
def test_a_warning_that_is_an_error_leaves_nothing_behind(
    paths: list[Path], tmp_path: Path, name: str
) -> None:
    model, sink = sinks(tmp_path)[name]
    before, merged = state(model), sm.merge(paths, method=sm.ties(0.3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", sm.SapmergeWarning)
        with pytest.raises(sm.SapmergeWarning, match="energy"):
            sink(merged, model)
    assert same(before, state(model))
    assert not (tmp_path / "out").exists()
    assert "merged" not in getattr(model, "peft_config", {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sink(merged, model)


@pytest.mark.parametrize("name", ["apply", "save", "add"])
@pytest.mark.parametrize("file", ["merging/sinks.py", "merging/merge.py", "io/held_values.py"])
def test_ctrl_c_at_any_line_of_a_sink(
    paths: list[Path], tmp_path: Path, name: str, file: str
) -> None:
    model, sink = sinks(tmp_path)[name]
    merged = sm.merge(paths[:2], method=sm.mean())
    before = state(model)
    count = (
        lines(lambda: sink(merged, sinks(tmp_path / "other")[name][0]), (file,))
        if name != "save"
        else 60
    )
    if name == "save" and (tmp_path / "out").exists():
        raise AssertionError
    step = max(1, count // 25)
    for at in [*range(1, count, step), *range(max(1, count - 12), count + 1)]:
        if not interrupted(lambda: sink(merged, model), (file,), at):
            break
        assert same(before, state(model)), (name, file, at)
        assert not (tmp_path / "out").exists(), (file, at)
        assert "merged" not in getattr(model, "peft_config", {})


@pytest.mark.parametrize("file", ["io/atomic.py", "io/writing.py", "io/outputs.py"])
def test_ctrl_c_at_any_line_of_the_writer_leaves_nothing(
    paths: list[Path], tmp_path: Path, file: str
) -> None:
    merged, out, at = sm.merge(paths[:2], method=sm.mean()), tmp_path / "out", 1
    while interrupted(lambda: merged.save_pretrained(out), (file,), at):
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}, at
        at += 3
    assert at > 3
    assert sm.verify(out) == []


def test_adding_that_fails_in_peft_leaves_the_model_as_it_was(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sink = sinks(tmp_path)["add"]
    before, active = state(model), model.active_adapter

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("of PEFT")

    monkeypatch.setattr(peft.utils, "set_peft_model_state_dict", fails)
    with pytest.raises(RuntimeError, match="of PEFT"):
        sink(sm.merge(paths, method=sm.mean()), model)
    assert same(before, state(model))
    assert model.active_adapter == active
    assert list(model.peft_config) == ["default"]
    monkeypatch.undo()
    sink(sm.merge(paths, method=sm.mean()), model)
    assert model.active_adapter == active
    after = state(model)["asking"]
    assert {name: after[name] for name in before["asking"]} == before["asking"]


# ------------------------------------------------------------------------------------------- where
# a weight really is


class Deaf(Tensor):
    """Its `copy_` does nothing, like that of some quantised tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _replaced(model: Small, value: Tensor) -> None:
    model.layers[0]["q_proj"].weight = nn.Parameter(value, requires_grad=False)


def _deaf(model: Small) -> None:
    _replaced(model, torch.randn(12, 8).as_subclass(Deaf))


def _hook(model: Small) -> None:
    layer = model.layers[0]["q_proj"]
    original = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.register_parameter("kept", original)
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", 1 * module.kept))
    layer.weight = 1 * original


def _expanded(model: Small) -> None:
    _replaced(model, torch.zeros(1, 8).expand(12, 8))


def _overlapping(model: Small) -> None:
    _replaced(model, torch.randn(20).as_strided((12, 8), (1, 1)))


def _meta(model: Small) -> None:
    _replaced(model, torch.zeros(12, 8, device="meta"))


def _inference(model: Small) -> None:
    with torch.inference_mode():
        value = torch.randn(12, 8)
        model.layers[0]["q_proj"].weight = nn.Parameter(value, requires_grad=False)


def _one_storage(model: Small) -> None:
    model.layers[0]["q_proj"].weight.data = model.layers[1]["v_proj"].weight.data


def _shifted(model: Small) -> None:
    whole = torch.randn(13 * 8)
    model.layers[0]["q_proj"].weight.data = whole[:96].view(12, 8)
    model.layers[1]["v_proj"].weight.data = whole[8:].view(12, 8)


def _with_a_buffer(model: Small) -> None:
    model.register_buffer("view", model.layers[0]["q_proj"].weight.data[3:4])


def _with_another_dtype(model: Small) -> None:
    model.register_buffer(
        "bytes", model.layers[0]["q_proj"].weight.data.view(torch.uint8)[2:3, 5:6]
    )


def _lazy(model: Small) -> None:
    model.layers[0]["q_proj"] = nn.LazyLinear(12, bias=False)


def _float8(model: Small) -> None:
    _replaced(model, torch.randn(12, 8).to(torch.float8_e4m3fn))


def _int8(model: Small) -> None:
    _replaced(model, torch.zeros(12, 8, dtype=torch.int8))


def _complex(model: Small) -> None:
    _replaced(model, torch.zeros(12, 8, dtype=torch.complex64))


def _one_array(model: Small) -> None:
    """Two storages of torch over one memory."""
    array = np.zeros(200, dtype=np.float32)
    model.layers[0]["q_proj"].weight.data = torch.from_numpy(array[:96].reshape(12, 8))
    model.layers[1]["v_proj"].weight.data = torch.from_numpy(array[8:104].reshape(12, 8))


class Property(nn.Module):
    in_features, out_features = 8, 12

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(12, 8))

    @property
    def weight(self) -> Tensor:
        return 1 * self.kept


def _property(model: Small) -> None:
    model.layers[0]["q_proj"] = Property()


REFUSED: list[Callable[[Small], object]] = [
    *(
        _deaf,
        _hook,
        _expanded,
        _overlapping,
        _meta,
        _inference,
        _one_storage,
        _shifted,
        _with_a_buffer,
    ),
    *(_with_another_dtype, _lazy, _float8, _int8, _complex, _one_array, _property),
    lambda model: nn.utils.weight_norm(model.layers[0]["q_proj"]),
    lambda model: nn.utils.spectral_norm(model.layers[0]["q_proj"]),
    lambda model: parametrizations.weight_norm(model.layers[0]["q_proj"]),
    lambda model: parametrizations.spectral_norm(model.layers[0]["q_proj"]),
    lambda model: parametrizations.orthogonal(model.layers[0]["q_proj"]),
    lambda model: parametrize.register_parametrization(
        model.layers[0]["q_proj"], "weight", Doubling()
    ),
    lambda model: prune.l1_unstructured(model.layers[0]["q_proj"], "weight", 0.5),
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__code__.co_names[-1])
def test_weights_that_a_write_would_miss_are_refused(
    paths: list[Path], change: Callable[[Small], object]
) -> None:
    model = Small().eval()  # spectral norm changes in training whenever one looks at it
    change(model)
    before = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not (tensor.is_meta or isinstance(tensor, UninitializedParameter))
    }
    with pytest.raises(sm.ModelMismatchError):
        sm.merge(paths, method=sm.mean()).apply_to(model)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def _rows(model: Small) -> None:
    whole = torch.randn(24, 8)
    for number, name in enumerate(("q_proj", "v_proj")):
        model.layers[0][name].weight.data = whole[12 * number : 12 * (number + 1)]


def _columns(model: Small) -> None:
    whole = torch.randn(12, 16)
    for number, name in enumerate(("q_proj", "v_proj")):
        model.layers[0][name].weight.data = whole[:, 8 * number : 8 * (number + 1)]


def _every_other(model: Small) -> None:
    whole = torch.randn(12, 16)
    for number, name in enumerate(("q_proj", "v_proj")):
        model.layers[0][name].weight.data = whole[:, number::2]


def _transposed(model: Small) -> None:
    model.layers[0]["q_proj"].weight.data = torch.randn(8, 12).T


@pytest.mark.parametrize("change", [_rows, _columns, _every_other, _transposed])
def test_views_without_a_common_entry_are_written(
    paths: list[Path], change: Callable[[Small], object]
) -> None:
    model = Small()
    change(model)
    wanted = expected(paths, model)
    sm.merge(paths, method=sm.mean()).apply_to(model)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.double(), wanted[name], atol=1e-5), name


# ----------------------------------------------------------------------------------------
# undo on disk


@pytest.mark.parametrize("in_memory", [0, 100, 1 << 20])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool]
)
def test_held_values_come_back(in_memory: int, dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).mul(3).to(dtype) for shape in ((3, 5), (), (0, 2), (40,))]
    tensors.append(torch.randn(6, 4).to(dtype).T)
    before = [tensor.clone() for tensor in tensors]
    held = HeldValues(in_memory)
    for tensor in tensors:
        held.keep(tensor)
        tensor.zero_()
    for _ in range(2):
        held.put_back()
        assert all(map(torch.equal, tensors, before))


def test_a_full_disk_is_an_error_before_anything_is_lost(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sapmerge.io.held_values._IN_MEMORY", 0)
    monkeypatch.setattr(HeldValues.__init__, "__defaults__", (0,))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = Small()
    before, real, calls = state(model), os.pwrite, list[int]()

    def full(file: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(sm.OutputError, match="TMPDIR"):
        sm.merge(paths, method=sm.mean()).apply_to(model)
    assert len(calls) == 3
    assert same(before, state(model))


# ----------------------------------------------------------------------------------- what is
# written is what is told


def test_energy_is_told_after_the_cast(tmp_path: Path) -> None:
    paths = [
        write_adapter(tmp_path / name, seed, dtype=torch.float16) for seed, name in enumerate("ab")
    ]
    merged = sm.merge(paths, method=sm.mean(), scale=1e-8)
    exact = {name: update.dense() for name, update in merged.updates()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged.save_pretrained(tmp_path / "out")
    stored = sm.Adapter.load(tmp_path / "out")
    total = sum(float(update.double().square().sum()) for update in exact.values())
    lost = sum(
        float((update.double() - stored.update(name).dense().double()).square().sum())
        for name, update in exact.items()
    )
    assert lost / total > 0.5
    assert merged.report.energy_kept == pytest.approx(1 - lost / total, abs=1e-3)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    paths = [
        write_adapter(tmp_path / f"a{seed}", seed, {"l.q": (12, 10)}, rank=3) for seed in range(3)
    ]
    told = {"written": 0, "refused": 0}
    for exponent in range(360, 386, 2):
        out = tmp_path / f"out{exponent}"
        try:
            sm.merge(paths, method=sm.mean(), scale=10 ** (exponent / 10)).save_pretrained(out)
        except sm.NonFiniteError:
            told["refused"] += 1
            assert not out.exists()
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sm.Adapter.load(out)
        told["written"] += 1
    assert told["written"] > 2
    assert told["refused"] > 2


def test_many_ranks_can_be_read_again(tmp_path: Path) -> None:
    """rank=0.9 gives many layers ranks of their own;
    readers allow few patterns that are no plain names.
    """
    shapes = {f"model.layers.{i}.self_attn.q_proj": (8, 8) for i in range(700)}
    path = write_adapter(tmp_path / "a", 0, shapes, rank=5)
    sm.merge([path], method=sm.mean(), rank=0.9).save_pretrained(
        tmp_path / "out", uniform_rank=False
    )
    stored = sm.Adapter.load(tmp_path / "out")
    assert len({module.rank for module in stored.modules.values()}) > 1
    assert {module.scaling for module in stored.modules.values()} == {1.0}


def test_names_that_are_told_apart_as_they_are() -> None:
    assert _told_apart(["a.b", "c.b", "x.a_b", "q", "layers.1.q", "layers.11.q"]) == {
        "c.b", "x.a_b", "layers.1.q", "layers.11.q",
    }  # fmt: skip
    assert _told_apart(["q.proj", "block.q.proj"]) == {"block.q.proj"}
    assert _told_apart(["odd[0]"]) == set()


# ------------------------------------------------------------------------------------------ inputs
# and working folder


def test_an_input_inside_the_output_is_refused(paths: list[Path], tmp_path: Path) -> None:
    """PEFT writes several adapters as subfolders of the first one."""
    out = write_adapter(tmp_path / "out", 5)
    inside = write_adapter(out / "second", 6)
    for overwrite in (True, False):
        with pytest.raises(sm.OutputError, match="holds the input"):
            sm.merge([paths[0], inside], method=sm.mean()).save_pretrained(out, overwrite=overwrite)
    assert sm.Adapter.load(inside)
    assert sm.Adapter.load(out)


def test_an_input_stays_an_input_when_the_working_folder_changes(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    merged = sm.merge(["a", "b"], method=sm.mean())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = tensors_of(paths[0])
    for path in ("../a", paths[0], "../elsewhere/../a"):
        with pytest.raises(sm.OutputError, match="one of the inputs"):
            merged.save_pretrained(path, overwrite=True)
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(sm.OutputError):
        merged.save_pretrained(tmp_path / "link", overwrite=True)
    assert tensors_of(paths[0]) == before
    merged.save_pretrained("out")
    assert sm.verify(tmp_path / "elsewhere" / "out", paths[:2]) == []


# ----------------------------------------------------------------------------------------
# other processes


def test_adapters_and_merges_can_be_pickled(paths: list[Path], tmp_path: Path) -> None:
    adapter = pickle.loads(pickle.dumps(sm.Adapter.load(paths[0])))
    fresh = sm.Adapter.load(paths[0])
    assert (adapter.digest, adapter.files, adapter.label) == (
        fresh.digest,
        fresh.files,
        fresh.label,
    )
    assert all(
        torch.equal(adapter.update(name).dense(), fresh.update(name).dense()) for name in SHAPES
    )
    merged = pickle.loads(pickle.dumps(sm.merge(paths, method=sm.knots(0.5), rank="exact")))
    merged.save_pretrained(tmp_path / "one")
    sm.merge(paths, method=sm.knots(0.5), rank="exact").save_pretrained(tmp_path / "two")
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")
    with open(paths[0] / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(sm.InputChangedError):
        _ = [adapter.update(name) for name in SHAPES]


@pytest.mark.parametrize("name", ["sap", "sap_original", "fisher", "regmean", "adamerging", "tune"])
@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy])
def test_merges_with_anchors_can_be_copied_to_another_process(
    paths: list[Path], tmp_path: Path, name: str, copied: Callable[[sm.Merged], sm.Merged]
) -> None:
    """With their model, which must be the one that the merge began with."""
    model = Small()
    merged = sm.merge(paths, batches(), model, loss=loss, method=getattr(sm, name)(), rank="exact")
    other = copied(merged)
    merged.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "two")
    assert tensors_of(tmp_path / "one") == tensors_of(tmp_path / "two")
    assert other.report.notes["anchor loss"] == merged.report.notes["anchor loss"]
    with torch.no_grad():
        model.head.weight.mul_(2)
    late = copied(merged)
    anchors = late.run.stream.anchors
    assert anchors is not None
    with pytest.raises(sm.AnchorError, match="changed since the merge began"):
        anchors.backward(0, {})


def test_plain_patterns_mean_what_they_mean_to_peft() -> None:
    """Looked up instead of tried, with PEFT's expression as the judge."""
    draw, hits = random.Random(1), 0

    def word(longest: int) -> str:
        return "".join(draw.choice("ab._") for _ in range(draw.randint(1, longest)))

    for _ in range(500):
        keys = {word(4): 1 for _ in range(5)}
        tails = Tails(keys, "rank_pattern", Budget(DEFAULT_LIMITS, "here"))
        for name in [word(7) for _ in range(6)]:
            wanted = [
                place for place, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name)
            ]
            assert tails.matching(name) == wanted
            hits += len(wanted)
    assert hits > 500
