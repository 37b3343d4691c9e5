"""sapmerge itself: `merge` and `save_pretrained`.
Memory is counted from the interpreter with torch loaded.
"""

from __future__ import annotations

import warnings
from typing import Any

from speed.child import Clock

__all__ = ["run"]


def run(job: dict[str, Any], clock: Clock) -> None:
    import sapmerge as sm

    # a rank of 16 keeps little of a dense result: that is the task
    warnings.simplefilter("ignore", sm.SapmergeWarning)
    method = sm.parse(job["method"])
    with clock.part("open and prepare"):
        merged = sm.merge(
            job["adapters"],
            method=method,
            rank=job["rank"],
            device=job["options"].get("device"),
            progress=False,
        )
    with clock.part("merge and save"):
        merged.save_pretrained(job["out"])
