"""The same corpus under PEFT: `python -m tests.corpus.pefts` prints the table of docs/trust.md."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import oracle
from .build import Case
from .cases import CASES, GROUPS
from .runner import limit_memory, problems, run, wanted

TOLERANCE = 1e-3  # PEFT computes in the dtype of the file
LIMIT = 4 << 30


def pefts(case: Case, target: Path) -> Mapping[str, Any]:
    """What `PeftModel.from_pretrained` makes of a folder, or `add_weighted_adapter` of two."""
    asked: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.getaddrinfo", "socket.connect"):
            asked.append(str(arguments))
            raise ConnectionError("no network here")

    sys.addaudithook(watch)
    limit_memory(LIMIT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = _updates(case, target)
        except Exception as error:
            verdict = "network" if asked else "refuse"
            return {"verdict": verdict, "message": str(error)[:3000], "error": type(error).__name__}
    if asked:
        return {"verdict": "network"}
    said = [item for item in caught if issubclass(item.category, UserWarning)]
    if case.verdict != "refuse":
        right = wanted(case, target)
        # PEFT fills what the config targets and the file lacks with updates of zero, and has no
        # float64.
        got = {name: update for name, update in got.items() if name in right or update.any()}
        right = {
            name: update if abs(update).max() > 1e-37 else 0 * update
            for name, update in right.items()
        }
        off = oracle.error(got, right)
        if not off <= TOLERANCE:
            return {"verdict": "wrong", "message": f"{off:g}"}
    return {
        "verdict": "warn" if said else "accept",
        "message": "; ".join(str(item.message) for item in said)[:3000],
    }


def _updates(case: Case, target: Path) -> dict[str, Any]:
    from peft import PeftModel

    from .base import tiny

    name = "default"
    if case.action == "merge":
        model: Any = PeftModel.from_pretrained(tiny(), str(target / "a"), adapter_name="a")
        model.load_adapter(str(target / "b"), adapter_name="b")
        name = "both"
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], name, combination_type="cat")
    else:
        model = PeftModel.from_pretrained(tiny(), str(target))
    found: dict[str, Any] = {}
    for path, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight") and name in getattr(layer, "scaling", {}):
            delta = layer.get_delta_weight(name).detach().double()
            delta = (
                delta.T
                if type(layer.get_base_layer()).__name__ == "Embedding"
                else delta.flatten(1)
            )
            found[path] = delta.numpy()
    return found


def main() -> None:
    """Run every case with both, in a fork each, and print Markdown."""
    os.environ.update(
        HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DOWNLOAD_TIMEOUT="2", HF_HUB_ETAG_TIMEOUT="2"
    )
    import peft

    import sapmerge  # noqa: F401

    from .base import tiny

    peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    counts: dict[tuple[str, str], Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            row = counts.setdefault((case.group, case.verdict), Counter())
            row["cases"] += 1
            row["ours"] += not problems(case, run(case, Path(place)))
            theirs = run(case, Path(place), pefts)
            row[theirs.verdict] += 1
            if "-v" in sys.argv:
                print(
                    f"{case.group:12} {case.verdict:7} {theirs.verdict:8} {case.name[:60]!r:64} "
                    f"{theirs.error}",
                    file=sys.stderr,
                )
    keys = ("refuse", "warn", "accept", "wrong", "hung")
    total: dict[str, Counter[str]] = {}
    print(
        "| group | must | cases | sapmerge right | PEFT refuses | warns | is silent | is wrong | "
        "hangs |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = [(group, verdict) for group in GROUPS for verdict in ("refuse", "warn", "accept")]
    for group, verdict in rows:
        row = counts.get((group, verdict))
        if row:
            total.setdefault(verdict, Counter()).update(row)
            print(_line(group, verdict, row, keys))
    for verdict, row in total.items():
        print(_line("**all**", verdict, row, keys))
    print({key: sum(row[key] for row in total.values()) for key in ("network", "died", "code")})


def _line(group: str, verdict: str, row: Counter[str], keys: tuple[str, ...]) -> str:
    return (
        f"| {group} | {verdict} | {row['cases']} | {row['ours']} | "
        + " | ".join(str(row[key]) for key in keys)
        + " |"
    )


if __name__ == "__main__":
    main()
