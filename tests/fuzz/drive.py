"""Drives one target: `python -m tests.fuzz.drive config --seconds 600`,
under atheris where it is installed.

The plain driver needs nothing: it mutates a pool that starts with a good input and keeps what was
accepted or was refused with words not seen before.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .mutators import mutate
from .targets import TARGETS, seed

FINDINGS = Path(
    os.environ.get("FUZZ_FINDINGS") or Path(tempfile.gettempdir()) / "sapmerge-fuzz-findings"
)


def run(target: str, seconds: float, start: int = 0) -> int:
    """Mutate and try for so long; returns the number of executions, and raises at a finding,
    which is kept.
    """
    rng, function, pool = random.Random(start), TARGETS[target], [seed(target)]
    seen: set[str] = set()
    count, end = 0, time.monotonic() + seconds
    with _Watched(seen) as watched:
        while time.monotonic() < end:
            data = mutate(target, rng.choice(pool) if rng.random() < 0.7 else pool[0], rng)
            began = time.process_time()
            watched.new = False
            try:
                function(data)
                if time.process_time() - began > 4:
                    raise AssertionError("slower than 4 s")
            except BaseException as error:
                if not isinstance(error, KeyboardInterrupt):
                    keep(target, data)
                raise
            if watched.new and len(pool) < 2000:
                pool.append(data)
            count += 1
    return count


class _Watched:
    """Notices refusals in words that were not there before: coverage for the poor."""

    def __init__(self, seen: set[str]) -> None:
        self.seen, self.new = seen, False

    def __enter__(self) -> _Watched:
        from . import targets

        self._module, self._check = targets, targets._check_message

        def check(text: str) -> None:
            self._check(text)
            words = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "", text)[:120]
            if words not in self.seen:
                self.seen.add(words)
                self.new = True

        targets._check_message = check
        return self

    def __exit__(self, *_: object) -> None:
        self._module._check_message = self._check


def keep(target: str, data: bytes) -> Path:
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path = FINDINGS / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


def guided(target: str, seconds: int) -> None:
    """The same with atheris: coverage of the reader decides what is kept."""
    import atheris

    with atheris.instrument_imports(include=["sapmerge.io"]):
        for name in [name for name in sys.modules if name.startswith(("sapmerge", "tests.fuzz"))]:
            del sys.modules[name]
        from tests.fuzz.mutators import mutate as instrumented_mutate
        from tests.fuzz.targets import TARGETS as instrumented

    def custom(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        return instrumented_mutate(
            target, data if data and rng.random() < 0.8 else seed(target), rng
        )[:most]

    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-"))
    (corpus / "seed").write_bytes(seed(target))
    FINDINGS.mkdir(parents=True, exist_ok=True)
    limits = [
        "-max_len=65536",
        "-len_control=0",
        "-reduce_inputs=0",
        "-timeout=10",
        "-rss_limit_mb=4096",
    ]
    shown = ["-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={FINDINGS}/{target}-"]
    options = [sys.argv[0], f"-max_total_time={seconds}", *limits, *shown, str(corpus)]
    atheris.Setup(options, instrumented[target], custom_mutator=custom)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*TARGETS, "replay"])
    parser.add_argument(
        "file", nargs="*", type=Path, help="with replay: findings, called TARGET-..."
    )
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without atheris")
    options = parser.parse_args()
    if options.target == "replay":
        for path in options.file:
            TARGETS[path.name.partition("-")[0]](path.read_bytes())
        return
    found: Any = None
    if not options.plain:
        try:
            import atheris as found
        except ImportError:
            print("atheris is not installed (extra `fuzz`): the plain driver it is")
    if found is None:
        print(
            f"{options.target}: {run(options.target, options.seconds, options.seed)} executions, "
            "no finding"
        )
    else:
        guided(options.target, options.seconds)


if __name__ == "__main__":
    main()
