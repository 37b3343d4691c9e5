"""The mission in small: `sapmerge demo` trains a tiny CLIP and four adapters,
and merges three of them for the fourth.

Real handwritten digits in four visual domains, one LoRA per domain, saved by PEFT; then each domain
in turn is left out, the other three adapters are merged from their files, alone and with a client
whose labels are wrong, and the accuracy is measured on the domain left out. What SAP does is shown
on these adapters, step by step. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapmerge import methods as library
from sapmerge.demo.clock import Clock, nobody
from sapmerge.demo.data import (
    CLASSES,
    Digits,
    Splits,
    anchor_batches,
    generator,
    load_digits,
    split,
)
from sapmerge.demo.domains import DOMAINS, generic, render
from sapmerge.demo.drawing import accuracies
from sapmerge.demo.extras import require_extras
from sapmerge.demo.lessons import PICTURES, lessons
from sapmerge.demo.report import BAD, SUMS, DemoResult
from sapmerge.demo.training import Plan, accuracy, train_adapter, train_base
from sapmerge.errors import MethodError, OutputExistsError, SapmergeWarning
from sapmerge.merging.merge import merge

__all__ = ["DemoResult", "METHODS", "run"]

METHODS = ("sap", "sap_original", "mean", "ties", "knots", "core_space", "task_arithmetic", "dare")
"""What is compared: names of `sapmerge.methods`, each with its defaults."""
READ_ANCHORS = ("sap", "sap_original")

QUICK = Plan(base_steps=100, adapter_steps=10)


_WRITTEN = {"base", "adapters", "merged", "accuracy.png", *PICTURES}
_MERGE = 12
"""How many steps of training take as long as a merge and its test, about."""


def run(
    output: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    anchors: int = 32,
    methods: Sequence[str] = METHODS,
    say: Callable[[str], None] = nobody,
    progress: bool | None = None,
    overwrite: bool = False,
) -> DemoResult:
    """Train, merge, measure; about 80 seconds of one CPU core, and it uses no more.

    Args:
        output: a new or empty folder. It receives `base/`, `adapters/`, `merged/` and pictures.
        seed: of everything that is random. One seed gives one result on one machine.
        quick: train for a few steps only; the numbers mean nothing then.
        anchors: image-text pairs of the generic style for the methods that read anchors, 1 to 100.
        methods: names of methods to compare.
        say: is told what happens, where no bar is shown.
        progress: a bar with the time left; None: if stderr is a terminal.
        overwrite: replace what an earlier demo has written.

    Returns:
        The accuracies; its `str` is the table.

    Raises:
        SapmergeError: a package of the extra `demo` is missing.
        OutputExistsError: the folder holds something, or, with `overwrite`, something that is not
            of a demo.
        MethodError: `anchors` out of range, or no such method.

    Example:
        >>> from sapmerge.demo import run
        >>> print(run("demo"))  # doctest: +SKIP
    """
    output = Path(output)
    _check(output, anchors, methods, overwrite)
    require_extras()
    plan = QUICK if quick else Plan()
    merges = 2 * len(methods) * len(DOMAINS) + 2 * len(PICTURES)
    steps = plan.base_steps + plan.adapter_steps * (len(DOMAINS) + 1) + _MERGE * merges
    clock = Clock(steps, say, progress)
    try:
        with _reproducible():
            demo = _Demo.prepare(output, seed, quick, anchors, clock)
            if overwrite and output.exists():
                shutil.rmtree(output)
            return demo.measure(methods)
    finally:
        clock.close()


@dataclass(frozen=True, eq=False)
class _Demo:
    """Everything that does not change between domains."""

    output: Path
    seed: int
    quick: bool
    clock: Clock
    digits: Digits
    splits: Splits
    anchors: Sequence[dict[str, Tensor]]
    tests: dict[str, Tensor]

    @staticmethod
    def prepare(output: Path, seed: int, quick: bool, anchors: int, clock: Clock) -> _Demo:
        digits = load_digits()
        splits = split(digits.labels, anchors, seed)
        unseen = digits.take(splits.test).images
        tests = {
            name: render(unseen, style, generator(seed, "test", name))
            for name, style in _styles().items()
        }
        return _Demo(
            output,
            seed,
            quick,
            clock,
            digits,
            splits,
            anchor_batches(digits.take(splits.anchors), seed),
            tests,
        )

    def accuracy(self, model: Any, style: str) -> float:
        return accuracy(model, self.tests[style], self.digits.labels[self.splits.test])

    def measure(self, methods: Sequence[str]) -> DemoResult:
        plan = QUICK if self.quick else Plan()
        clock = [time.perf_counter()]
        step, merging = self.clock.step, partial(self.clock.step, _MERGE)
        self.clock.begin(f"a tiny CLIP on {len(self.splits.train)} digits in a generic style")
        base = train_base(
            self.digits.take(self.splits.train), plan, self.seed, self.output / "base", step
        )
        zero_shot = {domain: self.accuracy(base, domain) for domain in DOMAINS}
        clock.append(time.perf_counter())

        across: dict[str, dict[str, float]] = {}
        for domain, style in DOMAINS.items():
            source, path = (
                self.digits.take(self.splits.sources[domain]),
                self.output / "adapters" / domain,
            )
            self.clock.begin(f"the adapter of {domain!r} on {len(source)} digits of its own")
            adapted = train_adapter(base, source, style, domain, plan, self.seed, path, step)
            across[domain] = {other: self.accuracy(adapted, other) for other in DOMAINS}
        self._train_bad(base, plan)
        clock.append(time.perf_counter())

        self.clock.begin("what SAP does, step by step")
        adapters = {name: self.output / "adapters" / name for name in (*DOMAINS, BAD)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SapmergeWarning)  # who is left out stands in the text
            steps = lessons(adapters, BAD, self.anchors, base, self.output)
        self.clock.step(2 * _MERGE * len(PICTURES))
        clock.append(time.perf_counter())

        merged: dict[str, dict[str, float]] = {}
        with_bad: dict[str, dict[str, float]] = {}
        for name in methods:
            self.clock.begin(f"merges by {name}, each domain left out in turn")
            for found, bad in ((merged, False), (with_bad, True)):
                found[name] = {}
                for domain in DOMAINS:
                    found[name][domain] = self._left_out(base, name, domain, bad)
                    merging()
        clock.append(time.perf_counter())

        result = DemoResult(
            output=self.output,
            generic=self.accuracy(base, "generic"),
            zero_shot=zero_shot,
            own={domain: across[domain][domain] for domain in DOMAINS},
            single={
                d: sum(across[o][d] for o in DOMAINS if o != d) / (len(DOMAINS) - 1)
                for d in DOMAINS
            },
            merged=merged,
            with_bad=with_bad,
            lessons=steps,
            anchors=len(self.splits.anchors),
            tested=len(self.splits.test),
            seconds={
                phase: end - start
                for phase, start, end in zip(
                    ("base model", "adapters", "lessons", "merging"), clock, clock[1:]
                )
            },
            quick=self.quick,
        )
        rows = {"zero-shot": zero_shot, "one other adapter": result.single, **merged}
        rows["its own adapter"] = result.own
        accuracies(result.chart, rows, with_bad, frozenset(rows) - set(merged), self.tests)
        return result

    def _train_bad(self, base: Any, plan: Plan) -> None:
        """A client that saw generic digits and calls each of them the next one."""
        source = self.digits.take(self.splits.train)
        wrong = Digits(source.images, (source.labels + 1) % len(CLASSES))
        self.clock.begin("a client with wrong labels")
        path = self.output / "adapters" / BAD
        train_adapter(base, wrong, generic, BAD, plan, self.seed, path, self.clock.step)

    def _left_out(self, base: Any, name: str, domain: str, bad: bool) -> float:
        """Merge the other domains' adapters from their files, with the bad client's or without;
        save the result; its accuracy on the domain left out.
        """
        labels = [other for other in DOMAINS if other != domain] + [BAD] * bad
        sources = {label: self.output / "adapters" / label for label in labels}
        given = (self.anchors, base) if name in READ_ANCHORS else ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SapmergeWarning)  # who is left out stands in the text
            merged = merge(
                sources,
                *given,
                method=getattr(library, name)(),
                scale=len(labels) ** -0.5 if name in SUMS else 1.0,
                rank="exact",
                base_model=str(self.output / "base"),
                progress=False,
            )
            path = self.output / "merged" / name / (f"without-{domain}" + "-with-bad" * bad)
            path.parent.mkdir(parents=True, exist_ok=True)
            merged.save_pretrained(path)
        model = copy.deepcopy(base)
        merged.apply_to(model)
        return self.accuracy(model, domain)


def _styles() -> dict[str, Any]:
    return {"generic": generic, **DOMAINS}


def _check(output: Path, anchors: int, methods: Sequence[str], overwrite: bool) -> None:
    if not 1 <= anchors <= 100:
        raise MethodError(f"anchors must be 1 to 100; got {anchors!r}")
    for name in methods:
        if name not in library.__all__:
            raise MethodError(
                f"there is no method {name!r}; there are: {', '.join(library.__all__)}"
            )
    if not output.exists():
        return
    names = {path.name for path in output.iterdir()} if output.is_dir() else {""}
    if overwrite and (strange := sorted(names - _WRITTEN)):
        raise OutputExistsError(
            f"{output} holds {strange[0]!r}, which is not of a demo; give another folder"
        )
    if names and not overwrite:
        raise OutputExistsError(
            f"{output} already exists and is not an empty folder; give another one, or overwrite "
            "an earlier demo: overwrite=True"
        )


@contextmanager
def _reproducible() -> Generator[None]:
    """One thread and a forked random state, so that a result depends on the seed alone;
    both are put back.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
