"""Runs the scripts of docs/gallery and writes each with what it printed and drew as a page beside
it: python -m docs.make_gallery
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GALLERY = Path(__file__).parent / "gallery"


def page(script: Path, folder: Path) -> str:
    """The script's docstring, its program, and its output from a run of it in a folder, where it
    leaves its pictures.
    """
    source = script.read_text(encoding="utf-8")
    tree = ast.parse(source)
    intro = ast.get_docstring(tree)
    assert intro is not None, script
    after = tree.body[0].end_lineno
    program = "\n".join(source.splitlines()[after:]).strip()
    paths = [str(GALLERY.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, encoding="utf-8",
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{script.name}:\n{done.stderr}")
    text = (
        f"{intro}\n\n```py\n{program}\n```\n\nIt prints\n\n```text\n{done.stdout.rstrip()}\n```\n"
    )
    pictures = sorted(path.name for path in folder.glob(f"{script.stem}*.png"))
    return text + "".join(f"\n![What it draws]({name})\n" for name in pictures)


def main() -> None:
    for script in sorted(GALLERY.glob("*.py")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            text = page(script, folder)
            assert text == page(script, folder), f"{script.name} does not run twice in one folder"
            script.with_suffix(".md").write_text(text, encoding="utf-8")
            for picture in folder.glob(f"{script.stem}*.png"):
                (GALLERY / picture.name).write_bytes(picture.read_bytes())


if __name__ == "__main__":
    main()
