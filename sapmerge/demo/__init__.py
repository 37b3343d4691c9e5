"""The mission in small: `sapmerge demo` trains a tiny CLIP and four adapters,
and merges three of them for the fourth.

Real handwritten digits in four visual domains, one LoRA per domain, saved by PEFT; then each domain
in turn is left out, the other three adapters are merged from their files, and the accuracy is
measured on the domain left out. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapmerge import methods as library
from sapmerge.demo.data import Digits, Splits, anchor_batches, generator, load_digits, split
from sapmerge.demo.domains import DOMAINS, generic, render
from sapmerge.demo.extras import require_extras
from sapmerge.demo.report import DemoResult, draw
from sapmerge.demo.training import Plan, accuracy, train_adapter, train_base
from sapmerge.errors import MethodError, OutputExistsError
from sapmerge.merging.merge import merge

__all__ = ["DemoResult", "METHODS", "run"]

METHODS = ("sap", "sap_original", "mean", "ties", "knots", "core_space", "task_arithmetic", "dare")
"""What is compared: names of `sapmerge.methods`, each with its defaults."""
READ_ANCHORS = ("sap", "sap_original")

QUICK = Plan(base_steps=100, adapter_steps=10)


def _silent(_: str) -> None:
    """Tell nobody."""


def run(
    output: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    anchors: int = 32,
    methods: Sequence[str] = METHODS,
    say: Callable[[str], None] = _silent,
) -> DemoResult:
    """Train, merge, measure; about two minutes on two CPU cores.

    Args:
        output: a new or empty folder. It receives `base/`, `adapters/`, `merged/` and
            `accuracy.png`.
        seed: of everything that is random. One seed gives one result on one machine.
        quick: train for a few steps only; the numbers mean nothing then.
        anchors: image-text pairs of the generic style for the methods that read anchors, 1 to 100.
        methods: names of methods to compare.
        say: is told what happens.

    Returns:
        The accuracies; its `str` is the table.

    Raises:
        SapmergeError: a package of the extra `demo` is missing.
        OutputExistsError: the folder holds something.
        MethodError: `anchors` out of range, or no such method.

    Example:
        >>> from sapmerge.demo import run
        >>> print(run("demo"))  # doctest: +SKIP
    """
    output = Path(output)
    _check(output, anchors, methods)
    require_extras()
    with _reproducible():
        return _Demo.prepare(output, seed, quick, anchors, say).measure(methods)


@dataclass(frozen=True, eq=False)
class _Demo:
    """Everything that does not change between domains."""

    output: Path
    seed: int
    quick: bool
    say: Callable[[str], None]
    digits: Digits
    splits: Splits
    anchors: Sequence[dict[str, Tensor]]
    tests: dict[str, Tensor]

    @staticmethod
    def prepare(
        output: Path, seed: int, quick: bool, anchors: int, say: Callable[[str], None]
    ) -> _Demo:
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
            say,
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
        self.say(f"training a tiny CLIP on {len(self.splits.train)} digits in a generic style")
        base = train_base(
            self.digits.take(self.splits.train), plan, self.seed, self.output / "base"
        )
        zero_shot = {domain: self.accuracy(base, domain) for domain in DOMAINS}
        clock.append(time.perf_counter())

        across: dict[str, dict[str, float]] = {}
        for domain, style in DOMAINS.items():
            source, path = (
                self.digits.take(self.splits.sources[domain]),
                self.output / "adapters" / domain,
            )
            self.say(
                f"training the adapter of the domain {domain!r} on {len(source)} of them, its own"
            )
            adapted = train_adapter(base, source, style, domain, plan, self.seed, path)
            across[domain] = {other: self.accuracy(adapted, other) for other in DOMAINS}
        clock.append(time.perf_counter())

        merged: dict[str, dict[str, float]] = {}
        for name in methods:
            self.say(f"merging with {name}, each domain left out in turn")
            merged[name] = {domain: self._left_out(base, name, domain) for domain in DOMAINS}
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
            anchors=len(self.splits.anchors),
            tested=len(self.splits.test),
            seconds={
                phase: end - start
                for phase, start, end in zip(
                    ("base model", "adapters", "merging"), clock, clock[1:]
                )
            },
            quick=self.quick,
        )
        draw(result, self.tests)
        return result

    def _left_out(self, base: Any, name: str, domain: str) -> float:
        """Merge the other domains' adapters from their files; save the result;
        its accuracy on the domain left out.
        """
        sources = {other: self.output / "adapters" / other for other in DOMAINS if other != domain}
        method = getattr(library, name)()
        given = (self.anchors, base) if name in READ_ANCHORS else ()
        here = str(self.output / "base")
        merged = merge(
            sources, *given, method=method, rank="exact", base_model=here, progress=False
        )
        path = self.output / "merged" / name / f"without-{domain}"
        path.parent.mkdir(parents=True, exist_ok=True)
        merged.save_pretrained(path)
        model = copy.deepcopy(base)
        merged.apply_to(model)
        return self.accuracy(model, domain)


def _styles() -> dict[str, Any]:
    return {"generic": generic, **DOMAINS}


def _check(output: Path, anchors: int, methods: Sequence[str]) -> None:
    if not 1 <= anchors <= 100:
        raise MethodError(f"anchors must be 1 to 100; got {anchors!r}")
    for name in methods:
        if name not in library.__all__:
            raise MethodError(
                f"there is no method {name!r}; there are: {', '.join(library.__all__)}"
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputExistsError(
            f"{output} already exists and is not an empty folder; give another one"
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
