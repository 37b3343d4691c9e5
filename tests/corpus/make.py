"""Writes the corpus: `python -m tests.corpus.make OUT`.
A folder per case, and a table of verdicts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .cases import CASES
from .runner import build


def main() -> None:
    out = Path(sys.argv[1])
    table: list[dict[str, object]] = []
    for number, case in enumerate(CASES):
        target = build(case, out / f"{number:03d}")
        table.append(
            {
                "name": case.name,
                "group": case.group,
                "action": case.action,
                "verdict": case.verdict,
                "words": case.words,
                "path": str(target.relative_to(out)),
            }
        )
    (out / "cases.json").write_text(json.dumps(table, indent=1))
    print(f"{len(CASES)} cases in {out}")


if __name__ == "__main__":
    main()
