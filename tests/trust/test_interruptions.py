"""Ctrl-C at any line: the model is what it was, outputs are absent, old or new,
and a delayed one is not lost.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import sapmerge as sm
from sapmerge.core.undo import Undo, guarded, restoring, without_interrupts
from sapmerge.models import exclusive
from tests.trust.helpers import (
    Small,
    batches,
    interrupted,
    lines,
    loss,
    moments,
    pressed,
    same,
    state,
    write_adapter,
)

POINTS = int(os.environ.get("SAPMERGE_INTERRUPTIONS", "6"))


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Python's own handler, whatever the traced interruptions of other tests have left: they come
    also where no real one can.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]


def points(count: int) -> list[int]:
    """The first lines, the last ones, which put things back, and some in between."""
    spread = random.Random(0).sample(range(1, count + 1), min(POINTS, count))
    return sorted({1, 2, *range(max(1, count - 10), count + 1), *spread})


@pytest.mark.parametrize(
    "file", ["anchors/freezing.py", "anchors/hooks.py", "anchors/prefix.py", "anchors/towers.py"]
)
def test_passes_leave_the_model_as_it_was(paths: list[Path], file: str) -> None:
    model = Small().train()
    model.head.requires_grad_(False)
    model.layers[0].eval()
    before, threads = state(model), torch.get_num_threads()

    def action() -> None:
        sm.merge(
            paths, batches(), model, loss=sm.anchors.outputs_only(loss), method=sm.sap_original()
        )

    for at in points(lines(action, (file,))):
        interrupted(action, (file,), at)
        assert same(before, state(model)), (file, at)
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)
        assert torch.is_grad_enabled()


def test_real_ctrl_c_at_random_moments(paths: list[Path], tmp_path: Path) -> None:
    """At any instruction, also in the locks and in torch's settings,
    where Python itself looks for signals.
    """
    model = peft.get_peft_model(Small(), peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    before, threads, draw, stopped = state(model), torch.get_num_threads(), random.Random(2), 0

    def run(number: int) -> None:
        merged = sm.merge(paths, batches(), model, loss=loss, method=sm.sap_original())
        merged.save_pretrained(tmp_path / f"out{number}")

    start = time.monotonic()
    run(-1)
    usual = time.monotonic() - start
    for number in range(3 * POINTS):
        timer = threading.Timer(draw.uniform(0, usual), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()  # it may be that fast
            run(number)
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            stopped += 1
        out = tmp_path / f"out{number}"
        assert same(before, state(model)), number
        assert not out.exists() or sm.verify(out) == []
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, torch.float32)
        assert torch.is_grad_enabled()
    assert stopped > 0


MANAGING = ("core/undo.py", "core/torch_state.py", "anchors/freezing.py", "sapmerge/models.py")


def test_a_context_manager_that_is_interrupted_itself(paths: list[Path]) -> None:
    """At each moment at which Python looks for signals in what enters and leaves blocks. The
    exception is still alive where the model is looked at: no generator of it has been closed.
    """
    model = Small().train()
    before, threads = state(model), torch.get_num_threads()

    def action() -> None:
        loss_of = sm.anchors.outputs_only(loss)
        sm.merge(paths, batches(), model, loss=loss_of, method=sm.sap_original())

    found = moments(action, MANAGING)
    every = [(moment, nth) for moment, count in found.items() for nth in sorted({1, count})]
    assert len(every) > 150
    chosen, stopped = random.Random(1).sample(every, min(len(every), 2 * POINTS)), 0
    with torch.autocast("cpu", torch.bfloat16):
        for moment, nth in chosen:
            try:
                pressed(action, MANAGING, moment, nth)  # Python swallows it in a destructor
            except KeyboardInterrupt:
                stopped += 1
                assert same(before, state(model)), (moment, nth)
                assert torch.is_grad_enabled(), (moment, nth)
                assert torch.is_autocast_enabled("cpu"), (moment, nth)
                assert torch.get_num_threads() == threads, (moment, nth)
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert stopped > len(chosen) / 2


def test_another_thread_can_have_the_model_after_an_interruption(paths: list[Path]) -> None:
    model, got = Small(), list[bool]()

    def action() -> None:
        sm.merge(paths, batches(), model, loss=loss, method=sm.sap_original())

    def other() -> None:
        with exclusive(model):
            got.append(True)

    files = ("sapmerge/models.py",)
    inside = [moment for moment in moments(action, files) if moment[0].endswith(files)]
    assert len(inside) > 10
    chosen = random.Random(0).sample(inside, min(len(inside), POINTS))
    for moment in chosen:
        try:
            pressed(action, files, moment, 1)
        except KeyboardInterrupt:  # while it is alive
            thread = threading.Thread(target=other, daemon=True)
            thread.start()
            thread.join(10)
    assert len(got) == len(chosen)


def test_what_a_block_left_is_put_back_by_the_function_around_it() -> None:
    said = list[str]()

    @guarded
    def function() -> None:
        with restoring() as outer:
            outer.add(lambda: said.append("outer"))
            inner = restoring()
            inner.__enter__().add(lambda: said.append("inner"))  # and nobody leaves it
        said.append("left")

    with restoring() as mine:
        mine.add(lambda: said.append("mine"))
        function()
        assert said == ["outer", "left", "inner"]
    assert said[3:] == ["mine"]


def test_all_that_was_left_is_put_back_and_the_first_failure_is_raised() -> None:
    said = list[str]()

    def fails() -> None:
        raise ValueError("one")

    @guarded
    def function() -> None:
        restoring().__enter__().add(lambda: said.append("first"))
        restoring().__enter__().add(fails)

    with pytest.raises(ValueError, match="one"):
        function()
    assert said == ["first"]


def test_steps_that_were_cut_short_run_again() -> None:
    undo, done = Undo(), list[str]()

    def cut_once() -> None:
        done.append("begun")
        if done.count("begun") == 1:
            raise KeyboardInterrupt
        done.append("finished")

    undo.add(lambda: done.append("first"))
    undo.add(cut_once)
    with pytest.raises(KeyboardInterrupt):
        undo.run()
    undo.run()
    undo.run()
    assert done == ["begun", "begun", "finished", "first"]


def test_a_step_that_fails_does_not_stop_the_others() -> None:
    undo, done = Undo(), list[str]()

    def fails() -> None:
        raise ValueError("one")

    undo.add(lambda: done.append("first"))
    undo.add(fails)
    undo.add(lambda: done.append("last"))
    with pytest.raises(ValueError, match="one"):
        undo.run()
    assert done == ["last", "first"]


def test_ctrl_c_waits_and_is_not_lost() -> None:
    done = list[str]()

    def restoring() -> None:
        with without_interrupts():
            for number in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                done.append(str(number))

    with pytest.raises(KeyboardInterrupt):
        restoring()
    assert done == ["0", "1", "2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_callers_own_handler_gets_it() -> None:
    got = list[int]()
    before = signal.signal(signal.SIGINT, lambda number, frame: got.append(number))
    try:
        with without_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            assert got == []
        assert got == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


class Bounded(nn.Module):
    """Its embedding shortens the rows that it looks up, and it counts its calls in a buffer,
    also in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(20, 8, max_norm=0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.layers = nn.ModuleList(
            nn.ModuleDict({p: nn.Linear(8, 12, False) for p in ("q_proj", "v_proj")}) for _ in "ab"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return sum(
            block[p](self.emb(x)).square().mean()
            for block in self.layers
            for p in ("q_proj", "v_proj")
        )


def test_what_a_forward_pass_changes_is_put_back(paths: list[Path]) -> None:
    model = Bounded()
    before = state(model)
    ids = [torch.randint(0, 20, (4, 5)) for _ in range(2)]
    merged = sm.merge(paths, ids, model, loss=lambda m, x: m(x), method=sm.sap_original())
    assert merged.report.notes["anchor loss"]["base model"] > 0
    assert same(before, state(model))
