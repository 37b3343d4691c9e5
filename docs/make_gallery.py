"""Runs the scripts of docs/gallery and writes each with what it printed as a page beside it:
python -m docs.make_gallery
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

GALLERY = Path(__file__).parent / "gallery"


def page(script: Path) -> str:
    """The script's docstring, its program, and its output from a run of it."""
    source = script.read_text(encoding="utf-8")
    tree = ast.parse(source)
    intro = ast.get_docstring(tree)
    assert intro is not None, script
    after = tree.body[0].end_lineno
    program = "\n".join(source.splitlines()[after:]).strip()
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{script.name}:\n{done.stderr}")
    return f"{intro}\n\n```py\n{program}\n```\n\nIt prints\n\n```text\n{done.stdout.strip()}\n```\n"


def main() -> None:
    for script in sorted(GALLERY.glob("*.py")):
        script.with_suffix(".md").write_text(page(script), encoding="utf-8")


if __name__ == "__main__":
    main()
