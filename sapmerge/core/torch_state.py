"""The state of torch that everything is read, merged and written in: set here, and nowhere else.

A caller's autocast, default device, default dtype, grad mode, number of threads and precision of
matrix products must not decide on a bit of the result, and are what they were afterwards. Some
belong to a thread and some to the process; those of the process are set by the first thread that
comes and put back by the last one that leaves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # pyright: ignore

from sapmerge.core.undo import Undo, guarded, restoring, without_interrupts
from sapmerge.errors import SapmergeError

__all__ = ["model_state", "pinned", "pinned_state", "threads_outside", "without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def _deterministic(on: bool) -> None:
    torch.backends.cudnn.deterministic = on


def _benchmark(on: bool) -> None:
    torch.backends.cudnn.benchmark = on


_Setting = tuple[Callable[[], Any], Callable[[Any], object], object]
_SHARED: tuple[_Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    # "medium" multiplies in bfloat16, on a CPU too.
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    # cuDNN would choose its algorithms by a stopwatch. `use_deterministic_algorithms` stays as the
    # caller has it.
    (lambda: torch.backends.cudnn.deterministic, _deterministic, True),
    (lambda: torch.backends.cudnn.benchmark, _benchmark, False),
)
"""What all threads share: how to read it, how to set it, and what it has to be."""


class _Process:
    """The shared settings, and who needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = set[object]()
        self._before: list[tuple[_Setting, Any]] = []

    def enter(self, who: object) -> None:
        with self._lock:
            if not self._inside:
                self._before = [(setting, _read(setting)) for setting in _SHARED]
            self._inside.add(who)
            for (get, put, wanted), was in self._before:
                if was is not None and get() != wanted:
                    put(wanted)

    def leave(self, who: object) -> None:
        with self._lock:
            self._inside.discard(who)
            if not self._inside:
                for (get, put, _), was in self._before:
                    if was is not None and get() != was:
                        put(was)
                self._before = []


def _read(setting: _Setting) -> Any:
    """None for a setting that cannot be told: a program that sets precisions in torch's
    newer way, for one.
    """
    try:
        return setting[0]()
    except RuntimeError:
        return None


_process, _threads_lock = _Process(), threading.Lock()
_own = threading.local()
"""Of each thread: how many threads torch used outside of `pinned_state`,
and on which device it made tensors.
"""


@contextmanager
def pinned_state() -> Generator[None]:
    """float32 and the CPU by default, no autocast, no gradients, one thread:
    nothing of the caller's decides on a bit.

    On one thread sums are taken in one order. It may be entered again inside.

    Raises:
        SapmergeError: torch is tracing or transforming a function, and tensors have no values.
    """
    _check_values()
    with restoring() as undo:
        who, modes = object(), ExitStack()
        undo.add(lambda: _process.leave(who))
        _process.enter(who)
        _note_outside(undo)
        _set_threads(1, undo)
        # An interruption between the change of a mode and the note of how to leave it would
        # leave it changed, and so would one in the middle of leaving.
        undo.add(modes.close)
        with without_interrupts():
            modes.enter_context(without_autocast())
            if _default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
        yield


def pinned(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in `pinned_state` and leaves nothing behind, whenever Ctrl-C comes:
    of functions that users call.
    """

    @guarded
    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with pinned_state():
            return function(*args, **kwargs)

    return run


@contextmanager
def model_state(device: torch.device) -> Generator[None]:
    """For passes through a model on a device: `pinned_state`,
    but with as many threads as there are outside of it.

    A model may make tensors where the caller has put it,
    so a default device of its kind holds inside.
    """
    # `restoring` inside: the threads are put back while it is known how many there were
    with pinned_state(), restoring() as undo:
        threads, default = _own.outside
        _set_threads(threads, undo)
        modes = ExitStack()
        undo.add(modes.close)
        if default.type == device.type != "cpu":
            with without_interrupts():
                modes.enter_context(default)
        yield


def threads_outside() -> int:
    """How many threads the caller has given torch, which has one in `pinned_state`."""
    outside = getattr(_own, "outside", None)
    return torch.get_num_threads() if outside is None else outside[0]


_VALUELESS = {"FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode"}
"""The modes of torch in which tensors have no values, by the names of their classes:
their modules are slow to import.
"""


def _check_values() -> None:
    """Refuse to work where tensors have no values, or are those of a transformation.

    `torch.compile` is no such place: it leaves what it cannot trace to Python.
    """
    if torch.compiler.is_dynamo_compiling():
        return
    if torch._C._len_torch_dispatch_stack():  # pyright: ignore
        modes = {type(mode).__name__ for mode in _get_current_dispatch_mode_stack()}
        if found := modes & _VALUELESS:
            _refuse(f"{' and '.join(sorted(found))} is active")
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        _refuse("a transformation of torch.func (vmap, grad, jvp, functionalize) is running")
    if torch.jit.is_tracing() or (  # pyright: ignore
        getattr(_symbolic_trace, "_is_fx_tracing_flag", False) and not torch.compiler.is_compiling()
    ):
        _refuse("torch.jit or torch.fx is tracing a function")


def _refuse(why: str) -> NoReturn:
    raise SapmergeError(
        f"{why}, so tensors have no values of their own: read and merge adapters outside of it"
    )


def _note_outside(undo: Undo) -> None:
    """Remember how torch is set outside of the outermost block of this thread."""
    if getattr(_own, "outside", None) is None:
        undo.add(lambda: setattr(_own, "outside", None))
        _own.outside = torch.get_num_threads(), _default_device()


def _default_device() -> torch.device:
    """Asked by a tensor: up to torch 2.7 `get_default_device` does not know of
    `with torch.device(...)`, and fails after `set_default_device(None)`.
    """
    return torch.empty(0).device


def _set_threads(count: int, undo: Undo) -> None:
    """As many threads for torch in this thread of Python."""
    before = torch.get_num_threads()
    if count != before:
        undo.add(lambda: _switch(before))
        _switch(count)


def _switch(count: int) -> None:
    """`set_num_threads` sets also what threads made later begin with.
    That is put back at once, by one of them.

    A thread that met torch for the first time during a merge would keep a single thread for good.
    """
    outside = _own.outside[0]
    with _threads_lock:
        torch.set_num_threads(count)
        if count != outside:
            helper = threading.Thread(
                target=torch.set_num_threads, args=(outside,), name="sapmerge-threads"
            )
            helper.start()
            helper.join()


@contextmanager
def without_autocast() -> Generator[None]:
    """Products in the dtype of their factors, whatever the caller has switched on."""
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if _casts(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _casts(kind: str) -> bool:
    with suppress(RuntimeError):  # a kind of device that this version of torch does not know
        return cast("Callable[[str], bool]", torch.is_autocast_enabled)(kind)
    return False
