"""What every benchmark prints and keeps: markdown tables, the command that made them,
versions and date.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

__all__ = ["RESULTS", "provenance", "table", "write"]

RESULTS = Path(__file__).parent / "results"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table, its columns aligned for those who read the text."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    padded = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([padded[0], rule, *padded[1:]])


def provenance(*packages: str) -> str:
    """The command, the date, the machine and the versions of sapmerge, torch and `packages`."""
    import torch

    import sapmerge

    # that of the code that runs, which an editable install may not know of
    versions = ", ".join(
        [
            f"sapmerge {sapmerge.__version__}",
            *(f"{name} {metadata.version(name)}" for name in ("torch", *packages)),
        ]
    )
    command = shlex.join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    today = datetime.date.today().isoformat()
    device = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}){device}"
    python = platform.python_version()
    return f"```sh\n{command}\n```\n\n{today}; {versions}; Python {python}; {machine}."


def write(name: str, title: str, *blocks: str, folder: Path = RESULTS) -> Path:
    """Print the blocks and keep them as `folder/name.md`; the file appears whole or not at all."""
    text = "\n\n".join([f"# {title}", *blocks]) + "\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
    return path
