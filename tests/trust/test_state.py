"""What a caller has set in torch decides on no bit, in one thread or in several,
and is what it was afterwards.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sapmerge as sm
from sapmerge.core.torch_state import model_state, pinned_state
from tests.trust.helpers import Small, batches, loss, same, state, tensors_of, write_adapter


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]


@contextmanager
def setting(put: Callable[[Any], object], value: Any, was: Any) -> Generator[None]:
    put(value)
    try:
        yield
    finally:
        put(was)


BATCHES = batches()


def seen() -> tuple[object, ...]:
    return (
        *(
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_float32_matmul_precision(),
        ),
        *(
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ),
        *(
            torch.get_num_threads(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
    )


@contextmanager
def device_by_default(device: str) -> Generator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        with suppress(AttributeError):  # up to torch 2.7 `get_default_device` fails after None
            del torch._GLOBAL_DEVICE_CONTEXT.device_context


@contextmanager
def errors_of_numpy() -> Generator[None]:
    before = np.seterr(all="raise")
    try:
        yield
    finally:
        np.seterr(**before)


class Passing(TorchDispatchMode):
    """Sees every operation and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Calling(TorchFunctionMode):
    """Sees every function of torch and changes none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": lambda: device_by_default("meta"),
    "with meta": lambda: torch.device("meta"),
    "medium": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "denormals": lambda: setting(torch.set_flush_denormal, True, False),
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "numpy": errors_of_numpy,
    "dispatch": Passing,
    "function": Calling,
    "forward gradients": torch.autograd.forward_ad.dual_level,
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "saved on the cpu": torch.autograd.graph.save_on_cpu,
    "two threads": lambda: setting(torch.set_num_threads, 2, 1),
}


def written(paths: list[Path], out: Path, model: Small | None) -> bytes:
    if model is None:
        sm.merge(paths, method=sm.knots(0.5), rank="exact").save_pretrained(out)
    else:
        sm.merge(paths, BATCHES, model, loss=loss, method=sm.sap_original()).save_pretrained(out)
    return tensors_of(out)


@pytest.mark.parametrize("anchors", [False, True], ids=["plain", "anchors"])
@pytest.mark.parametrize("name", STATES)
def test_the_bytes_are_the_same_and_the_state_is_what_it_was(
    paths: list[Path], tmp_path: Path, name: str, anchors: bool
) -> None:
    model = Small() if anchors else None
    wanted = written(paths, tmp_path / "wanted", model)
    with STATES[name]():
        before = seen()
        assert written(paths, tmp_path / "out", model) == wanted
        assert seen() == before


@pytest.mark.parametrize("name", STATES)
def test_applying_and_looking(paths: list[Path], name: str) -> None:
    def run() -> tuple[dict[str, torch.Tensor], str]:
        merged = sm.merge(paths, method=sm.ties(0.5), rank="exact")
        merged.apply_to(model)
        dense = {name: update.dense() for name, update in merged.updates()}
        return {**dense, **model.state_dict()}, str(sm.inspect(paths)) + str(merged.report)

    model = Small()
    wanted, said = run()
    wanted = {key: tensor.clone() for key, tensor in wanted.items()}
    model = Small()
    with STATES[name]():
        got, told = run()
    assert told == said
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


def called_by(transform: Callable[[Any], Any]) -> Callable[[Callable[[], Any]], Any]:
    """Call a function inside of another one that torch transforms or traces."""

    def run(action: Callable[[], Any]) -> Any:
        def function(x: torch.Tensor) -> torch.Tensor:
            action()
            return x.sum()

        return transform(function)

    return run


def in_fake_mode(action: Callable[[], Any]) -> Any:
    with FakeTensorMode():
        return action()


ONES = torch.ones(3)
VALUELESS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "fake": in_fake_mode,
    "vmap": called_by(lambda f: torch.func.vmap(f)(torch.ones(2, 3))),
    "grad": called_by(lambda f: torch.func.grad(f)(ONES)),
    "jvp": called_by(lambda f: torch.func.jvp(f, (ONES,), (ONES,))),
    "functionalize": called_by(lambda f: torch.func.functionalize(f)(ONES)),
    "make_fx": called_by(lambda f: make_fx(f)(ONES)),
    "jit": called_by(lambda f: torch.jit.trace(f, ONES, check_trace=False)),
    "fx": called_by(torch.fx.symbolic_trace),
}


@pytest.mark.parametrize("name", VALUELESS)
def test_where_tensors_have_no_values_nothing_is_read_or_merged(
    paths: list[Path], tmp_path: Path, name: str
) -> None:
    model, before, refused = Small(), seen(), list[str]()
    kept, ready = state(model), sm.merge(paths, method=sm.mean())
    adapter = ready.adapters[0]
    actions: dict[str, Callable[[], object]] = {
        "load": lambda: sm.Adapter.load(paths[0]),
        "update": lambda: adapter.update(next(iter(adapter.modules))),
        "merge": lambda: sm.merge(paths, method=sm.mean()),
        "anchors": lambda: sm.merge(paths, BATCHES, model, loss=loss, method=sm.sap_original()),
        "inspect": lambda: sm.inspect(paths),
        "save": lambda: ready.save_pretrained(tmp_path / "out"),
        "apply": lambda: ready.apply_to(model),
        "report": lambda: ready.report,
    }

    def all_of_them() -> None:
        for what, action in actions.items():
            with pytest.raises(sm.SapmergeError, match="tensors have no values of their own"):
                action()
            refused.append(what)

    VALUELESS[name](all_of_them)
    assert refused[: len(actions)] == list(actions)
    assert not (tmp_path / "out").exists()
    assert same(kept, state(model))
    assert seen() == before
    ready.save_pretrained(tmp_path / "out")  # and outside of it all is well
    assert sm.verify(tmp_path / "out") == []


def test_tensors_without_values_are_refused_as_inputs(paths: list[Path]) -> None:
    adapter = sm.Adapter.load(paths[0])
    names = [
        f"base_model.model.{name}.lora_{part}.weight" for name in adapter.modules for part in "AB"
    ]
    with FakeTensorMode():
        fakes = {name: torch.ones(*((2, 8) if "lora_A" in name else (12, 2))) for name in names}
        model = torch.nn.Sequential()
        model.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({p: torch.nn.Linear(8, 12, False) for p in ("q_proj", "v_proj")})
            for _ in range(2)
        )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(sm.SapmergeError, match="FakeTensor"):
        sm.Adapter.from_state_dict(config, fakes)
    with pytest.raises(sm.SapmergeError):
        sm.merge(paths, method=sm.mean()).apply_to(model)
    with pytest.raises(sm.AnchorError, match="FakeTensor"):
        sm.merge(paths, BATCHES, model, loss=loss, method=sm.sap_original())


def test_no_random_state_is_read_or_changed(paths: list[Path], tmp_path: Path) -> None:
    outputs = set[bytes]()
    for seed in (1, 2):
        model = Small()
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()
        sm.merge(paths, method=sm.dare(0.5), rank="exact").save_pretrained(
            out := tmp_path / f"out{seed}"
        )
        _ = sm.merge(paths, batches(), model, loss=loss, method=sm.sap_original()).report
        assert torch.equal(torch.get_rng_state(), before[0])
        assert all(map(np.array_equal, np.random.get_state(), before[1]))
        assert random.getstate() == before[2]
        outputs.add(tensors_of(out))
    assert len(outputs) == 1


def test_the_state_inside() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        with pinned_state(), pinned_state():
            assert seen()[:7] == (
                torch.float32,
                torch.device("cpu"),
                "highest",
                False,
                False,
                False,
                1,
            )
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    torch.set_num_threads(3)
    with pinned_state():
        assert torch.get_num_threads() == 1
        with model_state(torch.device("cpu")):
            assert torch.get_num_threads() == 3
            with pinned_state():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


# ----------------------------------------------------------------------------------------
# threads


def together(*actions: Callable[[], object]) -> list[BaseException]:
    failed: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def fresh_threads() -> int:
    found: list[int] = []
    assert not together(lambda: found.append(torch.get_num_threads()))
    return found[0]


def test_merges_in_threads_leave_torch_with_its_threads(paths: list[Path], tmp_path: Path) -> None:
    torch.set_num_threads(2)
    opened = [sm.Adapter.load(path) for path in paths]
    for number in range(6):

        def save(k: int, number: int = number) -> Callable[[], None]:
            return lambda: sm.merge(opened, method=sm.mean()).save_pretrained(
                tmp_path / f"{number}-{k}"
            )

        assert not together(*map(save, range(3)))
        assert (fresh_threads(), torch.get_num_threads()) == (2, 2)


def test_a_thread_that_meets_torch_during_a_merge_has_all_threads() -> None:
    torch.set_num_threads(3)
    with pinned_state():
        assert torch.get_num_threads() == 1
        assert fresh_threads() == 3
        with model_state(torch.device("cpu")), pinned_state():
            assert fresh_threads() == 3


def test_what_threads_share_is_put_back_by_the_last_one() -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with pinned_state():
            inside.set()
            leave.wait(10)

    torch.set_default_dtype(torch.float64)
    try:
        thread = threading.Thread(target=stay)
        thread.start()
        inside.wait(10)
        with pinned_state():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # the other one still needs it
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_model_in_several_threads(paths: list[Path], tmp_path: Path) -> None:
    sets = [paths[:2], paths[1:], paths]
    wanted = [written(some, tmp_path / f"wanted{k}", Small()) for k, some in enumerate(sets)]
    for number in range(4):
        model = Small().train()
        before = state(model)

        def run(k: int, number: int = number, model: Small = model) -> Callable[[], None]:
            def action() -> None:
                assert written(sets[k], tmp_path / f"out{number}-{k}", model) == wanted[k]

            return action

        assert not together(*map(run, range(len(sets))))
        assert same(before, state(model))


def test_a_base_that_changes_under_a_merge_is_refused(paths: list[Path]) -> None:
    model = Small()
    calls = 0

    def changing(m: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss(m, batch)

    merged = sm.merge(paths, batches(), model, loss=changing, method=sm.sap_original())
    anchors = merged.run.stream.anchors
    assert anchors is not None
    with torch.no_grad():
        model.layers[0]["q_proj"].weight.mul_(2)
    before = calls
    with pytest.raises(sm.AnchorError, match="changed since the merge began"):
        anchors.backward(0, {})
    assert calls == before
    assert merged.report.notes["anchor loss"]["merged adapter"] is None


def test_one_model_may_be_written_to_by_several_merges(paths: list[Path]) -> None:
    model, lone = Small(), Small()
    merges = [sm.merge([path], method=sm.mean()) for path in paths]
    assert not together(*(lambda merged=merged: merged.apply_to(model) for merged in merges))
    for merged in merges:
        merged.apply_to(lone)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, lone.state_dict()[name], atol=1e-5)


def test_nothing_is_entered_where_nothing_is_to_be_set() -> None:
    with nullcontext(), pinned_state():
        before = seen()
        with pinned_state():
            assert seen() == before
